"""Options and fixtures of ``pytest benchmarks/``, where pytest-benchmark takes the times."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import pytest
import torch

from benchmarks.cases import Problem
from benchmarks.checks import Prepared
from benchmarks.contenders import Contender
from benchmarks.environment import machine
from benchmarks.measure import NotRun
from benchmarks.options import add_options, why_impossible
from benchmarks.workloads import Case

problem_of = lru_cache(maxsize=1)(Problem)  # contenders of one case share its maps


def pytest_addoption(parser: pytest.Parser) -> None:
    add_options(parser.getgroup("fsp benchmarks").addoption)


def pytest_configure(config: pytest.Config) -> None:
    reason = why_impossible(config.option)
    if reason is not None:
        raise pytest.UsageError(reason)


@pytest.fixture(scope="session")
def device(pytestconfig: pytest.Config) -> str:
    return pytestconfig.option.device


@pytest.fixture
def time_steps(benchmark: Any, device: str) -> Callable[[str, Callable[[], Prepared]], None]:
    """Prepare a contender and time its steps; on a GPU with the wait for the end of each."""

    def time(group: str, prepare: Callable[[], Prepared]) -> None:
        try:
            prepared = prepare()
        except NotRun as reason:
            pytest.skip(str(reason))
        steps = itertools.cycle(prepared.steps)

        def step() -> None:
            next(steps)()
            if device == "cuda":
                torch.cuda.synchronize()

        benchmark.group = group
        benchmark.extra_info.update(prepared.facts)
        benchmark(step)

    return time


@pytest.fixture
def time_case(time_steps: Callable[..., None], device: str) -> Callable[..., None]:
    """Time a contender on a case; ``group`` is its table, by default the case's own."""

    def time(case: Case, contender: Contender, group: str = "") -> None:
        time_steps(group or str(case), lambda: problem_of(case, device).prepare(contender))

    return time


def pytest_benchmark_generate_machine_info(config: pytest.Config) -> dict[str, Any]:
    """Hardware and versions, in place of the plugin's own, which record the host's name."""
    return machine(config.option.device)
