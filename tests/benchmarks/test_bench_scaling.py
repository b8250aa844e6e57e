"""What grows in the scaling benchmark, and what does not."""

from __future__ import annotations

import pytest

from benchmarks.bench_scaling import AXES

CPU = {axis.name: axis for axis in AXES["cpu"]}


@pytest.mark.parametrize(
    ("name", "value", "label", "batch", "shape"),
    [
        ("batch", 16, "64-64@28", 16, (16, 64, 28, 28)),
        ("channels", 512, "512-512@7", 4, (4, 512, 7, 7)),
        ("size", 56, "64-64@56", 4, (4, 64, 56, 56)),
    ],
)
def test_one_thing_grows_at_a_time(
    name: str, value: int, label: str, batch: int, shape: tuple[int, ...]
) -> None:
    case = CPU[name].case(value, "bf16")
    assert (case.workload.name, case.batch, case.dtype) == (label, batch, "bf16")
    student, teacher = case.maps("cpu")
    assert {tuple(x.shape) for x in (*student[0], *teacher[0])} == {shape}
