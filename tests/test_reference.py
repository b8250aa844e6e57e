"""The oracle itself, held to arithmetic done by hand and to loops in plain Python."""

import math
import re
from itertools import product
from pathlib import Path

import pytest
import torch

from fsp_kernels import reference

NORMS = ("frobenius", "mse", "column")
# float64 sums of up to a hundred products of magnitude 1: rounding stays below 1e-13.
EXACT = {"rtol": 1e-12, "atol": 1e-12}


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def maps_whose_matrix_is(*samples: list[list[float]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Maps of two positions whose FSP matrix is the given 2 x 2 one: ``F1 = 2 G``, ``F2 = I``."""
    first = 2 * torch.tensor(samples, dtype=torch.float64)
    second = torch.eye(2, dtype=torch.float64).repeat(len(samples), 1, 1)
    return first, second


def window(index: int, full: int, part: int) -> range:
    """Positions that adaptive pooling from ``full`` to ``part`` combines into ``index``."""
    return range(math.floor(index * full / part), math.ceil((index + 1) * full / part))


def pool_by_windows(x: torch.Tensor, size: tuple[int, ...], mode: str) -> torch.Tensor:
    pooled = torch.empty(*x.shape[:2], *size, dtype=x.dtype)
    for b, c in product(range(x.shape[0]), range(x.shape[1])):
        for out in product(*map(range, size)):
            windows = [
                window(i, full, part) for i, full, part in zip(out, x.shape[2:], size, strict=True)
            ]
            values = [x[(b, c, *at)].item() for at in product(*windows)]
            pooled[(b, c, *out)] = max(values) if mode == "max" else sum(values) / len(values)
    return pooled


# --- FSP matrix -----------------------------------------------------------------------------------


def test_matrix_of_small_integer_maps():
    first = torch.tensor([[[1.0, 2.0], [3.0, 4.0]]])  # two channels, two positions
    second = torch.tensor([[[5.0, 6.0], [7.0, 8.0], [1.0, 0.0]]])  # three channels
    by_hand = torch.tensor(
        [
            [
                [(1 * 5 + 2 * 6) / 2, (1 * 7 + 2 * 8) / 2, (1 * 1 + 2 * 0) / 2],
                [(3 * 5 + 4 * 6) / 2, (3 * 7 + 4 * 8) / 2, (3 * 1 + 4 * 0) / 2],
            ]
        ]
    )
    assert by_hand.tolist() == [[[8.5, 11.5, 0.5], [19.5, 26.5, 1.5]]]
    assert torch.equal(reference.fsp_matrix(first, second), by_hand)


def test_matrix_keeps_samples_apart():
    first = torch.tensor([[[1.0, 1.0]], [[2.0, 0.0]]])
    second = torch.tensor([[[3.0, 5.0]], [[7.0, 9.0]]])
    assert reference.fsp_matrix(first, second).tolist() == [[[4.0]], [[7.0]]]


@pytest.mark.parametrize("spatial", [(6,), (2, 3), (1, 2, 3)], ids=["rank3", "rank4", "rank5"])
def test_matrix_is_a_sum_over_positions(spatial):
    first, second = randn(2, 3, *spatial, seed=1), randn(2, 4, *spatial, seed=2)
    got = reference.fsp_matrix(first, second)
    positions = list(product(*map(range, spatial)))
    for b, i, j in product(range(2), range(3), range(4)):
        total = sum(first[(b, i, *at)].item() * second[(b, j, *at)].item() for at in positions)
        assert got[b, i, j].item() == pytest.approx(total / len(positions), rel=1e-12)
    assert got.shape == (2, 3, 4)


def test_exchanged_layers_give_the_transposed_matrix():
    first, second = randn(2, 3, 4, 5, seed=1), randn(2, 6, 4, 5, seed=2)
    exchanged = reference.fsp_matrix(second, first)
    torch.testing.assert_close(exchanged, reference.fsp_matrix(first, second).mT, **EXACT)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_matrix_keeps_the_dtype(dtype):
    x = torch.ones(1, 2, 2, 2, dtype=dtype)
    assert reference.fsp_matrix(x, x).dtype == dtype


# --- pooling --------------------------------------------------------------------------------------


def test_max_pooling_of_a_small_integer_map():
    large = torch.tensor([[[1.0, 4.0, 2.0, 3.0]]])
    small = torch.tensor([[[1.0, 10.0]]])
    # Windows {1, 4} and {2, 3}: (4 * 1 + 3 * 10) / 2.
    assert reference.fsp_matrix(large, small, "max").item() == 17.0


def test_average_pooling_of_a_small_integer_map():
    large = torch.tensor([[[1.0, 4.0, 2.0, 3.0]]])
    small = torch.tensor([[[1.0, 10.0]]])
    # Windows {1, 4} and {2, 3}: (2.5 * 1 + 2.5 * 10) / 2.
    assert reference.fsp_matrix(large, small, "avg").item() == 13.75


def test_fractional_windows_overlap():
    large, small = torch.tensor([[[1.0, 5.0, 3.0]]]), torch.tensor([[[1.0, 1.0]]])
    # From 3 to 2 positions: windows {1, 5} and {5, 3} share the middle.
    assert reference.match_spatial(large, small, "max")[0].tolist() == [[[5.0, 5.0]]]
    assert reference.match_spatial(large, small, "avg")[0].tolist() == [[[3.0, 4.0]]]


@pytest.mark.parametrize("mode", ["max", "avg"])
@pytest.mark.parametrize(
    ("full", "part"),
    [
        ((12,), (4,)),
        ((7,), (3,)),
        ((5,), (1,)),
        ((8, 6), (4, 2)),
        ((7, 5), (3, 4)),
        ((8, 5), (4, 3)),
        ((4, 6, 2), (2, 3, 1)),
        ((5, 3, 4), (2, 2, 3)),
    ],
    ids=str,
)
def test_pooling_combines_the_window_from_floor_to_ceil(full, part, mode):
    large, small = randn(2, 3, *full, seed=3), randn(2, 2, *part, seed=4)
    pooled, _ = reference.match_spatial(large, small, mode)
    torch.testing.assert_close(pooled, pool_by_windows(large, part, mode), **EXACT)


@pytest.mark.parametrize("mode", ["max", "avg"])
def test_each_axis_is_pooled_to_the_smaller_of_the_two(mode):
    first, second = randn(1, 2, 6, 3, seed=5), randn(1, 3, 2, 9, seed=6)
    fitted = reference.match_spatial(first, second, mode)
    for got, x in zip(fitted, (first, second), strict=True):
        torch.testing.assert_close(got, pool_by_windows(x, (2, 3), mode), **EXACT)


def test_maps_of_equal_size_are_left_alone():
    first, second = randn(1, 2, 4, 4), randn(1, 3, 4, 4)
    fitted = reference.match_spatial(first, second)
    assert fitted[0] is first
    assert fitted[1] is second


def test_positions_are_counted_after_pooling():
    large, small = torch.ones(1, 1, 4, 4), torch.ones(1, 1, 2, 2)
    assert reference.fsp_matrix(large, small).item() == 1.0


# --- norms and loss -------------------------------------------------------------------------------

RESIDUALS = ([[1.0, 2.0], [3.0, 4.0]], [[0.0, 6.0], [0.0, 8.0]])
BY_HAND = {
    "frobenius": ((1 + 4 + 9 + 16) + (36 + 64)) / 2,  # the mean over two samples
    "mse": (1 + 4 + 9 + 16 + 36 + 64) / 8,  # the mean over two samples of four entries
    "column": ((math.sqrt(1 + 9) + math.sqrt(4 + 16)) + (0 + math.sqrt(36 + 64))) / 2,
}


@pytest.mark.parametrize("norm", NORMS)
def test_norm_of_a_residual_by_hand(norm):
    got = reference.residual_norm(torch.tensor(RESIDUALS, dtype=torch.float64), norm)
    assert got.item() == pytest.approx(BY_HAND[norm], rel=1e-14)


@pytest.mark.parametrize("norm", NORMS)
def test_loss_by_hand(norm):
    student = maps_whose_matrix_is([[1.0, 2.0], [3.0, 4.0]], [[5.0, 6.0], [7.0, 8.0]])
    teacher = maps_whose_matrix_is([[0.0, 0.0], [0.0, 0.0]], [[5.0, 0.0], [7.0, 0.0]])
    got = reference.fsp_loss([student], [teacher], norm=norm)
    assert got.shape == ()
    assert got.item() == pytest.approx(BY_HAND[norm], rel=1e-14)


@pytest.mark.parametrize("norm", NORMS)
def test_loss_is_what_plain_python_computes(norm):
    student = randn(2, 3, 2, 2, seed=1), randn(2, 4, 2, 2, seed=2)
    teacher = randn(2, 3, 2, 2, seed=3), randn(2, 4, 2, 2, seed=4)

    def entry(pair, b, i, j):
        at = product(range(2), range(2))
        return sum(pair[0][b, i, y, x].item() * pair[1][b, j, y, x].item() for y, x in at) / 4

    def squared(b, i, j):
        return (entry(student, b, i, j) - entry(teacher, b, i, j)) ** 2

    by_norm = {
        "frobenius": sum(squared(*at) for at in product(range(2), range(3), range(4))) / 2,
        "mse": sum(squared(*at) for at in product(range(2), range(3), range(4))) / (2 * 3 * 4),
        "column": sum(
            math.sqrt(sum(squared(b, i, j) for i in range(3)))
            for b, j in product(range(2), range(4))
        )
        / 2,
    }
    got = reference.fsp_loss([student], [teacher], norm=norm)
    assert got.item() == pytest.approx(by_norm[norm], rel=1e-12)


@pytest.mark.parametrize("norm", NORMS)
def test_loss_of_equal_networks_is_zero(norm):
    pair = randn(2, 3, 4, 4, seed=1), randn(2, 4, 4, 4, seed=2)
    assert reference.fsp_loss([pair], [pair], norm=norm).item() == 0.0


def test_unknown_norm_is_refused():
    with pytest.raises(ValueError, match="unknown norm 'nuclear'"):
        reference.residual_norm(torch.zeros(1, 2, 2), "nuclear")


def test_pairs_are_added_with_their_weights():
    zero = maps_whose_matrix_is([[0.0, 0.0], [0.0, 0.0]])
    one = maps_whose_matrix_is([[1.0, 0.0], [0.0, 0.0]])
    two = maps_whose_matrix_is([[2.0, 0.0], [0.0, 0.0]])
    got = reference.fsp_loss([one, two], [zero, zero], weights=[10.0, 0.5])
    assert got.item() == 10.0 * 1 + 0.5 * 4


def test_weights_are_ones_by_default():
    zero = maps_whose_matrix_is([[0.0, 0.0], [0.0, 0.0]])
    one = maps_whose_matrix_is([[1.0, 0.0], [0.0, 0.0]])
    two = maps_whose_matrix_is([[2.0, 0.0], [0.0, 0.0]])
    assert reference.fsp_loss([one, two], [zero, zero]).item() == 1 + 4


@pytest.mark.parametrize("norm", NORMS)
def test_ready_teacher_matrix_by_hand(norm):
    student = maps_whose_matrix_is([[1.0, 2.0], [3.0, 4.0]], [[5.0, 6.0], [7.0, 8.0]])
    ready = torch.tensor([[[0.0, 0.0], [0.0, 0.0]], [[5.0, 0.0], [7.0, 0.0]]], dtype=torch.float64)
    got = reference.fsp_loss([student], [ready], norm=norm)
    assert got.item() == pytest.approx(BY_HAND[norm], rel=1e-14)


def test_pooling_mode_reaches_both_networks():
    student = torch.tensor([[[1.0, 4.0, 2.0, 3.0]]]), torch.tensor([[[1.0, 10.0]]])
    teacher = torch.tensor([[[0.0, 2.0, 0.0, 2.0]]]), torch.tensor([[[1.0, 1.0]]])
    # Matrices by hand: 17 and 2 by maxima, 13.75 and 1 by averages.
    assert reference.fsp_loss([student], [teacher], pool="max").item() == (17.0 - 2.0) ** 2
    assert reference.fsp_loss([student], [teacher], pool="avg").item() == (13.75 - 1.0) ** 2


@pytest.mark.parametrize("short", ["teacher", "weights"])
def test_nothing_is_dropped_when_counts_differ(short):
    pair = randn(1, 2, 3), randn(1, 2, 3)
    teacher = [pair] if short == "teacher" else [pair, pair]
    weights = [1.0] if short == "weights" else [1.0, 1.0]
    with pytest.raises(ValueError, match="zip"):
        reference.fsp_loss([pair, pair], teacher, weights)


# --- derivatives ----------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("mode", ["max", "avg"])
@pytest.mark.parametrize("second_size", [(2, 2), (3, 2)], ids=["equal sizes", "pooled"])
def test_gradient_of_the_loss_is_its_numerical_derivative(second_size, mode, norm):
    shapes = [(2, 2, 2, 2), (2, 3, *second_size)] * 2
    maps = [randn(*shape, seed=i).requires_grad_() for i, shape in enumerate(shapes)]

    def loss(a, b, c, d):
        return reference.fsp_loss([(a, b)], [(c, d)], [0.7], mode, norm)

    assert torch.autograd.gradcheck(loss, maps)


def test_gradient_reaches_a_ready_matrix():
    a, b = (randn(2, 2, 3, seed=i).requires_grad_() for i in range(2))
    ready = randn(2, 2, 2, seed=2).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda a, b, g: reference.fsp_loss([(a, b)], [g]), (a, b, ready)
    )


def test_matrix_is_twice_differentiable():
    maps = [randn(1, 2, 3, seed=i).requires_grad_() for i in range(2)]
    assert torch.autograd.gradgradcheck(reference.fsp_matrix, maps)


def test_nothing_that_is_tested_with_the_oracle_imports_it():
    sources = Path(reference.__file__).parent.rglob("*.py")
    importing = [
        x for x in sources if re.search(r"^ *(from|import)\b.*\breference\b", x.read_text(), re.M)
    ]
    assert importing == []
