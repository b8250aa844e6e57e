"""What a run of the benchmarks is asked for, and how much of it there is time for."""

from __future__ import annotations

from collections.abc import Iterable

import pytest

from benchmarks import contenders, workloads
from benchmarks.contenders import Contender
from benchmarks.cuda import on_cuda
from benchmarks.race import Race, Rounds, on_cpu

# Rounds of a race, and the seconds it may take: in all on a CPU, for each contender on a GPU.
ROUNDS = {"cpu": Rounds(30, 12, 8.0), "cuda": Rounds(15, 3, 0.3)}
QUICK_ROUNDS = {"cpu": Rounds(5, 3, 1.0), "cuda": Rounds(5, 3, 0.1)}
RACES: dict[str, Race] = {"cpu": on_cpu, "cuda": on_cuda}
DEFAULT_DTYPES = {"cpu": ["fp32"], "cuda": ["fp32", "bf16"]}


def chosen(config: pytest.Config, option: str, table: Iterable[str]) -> list[str]:
    """The names asked for, in the order of their table; all of them where none is asked for."""
    asked = config.getoption(option)
    return [name for name in table if not asked or name in asked]


def competing(config: pytest.Config) -> list[Contender]:
    """The contenders asked for, of those the device has."""
    device, asked = config.getoption("--device"), config.getoption("--contender")
    on_device = {c.name: c for c in contenders.on(device, timed=not asked)}
    return [on_device[name] for name in chosen(config, "--contender", on_device)]


def dtype_names(config: pytest.Config) -> list[str]:
    """The dtypes asked for, in the order of their table."""
    asked = config.getoption("--dtype") or DEFAULT_DTYPES[config.getoption("--device")]
    return [name for name in workloads.DTYPES if name in asked]


def workload_names(config: pytest.Config) -> list[str]:
    """The workloads asked for; a quick run has a few of them, if none is."""
    usual = workloads.QUICK if config.getoption("--quick") else tuple(workloads.BY_NAME)
    asked = config.getoption("--workload") or usual
    return [name for name in workloads.BY_NAME if name in asked]


def directions(config: pytest.Config) -> list[str]:
    """What to time: the loss alone, with its gradients, or both; a quick run takes the latter."""
    if config.getoption("--quick") and not config.getoption("direction"):
        return [workloads.TRAINING]
    return chosen(config, "direction", workloads.DIRECTIONS)


def layouts(config: pytest.Config) -> list[str]:
    """The memory formats asked for."""
    if config.getoption("--quick") and not config.getoption("--layout"):
        return ["nchw"]
    return chosen(config, "--layout", workloads.LAYOUTS)
