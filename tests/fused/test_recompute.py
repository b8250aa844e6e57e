"""The loss without ever storing a residual, each tile computed for each side that wants it."""

from __future__ import annotations

import itertools

import pytest
from calls import BF16, FP16, FP32, SIZES, Regime, check, four_of, pair_of, tensor


@pytest.fixture
def recomputed(regimes):
    return regimes["recomputed tiles"]


@pytest.fixture
def long(backend):
    """Positions take two blocks."""
    return SIZES[backend].long


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("dtype", [FP16, BF16], ids=str)
def test_a_gradient_takes_as_many_blocks_of_positions_as_it_needs(long, dtype):
    check(*four_of(long, dtypes=(dtype, dtype)), long)


@pytest.mark.usefixtures("small")
def test_student_and_teacher_may_take_unequally_many_blocks(long):
    height, width = long.size
    student, teacher = [pair_of(long)], [pair_of(long, size=(height, width // 2))]
    check(student, teacher, long)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("wanted", list(itertools.product((False, True), repeat=3))[1:], ids=str)
def test_a_ready_matrix_is_read_from_both_sides(recomputed, wanted, transposed):
    m, n = recomputed.channels
    a, b = pair_of(recomputed, batch=2, grad=False)
    matrix = tensor(2, *((n, m) if transposed else (m, n)), dtype=BF16, grad=False)
    matrix = matrix.mT if transposed else matrix
    for x, needs in zip((a, b, matrix), wanted, strict=True):
        x.requires_grad_(needs)
    check([(a, b)], [matrix], recomputed)


@pytest.mark.usefixtures("small")
def test_the_loss_is_told_once_by_each_pair(recomputed):
    m, n = recomputed.channels
    sides = ((m, n), (m + n, m), (n, m + n))
    pairs = [recomputed._replace(channels=channels) for channels in sides]
    student, teacher = ([pair_of(r) for r in pairs] for _ in range(2))
    check(student, teacher, *pairs, weights=[1.0, 10.0, 100.0])


@pytest.mark.usefixtures("small")
def test_fp32_maps_do_not_fit_beside_a_residual_of_fp32(recomputed):
    student, teacher = four_of(recomputed, dtypes=(FP32, FP32))
    check(student, teacher, recomputed._replace(evaluation="tiles"))


@pytest.mark.usefixtures("small")
def test_maps_that_are_pooled_would_be_pooled_twice(recomputed):
    height, width = recomputed.size
    larger, _ = pair_of(recomputed, size=(2 * height, width))
    student, teacher = four_of(recomputed)
    check([(larger, student[0][1])], teacher, recomputed._replace(evaluation="tiles"))


@pytest.mark.parametrize("dtype", [FP16, BF16], ids=str)
def test_the_shipped_tiles_are_right(limits, dtype):
    limits(gram_positions=0)
    regime = Regime((130, 70), (3, 3), "recomputed tiles")
    student, teacher = four_of(regime, dtypes=(dtype, dtype))
    check(student, teacher, regime)
