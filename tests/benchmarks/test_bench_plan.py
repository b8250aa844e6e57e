"""The evaluations that are timed against each other."""

from __future__ import annotations

import pytest
import torch

from benchmarks.bench_plan import contenders_of, plans_of
from benchmarks.cases import CaseRace
from benchmarks.workloads import Case, Workload


def case(channels: int, side: int, dtype: str = "fp32", batch: int = 8) -> Case:
    return Case(Workload("x", batch, (((channels, side), (channels, side)),)), batch, dtype)


def test_on_a_cpu_they_are_forms_and_chunks_the_planned_one_first() -> None:
    assert list(contenders_of(case(64, 8), "cpu", "torch")) == [
        "matrix form, chunks of 8",
        "matrix form, chunks of 4",
        "gram form, chunks of 8",
        "gram form, chunks of 4",
    ]


def test_on_a_gpu_they_are_what_kernels_can_do() -> None:
    found = contenders_of(case(512, 7, "bf16"), "cuda", "triton")
    assert list(found) == [
        "Gram form",
        "tiles",
    ]


def test_none_is_timed_that_takes_many_times_the_flops() -> None:
    wide = case(512, 4)
    plans = plans_of(wide, "cpu", "torch")
    assert {plan.pairs[0].form for plan in plans} == {"matrix", "gram"}
    assert {name.split()[0] for name in contenders_of(wide, "cpu", "torch")} == {"gram"}


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_each_is_right(dtype: str) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    small = case(12, 3, dtype)
    entrants = CaseRace(small, "cpu").entrants(list(contenders_of(small, "cpu", "torch").values()))
    assert len(entrants) == 4
    for entrant in entrants:
        assert entrant.prepare().facts["gradient_error"] < 1e-2  # raises where it is wrong
    torch.set_num_threads(threads)
