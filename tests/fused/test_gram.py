"""The loss in Gram form: few positions and many channels, within the planner's own limits."""

from __future__ import annotations

import pytest
import torch
from calls import BF16, DTYPES, FP16, FP32, Regime, check, four_of, pair_of, tensor
from tolerances import GRAM_EPS, assert_near, oracle, residual_terms

import fsp_kernels as fsp


@pytest.fixture
def gram(backend):
    """Shapes in Gram form, few samples of which a backend evaluates in one way."""

    def of(m: int, n: int, size: tuple[int, ...]) -> Regime:
        if backend == "cuda":
            return Regime((m, n), size, "one pass", form="gram")
        parts = max(1, max(m, n) // 128)
        return Regime((m, n), size, "blocks", form="gram", parts=parts)

    return of


@pytest.mark.parametrize("size", [(1,), (7,), (4, 4), (17,), (5, 5), (33,), (7, 7)], ids=str)
def test_positions_may_be_any_number_up_to_the_largest_block(size, gram):
    regime = gram(180, 150, size)
    check(*four_of(regime), regime)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("m", "n"), [(1, 200), (257, 129), (192, 256)])
def test_channels_may_be_any_number(m, n, dtype, gram):
    # Halves have larger tiles, and one position is cheap in Gram form for all of these.
    regime = gram(m, n, (1,))
    if m == 1:
        regime = regime._replace(evaluation="tiles", form="matrix", parts=1)
    check(*four_of(regime, dtypes=(dtype, dtype)), regime)


@pytest.mark.parametrize("wanted", range(4))
def test_each_gradient_is_right_on_its_own(wanted, gram):
    regime = gram(150, 140, (2, 2))
    a, b = pair_of(regime, grad=False)
    c, d = pair_of(regime, grad=False)
    (a, b, c, d)[wanted].requires_grad_()
    check([(a, b)], [(c, d)], regime)


@pytest.mark.parametrize("dtype", [FP16, BF16], ids=str)
def test_half_precision_maps_an_ulp_apart_have_the_right_gradient(dtype, gram):
    c, d = pair_of(gram(160, 150, (3, 3)), dtypes=(dtype, dtype), grad=False)
    a, b = ((x * (1 + torch.finfo(dtype).eps)).requires_grad_() for x in (c, d))
    loss = fsp.fsp_loss([(a, b)], [(c, d)])
    expected = oracle([(a, b)], [(c, d)])
    for gradient, wanted in zip(
        torch.autograd.grad(loss, (a, b)), expected.gradients, strict=False
    ):
        assert_near(gradient, wanted, 5e-3, "the difference fits TF32, its gradient the dtype")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("noise", [0, 1e-4])
@pytest.mark.parametrize("seed", range(3))
def test_a_small_loss_of_large_matrices_is_not_negative_and_within_its_bound(
    seed, noise, dtype, gram
):
    # Mirrored, the maps of both networks are far apart and their FSP matrices are not.
    torch.manual_seed(seed)
    c, d = pair_of(gram(160, 150, (3, 3)), dtypes=(dtype, dtype), grad=False)
    a, b = c.flip(-1), d.flip(-1)
    a = a + noise * torch.randn_like(a)
    loss = fsp.fsp_loss([(a, b)], [(c, d)])
    exact = oracle([(a, b)], [(c, d)]).loss
    terms = residual_terms((a, b), (c, d)).square().mean()
    assert loss >= 0
    assert abs(loss - exact) <= GRAM_EPS[dtype][0] * terms


def test_the_loss_survives_convergence(gram):
    # Plain Grams, instead of differences, would be wrong by 1e3 here.
    c, d = pair_of(gram(256, 256, (3, 3)), grad=False)
    a, b = (x + 1e-5 * torch.randn_like(x) for x in (c, d))
    loss = fsp.fsp_loss([(a, b)], [(c, d)])
    assert_near(loss, oracle([(a, b)], [(c, d)]).loss, 1e-5, "fp32")


def test_maps_are_pooled_on_the_way(gram):
    student = [(tensor(2, 150, 4, 4), tensor(2, 140, 2, 2))]
    teacher = [(tensor(2, 150, 2, 2), tensor(2, 140, 2, 4))]
    for pool in ("max", "avg"):
        check(student, teacher, gram(150, 140, (2, 2)), pool=pool)


def test_a_large_value_in_one_channel_stays_exact_in_the_others(gram):
    student, teacher = four_of(gram(150, 140, (2, 2)), dtypes=(FP32, FP32))
    with torch.no_grad():
        student[0][0][:, 3] *= 1e3
    check(student, teacher, gram(150, 140, (2, 2)))
