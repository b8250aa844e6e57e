"""Time and memory as batch, channels and size of the maps grow, one at a time."""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import pytest

from benchmarks import cases, options
from benchmarks.contenders import Contender
from benchmarks.race import Outcome, Race, Rounds
from benchmarks.replay import CLOCK
from benchmarks.workloads import Case, Workload

# Each would be compiled for every shape, which takes longer than all the rest; and has no room.
LEFT_OUT = ("torch.compile", "broadcast")


class Axis(NamedTuple):
    """What grows, in powers of two, and what stays: batch, channels and side of a square map."""

    name: str
    values: tuple[int, ...]
    batch: int
    channels: int
    size: int

    def case(self, value: int, dtype: str) -> Case:
        """The pair of equal maps at one value."""
        batch, channels, size = (
            value if name == self.name else fixed
            for name, fixed in zip(("batch", "channels", "size"), self[2:], strict=True)
        )
        layer = (channels, size)
        return Case(
            Workload(f"{channels}-{channels}@{size}", batch, ((layer, layer),)), batch, dtype
        )


AXES = {
    "cpu": (
        Axis("batch", (1, 2, 4, 8, 16, 32, 64), 0, 64, 28),
        Axis("channels", (32, 64, 128, 256, 512, 1024, 2048), 4, 0, 7),
        Axis("size", (4, 7, 14, 28, 56, 112), 4, 64, 0),
    ),
    "cuda": (
        Axis("batch", (1, 4, 16, 64, 256, 1024), 0, 64, 28),
        Axis("channels", (32, 64, 128, 256, 512, 1024, 2048, 4096), 32, 0, 7),
        Axis("size", (4, 7, 14, 28, 56, 112, 224), 32, 64, 0),
    ),
}


def contenders_of(config: pytest.Config) -> list[Contender]:
    """All but those left out, unless they are asked for by name."""
    asked = config.getoption("--contender")
    return [c for c in options.competing(config) if asked or c.name not in LEFT_OUT]


def points(config: pytest.Config) -> list[tuple[Axis, int, str]]:
    """Axis, value and dtype of every case; a quick run takes every other value."""
    every = 2 if config.getoption("--quick") else 1
    return [
        (axis, value, dtype)
        for dtype in options.dtype_names(config)
        for axis in AXES[config.getoption("--device")]
        for value in axis.values[::every]
    ]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    names = [contender.name for contender in contenders_of(metafunc.config)]
    metafunc.parametrize(
        ("axis", "value", "dtype", "contender_name"),
        [(*point, name) for point in points(metafunc.config) for name in names],
        ids=lambda x: x.name if isinstance(x, Axis) else str(x),
    )


@pytest.fixture(scope="module")
def peaks(pytestconfig: pytest.Config, device: str) -> dict[tuple[Case, str], int | None]:
    """Of every contender on every case of a CPU."""
    if device != "cpu":
        return {}
    all_cases = [axis.case(value, dtype) for axis, value, dtype in points(pytestconfig)]
    return cases.peaks(all_cases, contenders_of(pytestconfig))


@pytest.fixture(scope="module")
def outcomes_of(pytestconfig: pytest.Config, device: str, race: Race, rounds: Rounds) -> Any:
    @lru_cache(maxsize=1)
    def outcomes(case: Case) -> dict[str, Outcome]:
        return cases.measure(case, contenders_of(pytestconfig), device, race, rounds)

    return outcomes


@pytest.mark.benchmark(timer=CLOCK.now)
def test_scaling(
    axis: Axis,
    value: int,
    dtype: str,
    contender_name: str,
    outcomes_of: Any,
    peaks: dict[tuple[Case, str], int | None],
    record: Any,
) -> None:
    case = axis.case(value, dtype)
    outcome = outcomes_of(case)[contender_name]
    if peaks:
        outcome = cases.with_peak(outcome, peaks[case, contender_name])
    growing = {"part": "scaling", "axis": axis.name, "value": value}
    identity = growing | cases.identity(case, contender_name)
    record(outcome, f"{axis.name} {value}, {case.workload.name}, {dtype}", identity)
