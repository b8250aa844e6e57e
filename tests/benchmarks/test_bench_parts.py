"""What the parts ``plan`` and ``scaling`` measure, and the bare Function."""

from functools import partial

import pytest
import torch

import fsp_kernels as fsp
from benchmarks import bench_host_time
from benchmarks.bench_plan import contenders_of, plans_of
from benchmarks.bench_scaling import AXES
from benchmarks.cases import Problem
from benchmarks.workloads import Case, Workload


def case(channels, side, dtype="fp32", batch=8):
    return Case(Workload("x", batch, (((channels, side), (channels, side)),)), batch, dtype)


def names(of, device, backend):
    return [contender.name for contender in contenders_of(of, device, backend)]


def test_on_a_cpu_they_are_forms_and_chunks_the_planned_one_first():
    assert names(case(64, 8), "cpu", "torch") == [
        "matrix form, chunks of 8",
        "matrix form, chunks of 4",
        "gram form, chunks of 8",
        "gram form, chunks of 4",
    ]


def test_on_a_gpu_they_are_what_kernels_can_do():
    assert names(case(512, 7, "bf16"), "cuda", "triton") == ["Gram form", "tiles"]


def test_none_is_timed_that_takes_many_times_the_flops():
    wide = case(512, 4)
    plans = plans_of(wide, "cpu", "torch")
    assert {plan.pairs[0].form for plan in plans} == {"matrix", "gram"}
    assert {name.split()[0] for name in names(wide, "cpu", "torch")} == {"gram"}


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_each_is_right(dtype):
    small = case(12, 3, dtype)
    found, problem = contenders_of(small, "cpu", "torch"), Problem(small, "cpu")
    assert len(found) == 4
    for contender in found:
        assert problem.prepare(contender).facts["gradient_error"] < 1e-2  # raises where wrong


def test_a_bare_function_launches_and_allocates_as_much_as_ours(monkeypatch):
    launches, shapes = [], []
    empty_like, new_empty = torch.empty_like, torch.Tensor.new_empty

    def allocate(function):
        def record(*arguments, **options):
            x = function(*arguments, **options)
            shapes.append(x.shape if x.ndim != 1 else "partials")
            return x

        return record

    monkeypatch.setattr(bench_host_time, "_no_launch", lambda *_, **__: launches.append(1))
    monkeypatch.setattr(torch, "empty_like", allocate(empty_like))
    monkeypatch.setattr(torch.Tensor, "new_empty", allocate(new_empty))
    student, teacher = (
        [tuple(torch.randn(2, 16, 8, 8, requires_grad=grad) for _ in range(2))]
        for grad in (True, False)
    )
    seen = []
    with bench_host_time.without_launches():
        torch.autograd.grad(fsp.fsp_loss(student, teacher, backend="triton"), student[0])
        for loss in (bench_host_time.bare_loss, partial(fsp.fsp_loss, backend="triton")):
            launches.clear()
            shapes.clear()
            torch.autograd.grad(loss(student, teacher), student[0])
            seen.append((len(launches), sorted(map(str, shapes))))
    assert seen[0] == seen[1]
    assert seen[0][0] == 3


@pytest.mark.parametrize(
    ("name", "value", "label", "batch", "shape"),
    [
        ("batch", 16, "64-64@28", 16, (16, 64, 28, 28)),
        ("channels", 512, "512-512@7", 4, (4, 512, 7, 7)),
        ("size", 56, "64-64@56", 4, (4, 64, 56, 56)),
    ],
)
def test_one_thing_grows_at_a_time(name, value, label, batch, shape):
    case = next(x for x in AXES["cpu"] if x.name == name).case(value, "bf16")
    assert (case.workload.name, case.batch, case.dtype) == (label, batch, "bf16")
    student, teacher = case.maps("cpu")
    assert {tuple(x.shape) for x in (*student[0], *teacher[0])} == {shape}
