"""Every evaluation that a backend has for a pair: what the planner can be held to."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from tolerances import assert_near

from fsp_kernels import reference
from fsp_kernels.autograd import planned_loss
from fsp_kernels.backends import registered_backends
from fsp_kernels.loss_plan import MapSpec
from fsp_kernels.plan import alternatives, fewest_flops, plan_loss

BACKENDS = registered_backends()
FP32, BF16 = torch.float32, torch.bfloat16


def pair(m, n, side, *, batch=8, dtype=FP32, device="cpu", grad=True):
    return tuple(
        MapSpec((batch, c, side, side), dtype, torch.device(device), torch.strided, grad)
        for c in (m, n)
    )


def entries(m, n, side, **options):
    return pair(m, n, side, **options), pair(m, n, side, **{**options, "grad": False})


def ways(plans):
    return [(p.form, p.evaluation, p.samples) for plan in plans for p in plan.pairs]


def named(pair) -> str:
    """The evaluation of a pair by kernels, in a word or two."""
    if pair.form == "gram":
        return "gram"
    return pair.evaluation + (", BLAS" if pair.blas_gradients else "")


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("shape", [(16, 16, 32), (64, 64, 7), (512, 256, 7), (256, 256, 28)])
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_the_planned_one_comes_first_and_none_twice(backend, shape, dtype):
    student, teacher = entries(*shape, dtype=dtype, device="cuda")
    plans = alternatives(student, teacher, "max", "frobenius", BACKENDS[backend], "tf32x3")
    planned = plan_loss((student,), (teacher,), "max", "frobenius", BACKENDS[backend], "tf32x3")
    assert dataclasses.asdict(plans[0].pairs[0]) == dataclasses.asdict(planned.pairs[0])
    assert len({plan.pairs for plan in plans}) == len(plans)


def test_on_a_cpu_both_forms_in_chunks_of_each_size():
    found = ways(
        alternatives(*entries(64, 64, 14, batch=8), "max", "frobenius", BACKENDS["torch"], "tf32x3")
    )
    assert found == [(form, "chunks", n) for form in ("matrix", "gram") for n in (8, 4)]


def test_a_norm_by_columns_has_no_gram_form():
    plans = alternatives(*entries(512, 512, 7), "max", "column", BACKENDS["torch"], "tf32x3")
    assert {p.pairs[0].form for p in plans} == {"matrix"}


@pytest.mark.parametrize(
    ("shape", "dtype", "evaluations"),
    [
        ((64, 64, 7), FP32, ["one pass", "tiles", "gram"]),
        ((128, 128, 28), FP32, ["tiles"]),  # too large for one program, too many positions
        ((128, 128, 28), BF16, ["one pass", "tiles", "tiles, BLAS"]),
        ((512, 512, 28), BF16, ["tiles, BLAS", "tiles"]),
        ((256, 256, 14), BF16, ["tiles"]),
        ((512, 512, 7), BF16, ["gram", "tiles"]),
    ],
)
def test_what_kernels_can_do_best_first(shape, dtype, evaluations):
    student, teacher = entries(*shape, dtype=dtype, device="cuda")
    plans = alternatives(student, teacher, "max", "frobenius", BACKENDS["triton"], "tf32x3")
    assert [named(plan.pairs[0]) for plan in plans] == evaluations


@pytest.mark.parametrize("shape", [(6, 5, 3), (20, 24, 2)])
def test_all_of_them_compute_the_same_loss(shape):
    m, n, side = shape
    maps = [torch.randn(6, c, side, side) for c in (m, n, m, n)]
    student = [x.requires_grad_() for x in maps[:2]]
    exact = [x.detach().double().requires_grad_(i < 2) for i, x in enumerate(maps)]
    truth = reference.fsp_loss([tuple(exact[:2])], [tuple(exact[2:])])
    true_gradients = torch.autograd.grad(truth, exact[:2])
    plans = alternatives(
        *entries(m, n, side, batch=6), "max", "frobenius", BACKENDS["torch"], "tf32x3"
    )
    assert len(plans) == 4
    for plan in plans:
        loss = planned_loss(plan, (1.0,), maps)
        found = torch.autograd.grad(loss, student)
        for x, true in zip((loss, *found), (truth, *true_gradients), strict=True):
            assert_near(x, true, 1e-5, "fp32")


def test_the_fewest_flops_are_those_of_the_cheaper_form():
    for shape in ((16, 16, 32), (512, 512, 7)):
        student, teacher = entries(*shape)
        plans = alternatives(student, teacher, "max", "frobenius", BACKENDS["torch"], "tf32x3")
        assert fewest_flops(student, teacher) == min(p.flops for p in plans)


def test_without_gradients_there_are_fewer_flops():
    student, teacher = entries(64, 64, 14)
    wanted = fewest_flops(student, teacher)
    assert fewest_flops(teacher, teacher) == wanted // 2
