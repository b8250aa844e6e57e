"""Products at the ends of fp32: what is finite stays finite, and what is not shows."""

from __future__ import annotations

import math

import pytest
import torch
import triton
import triton.language as tl
from calls import BF16, DEVICE, FP16, FP32

from fsp_kernels.backends.triton import arithmetic

SIZE = 16
LARGEST = torch.finfo(FP32).max
# fp32 numbers that are rounded to Inf: the first by bf16 alone, the others by TF32 too.
TOP = (3.397e38, 3.4021e38, LARGEST)


@triton.jit
def _products(x, y, out, SIZE: tl.constexpr, COMPUTED: tl.constexpr, PRECISION: tl.constexpr):
    index = tl.arange(0, SIZE)[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    result = tl.zeros((SIZE, SIZE), tl.float32)
    if COMPUTED:
        result = arithmetic.multiply_computed(
            tl.load(x + index), tl.load(y + index), result, y.dtype.element_ty, PRECISION
        )
    else:
        result = arithmetic.multiply(tl.load(x + index), tl.load(y + index), result, PRECISION)
    tl.store(out + index, result)


@triton.jit
def _rounded(x, out, SIZE: tl.constexpr):
    index = tl.arange(0, SIZE)
    tl.store(out + index, arithmetic.round_to_tf32(tl.load(x + index)))


@triton.jit
def _operands(x, out, SIZE: tl.constexpr):
    index = tl.arange(0, SIZE)
    tl.store(out + index, arithmetic._operand(tl.load(x + index), "tf32x3"))


def product(value: float, factor: float, dtype, precision: str, computed: bool = True):
    """``value * factor`` as one element of a product of tiles, ``factor`` in ``dtype``."""
    x = torch.zeros(SIZE, SIZE, device=DEVICE)
    y = torch.zeros(SIZE, SIZE, device=DEVICE, dtype=dtype)
    out = torch.empty(SIZE, SIZE, device=DEVICE)
    x[3, 5], y[5, 2] = value, factor
    _products[(1,)](x, y, out, SIZE, computed, precision)
    return out[3, 2].item()


# Each way that a product takes: the dtype of the map and the precision of fp32 products.
ways = pytest.mark.parametrize(
    ("dtype", "precision"),
    [(BF16, "tf32"), (FP16, "tf32"), (FP32, "tf32"), (FP32, "tf32x3")],
    ids=str,
)
# Relative: at the top of fp32 an operand is cut to TF32 in every way but the first.
CUT = 2**-10


@ways
@pytest.mark.parametrize("value", [*TOP, -LARGEST])
def test_a_finite_number_at_the_top_of_fp32_is_multiplied_as_one(value, dtype, precision):
    found = product(value, 2**-10, dtype, precision)
    assert abs(found / (value * 2**-10) - 1) <= (2**-8 if dtype == BF16 else CUT)


@pytest.mark.parametrize("precision", ["tf32", "tf32x3"])
@pytest.mark.parametrize("value", [*TOP, -LARGEST])
def test_a_map_at_the_top_of_fp32_is_multiplied_as_it_is(value, precision):
    found = product(value, 2**-10, FP32, precision, computed=False)
    assert abs(found / (value * 2**-10) - 1) <= CUT


@ways
@pytest.mark.parametrize("value", [float("inf"), float("-inf")])
def test_inf_stays_inf(value, dtype, precision):
    x = torch.full((SIZE, SIZE), value, device=DEVICE)
    y = torch.ones(SIZE, SIZE, device=DEVICE, dtype=dtype)
    out = torch.empty(SIZE, SIZE, device=DEVICE)
    _products[(1,)](x, y, out, SIZE, True, precision)
    assert (out == value).all()


@ways
def test_nan_stays_nan(dtype, precision):
    assert math.isnan(product(float("nan"), 1.0, dtype, precision))


def bits(*numbers: int) -> torch.Tensor:
    """A tile of fp32 numbers, those given by their bits, then their negatives, then 0."""
    x = torch.tensor(numbers, dtype=torch.int64)
    x = torch.cat([x, x + (1 << 31)])
    x = torch.cat([x, x.new_zeros(SIZE - len(x))])
    return x.to(torch.int32).view(FP32).to(DEVICE)


def test_rounding_to_tf32_is_to_the_nearest_and_never_makes_inf():
    x = bits(0x3F800FFF, 0x3F801000, 0x7F7FEFFF, 0x7F800000)
    out = torch.empty_like(x)
    _rounded[(1,)](x, out, SIZE)
    assert torch.equal(out, bits(0x3F800000, 0x3F802000, 0x7F7FE000, 0x7F800000))


@pytest.mark.parametrize("number", [0x7F7FF000, 0x7F7FFFFF])
def test_operands_of_3xtf32_round_to_finite_numbers_of_tf32(number):
    """A GPU rounds by adding half an ulp to the bits and cutting off the rest."""
    x = bits(number, 0x3F801234, 0x7F7FEFFF)
    out = torch.empty_like(x)
    _operands[(1,)](x, out, SIZE)
    assert torch.equal(out[1:3], x[1:3])
    rounded = (out.view(torch.int32) + 0x1000) & -0x2000
    assert rounded.view(FP32).isfinite().all()
    assert (out.double() / x.double() - 1).nan_to_num().abs().max() <= CUT
