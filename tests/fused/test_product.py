"""FSP matrices by fused kernels: values, first and second derivatives, layouts, split sums."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from calls import BF16, DTYPES, FP16, FP32, POOLS, tensor
from layouts import LAYOUTS
from tolerances import TOLERANCES, assert_near

import fsp_kernels as fsp
from fsp_kernels import plan, reference

matrix_of = partial(fsp.fsp_matrix, channel_dim=1)  # of maps of three axes too
BOUND = 1e-5  # fp32: products in 3xTF32; tensor cores cut their sums off


def exactly(*tensors):
    return [x.detach().double().requires_grad_() for x in tensors]


def check(x, y, bound=BOUND, **options):
    """Value and gradients, the incoming gradient being random."""
    found, exact = matrix_of(x, y, **options), exactly(x, y)
    wanted = reference.fsp_matrix(*exact, **options)
    assert_near(found, wanted, bound, "the matrix")
    incoming = torch.randn_like(found)
    gradients = torch.autograd.grad(found, (x, y), incoming)
    expected = torch.autograd.grad(wanted, exact, incoming.double())
    for t, gradient, w in zip((x, y), gradients, expected, strict=True):
        assert gradient.dtype == t.dtype
        assert_near(gradient, w, bound, "a gradient")
    return gradients


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ((2, 3, 5), (2, 4, 5)),
        ((2, 3, 4, 3), (2, 7, 4, 3)),
        ((1, 3, 2, 3, 2), (1, 2, 2, 3, 2)),
        ((1, 1, 1), (1, 1, 1)),
        ((2, 65, 7, 7), (2, 127, 7, 7)),
    ],
    ids=str,
)
def test_matrix_and_gradients_are_those_of_the_definition(first, second):
    check(tensor(*first), tensor(*second))


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("tiles", [(1, 2, 1), (2, 1, 3), (1, 1, 1)], ids=str)
@pytest.mark.parametrize("more", [0, 1])
def test_a_matrix_takes_as_many_tiles_as_it_needs(tile, tiles, more):
    m, n, positions = (whole * tile.channels + more for whole in tiles)
    check(tensor(2, m, positions), tensor(2, n, positions))


@pytest.mark.parametrize("pool", POOLS)
def test_maps_of_unequal_size_are_pooled(pool):
    check(tensor(2, 3, 4, 6), tensor(2, 5, 2, 9), pool=pool)


@pytest.mark.parametrize("second", DTYPES, ids=str)
@pytest.mark.parametrize("first", DTYPES, ids=str)
def test_a_matrix_has_the_promoted_dtype_and_gradients_their_inputs(first, second):
    x, y = tensor(2, 5, 20, dtype=first), tensor(2, 7, 20, dtype=second)
    promoted = torch.promote_types(first, second)
    assert matrix_of(x, y).dtype == promoted
    halves = [dtype for dtype in (first, second, promoted) if dtype != FP32]
    check(x, y, bound=BOUND + sum(TOLERANCES[dtype].rtol for dtype in halves))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_maps_may_lie_in_memory_in_any_way(layout):
    check(tensor(2, 5, 6, 4, layout=layout), tensor(2, 7, 6, 4))
    check(tensor(2, 5, 6, 4), tensor(2, 7, 6, 4, layout=layout))


def test_gradients_arrive_in_the_layout_of_their_inputs():
    x, y = tensor(2, 5, 6, 4, layout="channels last"), tensor(2, 7, 6, 4)
    for t, gradient in zip((x, y), check(x, y), strict=True):
        assert gradient.stride() == t.stride()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("positions", [40, 41, 63, 100])
def test_long_sums_are_split(small, positions, dtype):
    small(GPU_PART_POSITIONS=20)
    bound = BOUND if dtype == FP32 else 2 * TOLERANCES[dtype].rtol
    check(tensor(2, 5, positions, dtype=dtype), tensor(2, 3, positions, dtype=dtype), bound)


def test_a_long_sum_is_split_into_the_planned_parts():
    positions = 2 * plan.GPU_PART_POSITIONS + 5
    x, y = tensor(1, 3, positions), tensor(1, 4, positions)
    check(x, y)


@pytest.mark.parametrize("dtype", [FP16, BF16], ids=str)
def test_half_precision_accumulates_in_fp32(dtype):
    # Half precision stops counting at 2048 or 256, and loses the small terms long before.
    x = torch.ones_like(tensor(1, 1, 4096, dtype=dtype, grad=False))
    x[..., 1::2] = 0.03125
    y = tensor(1, 6, 4096, dtype=dtype, grad=False).abs()
    wanted = reference.fsp_matrix(x.double(), y.double())
    assert_near(matrix_of(x, y), wanted, TOLERANCES[dtype].rtol, "rounded once")


def second_derivatives(function, x, y):
    """Of a scalar that no derivative of is trivial: gradients of a norm of gradients."""
    value = function(x, y).sin().sum()
    gradients = torch.autograd.grad(value, (x, y), create_graph=True)
    return torch.autograd.grad(sum(g.square().sum() for g in gradients), (x, y))


@pytest.mark.parametrize("layout", ["contiguous", "channels last", "every second position"])
def test_a_matrix_is_twice_differentiable(layout):
    x, y = tensor(2, 5, 4, 3, layout=layout), tensor(2, 7, 4, 3)
    found = second_derivatives(matrix_of, x, y)
    expected = second_derivatives(reference.fsp_matrix, *exactly(x, y))
    for gradient, wanted in zip(found, expected, strict=True):
        assert_near(gradient, wanted, BOUND, "twice through the kernel")


def test_a_gram_matrix_is_twice_differentiable():
    (x,) = (tensor(2, 6, 9),)

    def twice(function, x):
        (gradient,) = torch.autograd.grad(function(x, x).sin().sum(), x, create_graph=True)
        return torch.autograd.grad(gradient.square().sum(), x)[0]

    found = twice(matrix_of, x)
    assert_near(found, twice(reference.fsp_matrix, *exactly(x)), BOUND, "twice through the kernel")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_in_its_row(value):
    x, y = tensor(3, 4, 6, grad=False), tensor(3, 5, 6, grad=False)
    expected = reference.fsp_matrix(x.double(), y.double())
    x[1, 2, 3] = value
    found = matrix_of(x, y)
    assert not found[1, 2].isfinite().any()
    assert_near(found[[0, 2]], expected[[0, 2]], BOUND, "other samples")
    assert_near(found[1, :2], expected[1, :2], BOUND, "other channels")


@pytest.mark.usefixtures("tf32")
def test_tf32_is_close():
    check(tensor(2, 5, 20), tensor(2, 7, 20), bound=5e-3)


def test_a_negative_view_is_read_with_its_sign():
    x, y, values = (tensor(2, 16, 6, 6).detach() for _ in range(3))
    view = torch.complex(torch.zeros_like(values), values).conj().imag
    assert view.is_neg()
    assert torch.equal(fsp.fsp_matrix(view, y), fsp.fsp_matrix(-values, y))
    losses = [fsp.fsp_loss([(a, y)], [(x, y)]) for a in (view, -values)]
    assert torch.equal(*losses)
