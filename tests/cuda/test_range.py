"""Finite maps at the top of the range of fp32: what the definition keeps finite stays finite."""

from __future__ import annotations

import pytest
import torch
from calls import BF16, DEVICE, FP32, check, four_of, tensor
from tolerances import assert_near, oracle

import fsp_kernels as fsp
from fsp_kernels import reference

pytestmark = pytest.mark.usefixtures("small")
LARGEST = torch.finfo(FP32).max  # TF32 has no number that is nearer than infinity
SMALL = 2.0**-112  # of which TF32 still has what is left when it is rounded
ROADS = ("one pass", "tiles", "tiles in parts")  # Gram form squares maps


def with_largest(first, second):
    """One element of the first map is that large, where the second map is small.

    The gradient of the second map is not finite.
    """
    with torch.no_grad():
        first[0, 0].view(-1)[0] = LARGEST
        second[0].flatten(1)[:, 0] = SMALL * (1 + torch.rand(second.shape[1]))
    second.requires_grad_(False)
    return first, second


@pytest.fixture(params=["highest", "high"])
def _precision(request, chip_with_tf32):  # noqa: ARG001
    torch.set_float32_matmul_precision(request.param)


@pytest.mark.usefixtures("_precision")
@pytest.mark.parametrize("sides", [(0, 1), (1, 0)], ids=["first", "second"])
@pytest.mark.parametrize("regime", ROADS, indirect=True)
def test_losses(regime, sides):
    student, teacher = four_of(regime)
    with_largest(*(student[0][i] for i in sides))
    with torch.no_grad():  # the difference of the small maps is as small
        teacher[0][sides[1]][0].flatten(1)[:, 0] = 0
    check(student, teacher, regime)


@pytest.mark.usefixtures("_precision")
@pytest.mark.parametrize("regime", ROADS, indirect=True)
def test_losses_beside_a_ready_matrix(regime):
    student, _ = four_of(regime)
    with_largest(*student[0])
    check(student, [tensor(1, *regime.channels)], regime)


@pytest.mark.usefixtures("_precision", "backend")
def test_matrices():
    first, second = with_largest(*(tensor(1, 5, 2, 3, grad=False) for _ in range(2)))
    bound = 1e-6 if torch.get_float32_matmul_precision() == "highest" else 1e-3
    exact = reference.fsp_matrix(first.double(), second.double())
    assert_near(fsp.fsp_matrix(first, second, backend="cuda"), exact, bound, "the matrix")


@pytest.mark.parametrize("road", ["one pass", "tiles"])
def test_a_slope_beyond_bf16_beside_maps_of_bf16(small, road):
    if road == "tiles":
        small(one_pass=0)
    # The slope, 2 weight a b, is finite in fp32, and nearer to infinity than to any number of bf16.
    a, b, c, d = (
        torch.full((1, 1, 1, 1), x, dtype=BF16, device=DEVICE)
        for x in (1.5 * 2.0**7, 2.0**-7, 0.0, 2.0**-7)
    )
    a.requires_grad_()
    c.requires_grad_()
    student, teacher, weights = [(a, b)], [(c, d)], [1.999 / 1.5 * 2.0**126]
    assert fsp.explain(student, teacher).pairs[0].evaluation == road
    fsp.fsp_loss(student, teacher, weights=weights).backward()
    expected = oracle(student, teacher, weights).gradients
    for x, gradient in ((a, expected[0]), (c, expected[2])):
        assert_near(x.grad, gradient, 1e-2, "rounding to bf16")
