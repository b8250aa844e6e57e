"""Part ``loss``: the loss on every workload, for every contender, dtype, memory format and pass."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

import pytest

from benchmarks import contenders, workloads
from benchmarks.cases import measure_cases
from benchmarks.checks import Row
from benchmarks.options import chosen_contenders, chosen_dtypes, chosen_rounds, in_order
from benchmarks.workloads import Case


def cases(options: Namespace) -> list[Case]:
    """All cases that are asked for.

    A quick run has some of the workloads, one layout and one pass, where none is asked for.
    """
    quick = options.quick
    names = options.workload or (workloads.QUICK if quick else workloads.BY_NAME)
    layouts = options.layout or (["nchw"] if quick else workloads.LAYOUTS)
    passes = options.direction or ([workloads.TRAINING] if quick else workloads.PASSES)
    chosen = [workloads.BY_NAME[name] for name in in_order(names, workloads.BY_NAME)]
    return [
        Case(workload, workload.batch_on(options.device), dtype, layout, direction)
        for workload in chosen
        for dtype in chosen_dtypes(options)
        for layout in workload.layouts(in_order(layouts, workloads.LAYOUTS))
        for direction in in_order(passes, workloads.PASSES)
    ]


def measure_part(options: Namespace) -> list[Row]:
    """The rows of ``python -m benchmarks loss``."""
    found: list[tuple[Case, dict[str, str]]] = [(case, {}) for case in cases(options)]
    return measure_cases(found, chosen_contenders(options), options.device, chosen_rounds(options))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    options = metafunc.config.option
    found = [tuple(case.identity.values()) for case in cases(options)]
    metafunc.parametrize(("workload", "dtype", "layout", "direction"), found, scope="module")
    metafunc.parametrize("contender", [c.name for c in chosen_contenders(options)])


def test_loss(
    workload: str,
    dtype: str,
    layout: str,
    direction: str,
    contender: str,
    device: str,
    time_case: Any,
) -> None:
    measured = workloads.BY_NAME[workload]
    case = Case(measured, measured.batch_on(device), dtype, layout, direction)
    time_case(case, contenders.BY_NAME[contender])
