"""Options and environment of the benchmarks."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest

from benchmarks import contenders, workloads
from benchmarks.environment import commit, machine
from benchmarks.floor import copy_rate

DEFAULT_ROUNDS = {"cpu": 30, "cuda": 15}
NOT_MEASURED = pytest.StashKey[list[dict[str, Any]]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("fsp benchmarks")
    group.addoption("--device", choices=list(DEFAULT_ROUNDS), default="cpu")
    group.addoption("--dtype", action="append", choices=list(workloads.DTYPES))
    group.addoption("--workload", action="append", choices=list(workloads.BY_NAME))
    group.addoption("--contender", action="append", choices=list(contenders.BY_NAME))
    group.addoption("--rounds", type=int)


def chosen(config: pytest.Config, option: str, table: Iterable[str]) -> list[str]:
    """The names asked for, in the order of their table; all of them where none is asked for."""
    asked = config.getoption(option)
    return [name for name in table if not asked or name in asked]


def competing(config: pytest.Config) -> list[str]:
    """The contenders asked for, of those the device has."""
    on_device = [contender.name for contender in contenders.on(config.getoption("--device"))]
    return chosen(config, "--contender", on_device)


def pytest_configure(config: pytest.Config) -> None:
    config.stash[NOT_MEASURED] = []


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    # By name, which is what JSON can hold. Workloads and dtypes have module scope, so that what is
    # measured once for both is not measured again for the next contender.
    config = metafunc.config
    if "dtype_name" in metafunc.fixturenames:
        default = config.getoption("--dtype") or ["fp32"]
        names = [name for name in workloads.DTYPES if name in default]
        metafunc.parametrize("dtype_name", names, scope="module")
    if "workload_name" in metafunc.fixturenames:
        names = chosen(config, "--workload", workloads.BY_NAME)
        metafunc.parametrize("workload_name", names, scope="module")
    if "contender_name" in metafunc.fixturenames:
        metafunc.parametrize("contender_name", competing(config))


@pytest.fixture(scope="module")
def workload(workload_name: str) -> workloads.Workload:
    return workloads.BY_NAME[workload_name]


@pytest.fixture(scope="session")
def device(pytestconfig: pytest.Config) -> str:
    return pytestconfig.getoption("--device")


@pytest.fixture(scope="session")
def contender_names(pytestconfig: pytest.Config) -> list[str]:
    return competing(pytestconfig)


@pytest.fixture(scope="session")
def rounds(pytestconfig: pytest.Config, device: str) -> int:
    return pytestconfig.getoption("--rounds") or DEFAULT_ROUNDS[device]


@pytest.fixture(scope="session")
def not_measured(pytestconfig: pytest.Config) -> list[dict[str, Any]]:
    """Where to say what has no result, and why."""
    return pytestconfig.stash[NOT_MEASURED]


def pytest_benchmark_generate_machine_info(config: pytest.Config) -> dict[str, Any]:
    """Ours in place of the plugin's, which records the host's name."""
    device = config.getoption("--device")
    rate = {} if device == "cpu" else {"copy_rate": f"{copy_rate() / 1e12:.3f} TB/s"}
    return machine(device) | rate


def pytest_benchmark_generate_commit_info() -> dict[str, Any]:
    return commit()


def pytest_benchmark_update_json(config: pytest.Config, output_json: dict[str, Any]) -> None:
    output_json["not_measured"] = config.stash[NOT_MEASURED]
