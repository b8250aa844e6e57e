"""Part ``scaling``: time and memory as batch, channels or size of the maps grow."""

from __future__ import annotations

from argparse import Namespace
from typing import Any, NamedTuple

import pytest

from benchmarks import contenders
from benchmarks.cases import measure_cases
from benchmarks.checks import Row
from benchmarks.contenders import Contender
from benchmarks.options import chosen_contenders, chosen_dtypes, chosen_rounds
from benchmarks.workloads import Case, Workload

# Compiling for every shape takes longer than all the rest; broadcast has no room for the larger.
LEFT_OUT = ("torch.compile", "broadcast")


class Axis(NamedTuple):
    """What grows, in powers of two; the others of batch, channels and side of a map stay."""

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
        workload = Workload(f"{channels}-{channels}@{size}", batch, ((layer, layer),))
        return Case(workload, batch, dtype)


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


def contenders_of(options: Namespace) -> list[Contender]:
    """All contenders but those left out, unless they are asked for by name."""
    return chosen_contenders(options, lambda contender: contender.name not in LEFT_OUT)


def points(options: Namespace) -> list[tuple[Axis, int, Case]]:
    """Axis, value and case of everything that is measured; a quick run has every other value."""
    every = 2 if options.quick else 1
    return [
        (axis, value, axis.case(value, dtype))
        for dtype in chosen_dtypes(options)
        for axis in AXES[options.device]
        for value in axis.values[::every]
    ]


def measure_part(options: Namespace) -> list[Row]:
    """The rows of ``python -m benchmarks scaling``."""
    found = [(case, {"axis": axis.name, "value": value}) for axis, value, case in points(options)]
    return measure_cases(found, contenders_of(options), options.device, chosen_rounds(options))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    options = metafunc.config.option
    found = [(axis.name, value, case.dtype) for axis, value, case in points(options)]
    metafunc.parametrize(("axis", "value", "dtype"), found, scope="module")
    metafunc.parametrize("contender", [c.name for c in contenders_of(options)])


def test_scaling(
    axis: str, value: int, dtype: str, contender: str, device: str, time_case: Any
) -> None:
    case = next(x for x in AXES[device] if x.name == axis).case(value, dtype)
    time_case(case, contenders.BY_NAME[contender], group=f"{axis} {value}, {case}")
