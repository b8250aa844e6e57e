"""Errors of every contender as the student nears its teacher.

What is timed is the measuring, once, since pytest-benchmark keeps no results without a time.
"""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks import accuracy
from benchmarks.contenders import Contender


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    asked = metafunc.config.getoption("--dtype")
    # Those who ask for fp32 are told of its fast products, too.
    names = [x for x in accuracy.PRECISIONS if not asked or x.replace("tf32", "fp32") in asked]
    metafunc.parametrize("dtype", names)


def test_accuracy(
    benchmark: Any,
    dtype: str,
    device: str,
    chosen_contenders: list[Contender],
    quick: bool,
    errors: list[dict[str, Any]],
    not_measured: list[dict[str, Any]],
) -> None:
    shapes = accuracy.QUICK_SHAPES if quick else accuracy.SHAPES
    found, missing = benchmark.pedantic(
        accuracy.measure, (device, chosen_contenders, [dtype]), {"shapes": shapes}, rounds=1
    )
    errors += found
    not_measured += missing
    faults = {f"{entry['contender']}: {entry['reason']}" for entry in missing if entry["fault"]}
    if faults:
        pytest.fail(", ".join(sorted(faults)))
    if not found:
        pytest.skip(missing[0]["reason"])
