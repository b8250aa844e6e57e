"""The residual ``D / K = G^S - G^T``, a tile at a time, and what the norms make of it.

Student ``a (m, K)``, ``b (n, K)``, teacher ``c``, ``d``; differences ``p = a - c``, ``q = b - d``.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from fsp_kernels.backends.triton.arithmetic import cast, multiply, round_to_tf32
from fsp_kernels.backends.triton.maps import MapLayout, load_tile


class MatrixLayout(NamedTuple):
    """Where the entries of a ready FSP matrix ``(B, m, n)``, or its gradient's, lie."""

    sample: int
    row: int
    column: int


class Entry(NamedTuple):
    """What a kernel needs to know of one pair, besides addresses and weights.

    ``layouts`` and ``gradients`` are in the order a, b, c, d, with ``None`` where there is none; a
    teacher's ready matrix is its c. Fields marked constant shape the code.
    """

    layouts: tuple[Any, ...]
    gradients: tuple[MapLayout | MatrixLayout | None, ...]
    samples: int
    first_sample: int  # in the maps; workspaces begin at it
    m: Any  # constant, channels
    n: Any  # constant
    student_positions: int
    teacher_positions: int
    residual: Any  # constant: "difference", "apart" or "ready"
    norm: Any  # constant
    precision: Any  # constant, of fp32 products
    block_m: Any  # constant, as all below
    block_n: Any
    block_k: Any
    stages: Any
    parts: Any  # into how many the positions are split
    finishes: Any  # whether the kernel that sees a tile may tell its loss
    kept: Any  # gram.py: operands of each sample


@triton.jit
def residual_tile(pointers, entry, sample, row, column, part):
    """``(block_m, block_n)`` of ``D / K``, summed over one part of the positions."""
    result = tl.zeros((entry.block_m, entry.block_n), tl.float32)
    K = entry.student_positions
    begin, end = range_of(part, entry.parts, K, entry.block_k)
    if entry.residual == "difference":
        for k in tl.range(begin, end, entry.block_k, num_stages=entry.stages):
            a = _tile(pointers, entry, 0, sample, row, k, K)
            c = _tile(pointers, entry, 2, sample, row, k, K)
            b = _tile(pointers, entry, 1, sample, column, k, K)
            d = _tile(pointers, entry, 3, sample, column, k, K)
            p = difference(a, c, b.dtype, entry.precision)
            q = difference(b, d, c.dtype, entry.precision)
            result = multiply(p, tl.trans(b), result, entry.precision)
            result = multiply(c, tl.trans(q), result, entry.precision)
    else:
        for k in tl.range(begin, end, entry.block_k, num_stages=entry.stages):
            a = _tile(pointers, entry, 0, sample, row, k, K)
            b = _tile(pointers, entry, 1, sample, column, k, K)
            result = multiply(a, tl.trans(b), result, entry.precision)
    result = result * (1.0 / K)
    if entry.residual == "apart":
        K = entry.teacher_positions
        begin, end = range_of(part, entry.parts, K, entry.block_k)
        target = tl.zeros((entry.block_m, entry.block_n), tl.float32)
        for k in tl.range(begin, end, entry.block_k, num_stages=entry.stages):
            c = _tile(pointers, entry, 2, sample, row, k, K)
            d = _tile(pointers, entry, 3, sample, column, k, K)
            target = multiply(c, tl.trans(d), target, entry.precision)
        result = result - target * (1.0 / K)
    if entry.residual == "ready":  # noqa: SIM102  (the first is decided by the compiler)
        if part == 0:
            addresses, mask = matrix_addresses(
                pointers[2], entry.layouts[2], entry, sample, row, column
            )
            result -= tl.load(addresses, mask, other=0.0).to(tl.float32)
    return result


@triton.jit
def difference(x, y, OTHER: tl.constexpr, PRECISION: tl.constexpr):
    """``x - y`` as an operand of a product with a tile of dtype ``OTHER``.

    Where all are of one half-precision dtype it is rounded to that, once; of two maps that are
    near each other it is exact.
    """
    result = x.to(tl.float32) - y.to(tl.float32)
    if x.dtype == y.dtype and x.dtype == OTHER and tl.float32 != OTHER:
        result = cast(result, OTHER)
    elif PRECISION == "tf32":
        result = round_to_tf32(result)
    return result


@triton.jit
def loss_and_slope(residual, NORM: tl.constexpr):
    """A tile with all its rows: its contribution to the norm, and the derivative by ``D / K``.

    The latter without the factor 2 of a sum of squares.
    """
    squares = residual * residual
    if NORM == "column":
        lengths = tl.sqrt_rn(tl.sum(squares, axis=0))
        loss = tl.sum(lengths)
        # The subgradient of a zero column is zero, as PyTorch has it.
        residual = residual * tl.where(lengths == 0, 0.0, 1.0 / lengths)[None, :]
    else:
        loss = tl.sum(tl.sum(squares, axis=1))
    return loss, residual


@triton.jit
def scaled_slope(slope, scale, entry):
    """``scale * slope / K`` of the student: what its gradients are a product of.

    Scaled before it is multiplied: the product of what is not may overflow.
    """
    return slope * (scale / entry.student_positions)


@triton.jit
def teacher_ratio(entry):
    """What a teacher's gradients are multiplied with, for a slope of the student's scale."""
    ratio = -1.0
    if entry.residual == "apart":
        ratio = ratio * entry.student_positions / entry.teacher_positions
    return ratio


@triton.jit
def write_matrix_gradient(slope, pointers, entry, sample, row, column):
    """Write the gradient of a ready matrix, ``(block_m, block_n)`` of it, from a scaled slope."""
    addresses, mask = matrix_addresses(pointers[6], entry.gradients[2], entry, sample, row, column)
    gradient = slope * -entry.student_positions
    tl.store(addresses, cast(gradient, pointers[6].dtype.element_ty), mask)


@triton.jit
def matrix_addresses(pointer, layout, entry, sample, row, column):
    """Pointers to a tile ``(block_m, block_n)`` of a matrix ``(m, n)``, and their mask."""
    rows = (row + tl.arange(0, entry.block_m))[:, None]
    columns = (column + tl.arange(0, entry.block_n))[None, :]
    start = pointer + sample.to(tl.int64) * layout.sample
    offsets = rows.to(tl.int64) * layout.row + columns.to(tl.int64) * layout.column
    return start + offsets, (rows < entry.m) & (columns < entry.n)


@triton.jit
def _tile(pointers, entry, INDEX: tl.constexpr, sample, channel, k, positions):
    """Of the map number INDEX: ``(block_m, block_k)`` of a first map, ``block_n`` of a second."""
    C: tl.constexpr = entry.m if INDEX % 2 == 0 else entry.n
    BLOCK: tl.constexpr = entry.block_m if INDEX % 2 == 0 else entry.block_n
    return load_tile(
        pointers[INDEX],
        entry.layouts[INDEX],
        sample,
        channel,
        k,
        C,
        positions,
        BLOCK,
        entry.block_k,
    )


@triton.jit
def range_of(part, PARTS: tl.constexpr, size, BLOCK: tl.constexpr):
    """Of ``size`` positions or channels those of a part: whole blocks, to the end at most."""
    begin = 0
    end = size
    if PARTS > 1:
        span = tl.cdiv(tl.cdiv(size, BLOCK), PARTS) * BLOCK
        begin = part * span
        end = tl.minimum(begin + span, size)
    return begin, end
