"""The loss without ever storing a residual, each tile computed for each side that wants it."""

from __future__ import annotations

import itertools

import pytest
from calls import BF16, FP16, FP32, REGIMES, Regime, check, four_of, pair_of, tensor

RECOMPUTED = REGIMES["recomputed tiles"]
LONG = Regime((40, 37), (3, 6), "recomputed tiles", dtype=BF16)  # 18 positions: two blocks


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("dtype", [FP16, BF16], ids=str)
def test_a_gradient_takes_as_many_blocks_of_positions_as_it_needs(dtype):
    check(*four_of(LONG, dtypes=(dtype, dtype)), LONG)


@pytest.mark.usefixtures("small")
def test_student_and_teacher_may_take_unequally_many_blocks():
    student, teacher = [pair_of(LONG)], [pair_of(LONG, size=(3, 3))]
    check(student, teacher, LONG)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("wanted", list(itertools.product((False, True), repeat=3))[1:], ids=str)
def test_a_ready_matrix_is_read_from_both_sides(wanted, transposed):
    m, n = RECOMPUTED.channels
    a, b = pair_of(RECOMPUTED, batch=2, grad=False)
    matrix = tensor(2, *((n, m) if transposed else (m, n)), dtype=BF16, grad=False)
    matrix = matrix.mT if transposed else matrix
    for x, needs in zip((a, b, matrix), wanted, strict=True):
        x.requires_grad_(needs)
    check([(a, b)], [matrix], RECOMPUTED)


@pytest.mark.usefixtures("small")
def test_the_loss_is_told_once_by_each_pair():
    pairs = [RECOMPUTED._replace(channels=channels) for channels in ((20, 17), (33, 20), (17, 33))]
    student, teacher = ([pair_of(r) for r in pairs] for _ in range(2))
    check(student, teacher, *pairs, weights=[1.0, 10.0, 100.0])


@pytest.mark.usefixtures("small")
def test_fp32_maps_do_not_fit_beside_a_residual_of_fp32():
    student, teacher = four_of(RECOMPUTED, dtypes=(FP32, FP32))
    check(student, teacher, RECOMPUTED._replace(evaluation="tiles"))


@pytest.mark.usefixtures("small")
def test_maps_that_are_pooled_would_be_pooled_twice():
    student, teacher = [pair_of(RECOMPUTED)], [pair_of(RECOMPUTED)]
    student = [(tensor(1, 20, 6, 3, dtype=BF16), student[0][1])]
    check(student, teacher, RECOMPUTED._replace(evaluation="tiles"))


@pytest.mark.parametrize("dtype", [FP16, BF16], ids=str)
def test_the_shipped_tiles_are_right(limits, dtype):
    limits(GPU_GRAM_POSITIONS=0)
    regime = Regime((130, 70), (3, 3), "recomputed tiles")
    student, teacher = four_of(regime, dtypes=(dtype, dtype))
    check(student, teacher, regime)
