"""The loss in one pass, matrix form: what the sizes of its tiles, powers of two, may leave over."""

from __future__ import annotations

import math

import pytest
import torch
from calls import BF16, FP16, FP32, Regime, check, four_of, pair_of, tensor
from tolerances import assert_near, flatten, oracle

import fsp_kernels as fsp


def one_pass(m: int, n: int, size: tuple[int, ...]) -> Regime:
    return Regime((m, n), size, "one pass")


@pytest.mark.parametrize(("m", "n"), [(1, 1), (1, 17), (3, 64), (17, 3), (64, 1)])
def test_channels_may_be_any_number_up_to_the_largest_tile(m, n):
    check(*four_of(one_pass(m, n, (3, 3))), one_pass(m, n, (3, 3)))


@pytest.mark.parametrize(("m", "n"), [(65, 127), (127, 2), (128, 128)])
@pytest.mark.parametrize("dtype", [FP16, BF16], ids=str)
def test_half_precision_has_larger_tiles(m, n, dtype):
    regime = one_pass(m, n, (4, 4))
    check(*four_of(regime, dtypes=(dtype, dtype)), regime)


@pytest.mark.parametrize("size", [(1,), (7,), (7, 7), (9, 7), (8, 8), (65,)], ids=str)
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_positions_may_be_any_number(size, dtype):
    regime = one_pass(5, 6, size)
    check(*four_of(regime, dtypes=(dtype, dtype)), regime)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(("blocks", "more"), [(2, 0), (2, 1), (3, 0)])
def test_positions_take_as_many_blocks_as_they_need(tile, blocks, more):
    regime = one_pass(5, 6, (blocks * tile.positions + more,))
    check(*four_of(regime), regime)


@pytest.mark.parametrize("to_a", [False, True])
@pytest.mark.parametrize("to_b", [False, True])
@pytest.mark.parametrize("to_matrix", [False, True])
def test_gradients_reach_those_who_require_them_beside_a_ready_matrix(to_a, to_b, to_matrix):
    regime = one_pass(7, 13, (6, 3))
    a, b = pair_of(regime, grad=False)
    matrix = tensor(1, *regime.channels, grad=False)
    for x, needs in zip((a, b, matrix), (to_a, to_b, to_matrix), strict=True):
        x.requires_grad_(needs)
    check([(a, b)], [matrix], regime)


def test_one_map_as_first_and_second_gets_both_gradients():
    a, c = tensor(2, 12, 3, 3), tensor(2, 12, 3, 3)
    loss = fsp.fsp_loss([(a, a)], [(c, c)])
    to_a, to_a_again, to_c, to_c_again = oracle([(a, a)], [(c, c)]).gradients
    gradients = torch.autograd.grad(loss, (a, c))
    for gradient, wanted in zip(gradients, (to_a + to_a_again, to_c + to_c_again), strict=True):
        assert_near(gradient, wanted, 1e-5, "fp32")


def test_a_column_of_the_residual_that_is_zero_has_no_gradient():
    a, b = pair_of(one_pass(7, 13, (6, 3)))
    c, d = (x.detach().clone() for x in (a, b))
    with torch.no_grad():
        d[:, :4] += 1
    c.requires_grad_()
    loss = fsp.fsp_loss([(a, b)], [(c, d)], norm="column")
    expected = oracle([(a, b)], [(c, d)], norm="column")
    assert_near(loss, expected.loss, 1e-5, "fp32")
    to_a, to_b = torch.autograd.grad(loss, (a, b))
    assert_near(to_a, expected.gradients[0], 1e-5, "fp32")
    assert_near(to_b, expected.gradients[1], 1e-5, "fp32")
    assert not to_b[:, 4:].any()


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_sums_over_many_positions_are_not_cut_short(dtype, limits, backend):
    # Tensor cores cut sums off where fp32 would be rounded; of one sign, that adds up. Triton's
    # interpreter rounds, and is slow.
    limits(one_pass_parts=math.inf)
    rounds = backend == "triton" and not torch.cuda.is_available()
    regime = one_pass(8, 5, (512 if rounds else 4096,))
    student, teacher = four_of(regime, dtypes=(dtype, dtype))
    with torch.no_grad():
        for x in flatten(student, teacher):
            x.abs_()
        teacher[0][0].mul_(0.5)
    check(student, teacher, regime)


@pytest.mark.parametrize("incoming", [65536.0, 1024.0])
def test_a_loss_scale_rescues_fp16_gradients_from_underflow(incoming):
    regime = one_pass(3, 4, (32, 32))
    maps = [x.detach() / 16 for _ in range(2) for x in pair_of(regime, dtypes=(FP16, FP16))]
    student = [(maps[0].requires_grad_(), maps[1].requires_grad_())]
    teacher = [(maps[2], maps[3])]
    weights = [2.0**-3]
    loss = fsp.fsp_loss(student, teacher, weights=weights)
    expected = oracle(student, teacher, weights).gradients
    assert (expected[0].half() == 0).double().mean() > 0.9
    found = torch.autograd.grad(loss, student[0], loss.new_tensor(incoming))
    for gradient, wanted in zip(found, expected, strict=False):
        assert gradient.dtype == FP16
        assert_near(gradient, incoming * wanted, 1e-2, "few bits of an fp16 are left at this size")
