"""Pieces of the kernels that make a residual, a loss and a slope, on single tiles."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from calls import BF16, DEVICE, FP16, FP32

from fsp_kernels.backends.triton import residual

SIZE = 16


@triton.jit
def _difference(x, y, other, out, SIZE: tl.constexpr, PRECISION: tl.constexpr):
    index = tl.arange(0, SIZE)
    found = residual.difference(
        tl.load(x + index), tl.load(y + index), other.dtype.element_ty, PRECISION
    )
    tl.store(out + index, found.to(tl.float32))


@triton.jit
def _loss_and_slope(x, loss, slope, SIZE: tl.constexpr, NORM: tl.constexpr):
    index = tl.arange(0, SIZE)[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    value, derivative = residual.loss_and_slope(tl.load(x + index), NORM)
    tl.store(loss, value)
    tl.store(slope + index, derivative)


@triton.jit
def _ranges(out, size, PARTS: tl.constexpr, BLOCK: tl.constexpr):
    part = tl.program_id(0)
    begin, end = residual.range_of(part, PARTS, size, BLOCK)
    tl.store(out + 2 * part, begin)
    tl.store(out + 2 * part + 1, end)


def difference(x, y, other, precision):
    out = torch.empty(SIZE, device=DEVICE)
    _difference[(1,)](x, y, torch.empty(1, dtype=other, device=DEVICE), out, SIZE, precision)
    return out


@pytest.mark.parametrize("dtype", [FP16, BF16], ids=str)
def test_a_difference_of_half_precision_maps_is_rounded_once_to_their_dtype(dtype):
    x, y = (torch.randn(SIZE, device=DEVICE).to(dtype) for _ in range(2))
    found = difference(x, y, dtype, "tf32x3")
    assert torch.equal(found, (x.float() - y.float()).to(dtype).float())


@pytest.mark.parametrize(("second", "other"), [(FP32, BF16), (BF16, FP32)], ids=str)
def test_a_difference_beside_another_dtype_stays_fp32(second, other):
    x, y = torch.randn(SIZE, device=DEVICE).to(BF16), torch.randn(SIZE, device=DEVICE).to(second)
    assert torch.equal(difference(x, y, other, "tf32x3"), x.float() - y.float())


def test_a_difference_of_fp32_maps_is_rounded_for_tf32():
    x, y = (torch.randn(SIZE, device=DEVICE) for _ in range(2))
    found, exact = difference(x, y, FP32, "tf32"), x - y
    assert not torch.equal(found, exact)
    assert ((found - exact).abs() <= 2**-11 * exact.abs()).all()


@pytest.mark.parametrize("norm", ["frobenius", "column"])
def test_loss_and_slope_of_a_tile_are_those_of_the_norm(norm):
    x = torch.randn(SIZE, SIZE, device=DEVICE)
    x[:, 3] = 0
    loss, slope = torch.empty(1, device=DEVICE), torch.empty_like(x)
    _loss_and_slope[(1,)](x, loss, slope, SIZE, norm)
    lengths = x.double().norm(dim=0)
    if norm == "column":  # whose slope at a column of zeros is zero
        wanted, derivative = lengths.sum(), x.double() / lengths.where(lengths > 0, 1.0)
    else:
        wanted, derivative = lengths.square().sum(), x.double()
    torch.testing.assert_close(loss.double().squeeze(), wanted, rtol=1e-6, atol=0)
    torch.testing.assert_close(slope.double(), derivative, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("size", "parts", "wanted"),
    [
        (100, 1, [(0, 100)]),
        (100, 2, [(0, 64), (64, 100)]),
        (33, 3, [(0, 16), (16, 32), (32, 33)]),
        (20, 3, [(0, 16), (16, 20), (32, 20)]),  # the last part is empty
    ],
)
def test_parts_are_whole_blocks_up_to_the_end(size, parts, wanted):
    out = torch.empty(parts, 2, dtype=torch.int32, device=DEVICE)
    _ranges[(parts,)](out, size, parts, 16)
    assert [tuple(x) for x in out.tolist()] == wanted
