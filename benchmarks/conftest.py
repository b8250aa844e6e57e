"""Options and environment of the benchmarks."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest

from benchmarks import contenders, workloads
from benchmarks.environment import commit, machine

DEFAULT_ROUNDS = 30


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("fsp benchmarks")
    group.addoption("--workload", action="append", choices=list(workloads.BY_NAME))
    group.addoption("--contender", action="append", choices=list(contenders.BY_NAME))
    group.addoption("--rounds", type=int, default=DEFAULT_ROUNDS)


def chosen(config: pytest.Config, option: str, table: Iterable[str]) -> list[str]:
    """The names asked for, in the order of their table; all of them where none is asked for."""
    asked = config.getoption(option)
    return [name for name in table if not asked or name in asked]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    # By name, which is what JSON can hold. Workloads have module scope, so that what is measured
    # once per workload is not measured again for its next contender.
    if "workload_name" in metafunc.fixturenames:
        names = chosen(metafunc.config, "--workload", workloads.BY_NAME)
        metafunc.parametrize("workload_name", names, scope="module")
    if "contender_name" in metafunc.fixturenames:
        names = chosen(metafunc.config, "--contender", contenders.BY_NAME)
        metafunc.parametrize("contender_name", names)


@pytest.fixture(scope="module")
def workload(workload_name: str) -> workloads.Workload:
    return workloads.BY_NAME[workload_name]


@pytest.fixture(scope="session")
def contender_names(pytestconfig: pytest.Config) -> list[str]:
    return chosen(pytestconfig, "--contender", contenders.BY_NAME)


@pytest.fixture(scope="session")
def rounds(pytestconfig: pytest.Config) -> int:
    return pytestconfig.getoption("--rounds")


def pytest_benchmark_generate_machine_info() -> dict[str, Any]:
    """Ours in place of the plugin's, which records the host's name."""
    return machine()


def pytest_benchmark_generate_commit_info() -> dict[str, Any]:
    return commit()
