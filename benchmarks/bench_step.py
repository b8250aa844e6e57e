"""Part ``step``: a whole distillation step, with every way to compute its FSP loss."""

from __future__ import annotations

from argparse import Namespace
from functools import lru_cache, partial
from typing import Any

import pytest

from benchmarks import contenders, networks
from benchmarks.cases import show
from benchmarks.checks import Row
from benchmarks.contenders import Contender
from benchmarks.measure import measure
from benchmarks.memory import add_peaks
from benchmarks.networks import StepProblem
from benchmarks.options import chosen_contenders, chosen_dtypes, chosen_rounds


def contenders_of(options: Namespace) -> list[Contender]:
    """Ours and a few peers, or those that are asked for by name."""
    return chosen_contenders(options, lambda c: c.ours or c.name in networks.PEERS)


def settings(options: Namespace) -> list[tuple[str, str]]:
    """Names of networks and of dtypes."""
    names = networks.QUICK if options.quick else tuple(networks.BY_NAME)
    return [(name, dtype) for name in names for dtype in chosen_dtypes(options)]


def measure_part(options: Namespace) -> list[Row]:
    """The rows of ``python -m benchmarks step``."""
    rows: list[Row] = []
    chosen, device = contenders_of(options), options.device
    for name, dtype in settings(options):
        problem = StepProblem(networks.BY_NAME[name], device, dtype)
        found = measure(chosen, problem.prepare, device, chosen_rounds(options))
        show(f"{name}, {dtype}", found)
        rows += [{"workload": name, "dtype": dtype} | row for row in found]
    if device == "cpu":
        timed = [row for row in rows if "reason" not in row]
        keys = ("workload", "contender", "dtype")
        add_peaks([(x, partial(networks.lone_step, *(x[key] for key in keys))) for x in timed])
    return rows


problem_of = lru_cache(maxsize=1)(StepProblem)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    options = metafunc.config.option
    metafunc.parametrize(("network", "dtype"), settings(options), scope="module")
    metafunc.parametrize("contender", [c.name for c in contenders_of(options)])


def test_step(network: str, dtype: str, contender: str, device: str, time_steps: Any) -> None:
    problem = problem_of(networks.BY_NAME[network], device, dtype)
    time_steps(f"{network}, {dtype}", partial(problem.prepare, contenders.BY_NAME[contender]))
