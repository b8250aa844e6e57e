"""Tiles of the residual ``D / K = G^S - G^T``, their loss and its derivative.

Student ``a (m, K)``, ``b (n, K)``, teacher ``c``, ``d``; differences ``p = a - c``, ``q = b - d``.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from fsp_kernels.backends.triton.arithmetic import cast, multiply, round_to_tf32
from fsp_kernels.backends.triton.maps import MapLayout, MapRef, load_tile, write_gradient

# The numbers of a, b, c, d among the pointers of a pair. Their gradients follow in the same order,
# then the masks of student and teacher and how many positions of each sample they count.
STUDENT_FIRST = tl.constexpr(0)
STUDENT_SECOND = tl.constexpr(1)
TEACHER_FIRST = tl.constexpr(2)
TEACHER_SECOND = tl.constexpr(3)
GRADIENT = tl.constexpr(4)
MASK = tl.constexpr(8)
COUNTS = tl.constexpr(10)


class MatrixLayout(NamedTuple):
    """Strides of a ready FSP matrix ``(B, m, n)`` or of its gradient."""

    sample: int
    row: int
    column: int


class Entry(NamedTuple):
    """A kernel's arguments for one pair, without addresses and weights.

    ``layouts`` and ``gradients`` are in the order a, b, c, d; a missing one is ``None``. A ready
    matrix of the teacher takes the place of c. The kernel is compiled for each value of the fields
    marked constant.
    """

    layouts: tuple[Any, ...]
    gradients: tuple[MapLayout | MatrixLayout | None, ...]
    samples: int
    first_sample: int  # of the maps; it is the first sample of workspaces
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
    parts: Any  # into how many parts the positions are split
    finishes: Any  # whether the kernel that computes a tile also computes its loss
    operand_count: Any  # gram.py: operands of each sample


@triton.jit
def residual_tile(pointers, entry, sample, row, column, part):
    """A tile ``(block_m, block_n)`` of ``D / K``, summed over one part of the positions."""
    BLOCK_M: tl.constexpr = entry.block_m
    BLOCK_N: tl.constexpr = entry.block_n
    BLOCK_K: tl.constexpr = entry.block_k
    result = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    K = entry.student_positions
    begin, end = range_of(part, entry.parts, K, BLOCK_K)
    if entry.residual == "difference":
        for k in tl.range(begin, end, BLOCK_K, num_stages=entry.stages):
            a_tile = _tile(pointers, entry, STUDENT_FIRST, sample, row, k)
            c_tile = _tile(pointers, entry, TEACHER_FIRST, sample, row, k)
            b_tile = _tile(pointers, entry, STUDENT_SECOND, sample, column, k)
            d_tile = _tile(pointers, entry, TEACHER_SECOND, sample, column, k)
            p = difference(a_tile, c_tile, b_tile.dtype, entry.precision)
            q = difference(b_tile, d_tile, c_tile.dtype, entry.precision)
            result = multiply(p, tl.trans(b_tile), result, entry.precision)
            result = multiply(c_tile, tl.trans(q), result, entry.precision)
    else:
        for k in tl.range(begin, end, BLOCK_K, num_stages=entry.stages):
            a_tile = _tile(pointers, entry, STUDENT_FIRST, sample, row, k)
            b_tile = _tile(pointers, entry, STUDENT_SECOND, sample, column, k)
            result = multiply(a_tile, tl.trans(b_tile), result, entry.precision)
    result = result * (1.0 / divisor_of(pointers, entry, STUDENT_FIRST, sample))
    if entry.residual == "apart":
        K = entry.teacher_positions
        begin, end = range_of(part, entry.parts, K, BLOCK_K)
        target = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k in tl.range(begin, end, BLOCK_K, num_stages=entry.stages):
            c_tile = _tile(pointers, entry, TEACHER_FIRST, sample, row, k)
            d_tile = _tile(pointers, entry, TEACHER_SECOND, sample, column, k)
            target = multiply(c_tile, tl.trans(d_tile), target, entry.precision)
        result = result - target * (1.0 / divisor_of(pointers, entry, TEACHER_FIRST, sample))
    if entry.residual == "ready":  # noqa: SIM102  (the first is decided by the compiler)
        if part == 0:
            addresses, mask = matrix_addresses(
                pointers[TEACHER_FIRST], entry.layouts[2], entry, sample, row, column
            )
            result -= tl.load(addresses, mask, other=0.0).to(tl.float32)
    return result


@triton.jit
def difference(x, y, OTHER: tl.constexpr, PRECISION: tl.constexpr):
    """``x - y`` as an operand of a product with a tile of dtype ``OTHER``.

    If all three have the same half-precision dtype, the difference is rounded once to that dtype.
    For two maps that are close to each other it is exact.
    """
    result = x.to(tl.float32) - y.to(tl.float32)
    if x.dtype == y.dtype and x.dtype == OTHER and tl.float32 != OTHER:
        result = cast(result, OTHER)
    elif PRECISION == "tf32":
        result = round_to_tf32(result)
    return result


@triton.jit
def loss_and_slope(residual, NORM: tl.constexpr):
    """The loss of a tile of the residual, and its derivative by ``D / K`` (the slope).

    For the column norm the tile must have all rows. For sums of squares the slope lacks the
    factor 2.
    """
    squares = residual * residual
    if NORM == "column":
        lengths = tl.sqrt_rn(tl.sum(squares, axis=0))
        loss = tl.sum(lengths)
        # As in PyTorch, the subgradient of a zero column is zero.
        residual = residual * tl.where(lengths == 0, 0.0, 1.0 / lengths)[None, :]
    else:
        loss = tl.sum(tl.sum(squares, axis=1))
    return loss, residual


@triton.jit
def scaled_slope(slope, scale, divisor):
    """``scale * slope / K``, which the student's gradients are products with.

    It is scaled before it is multiplied, because the product might overflow.
    """
    return slope * (scale / divisor)


@triton.jit
def teacher_ratio(pointers, entry, sample):
    """The factor of the teacher's gradients, since the slope is scaled for the student's."""
    ratio = -1.0
    if entry.residual == "apart":
        ratio = ratio * divisor_of(pointers, entry, STUDENT_FIRST, sample)
        ratio = ratio / divisor_of(pointers, entry, TEACHER_FIRST, sample)
    return ratio


@triton.jit
def write_matrix_gradient(slope, pointers, entry, sample, row, column):
    """Write a tile ``(block_m, block_n)`` of a ready matrix's gradient, from a scaled slope."""
    pointer = pointers[GRADIENT + TEACHER_FIRST]
    layout = entry.gradients[TEACHER_FIRST]
    addresses, mask = matrix_addresses(pointer, layout, entry, sample, row, column)
    gradient = slope * -divisor_of(pointers, entry, STUDENT_FIRST, sample)
    tl.store(addresses, cast(gradient, pointer.dtype.element_ty), mask)


@triton.jit
def matrix_addresses(pointer, layout, entry, sample, row, column):
    """Pointers to a tile ``(block_m, block_n)`` of a matrix ``(m, n)``, and their mask."""
    rows = (row + tl.arange(0, entry.block_m))[:, None]
    columns = (column + tl.arange(0, entry.block_n))[None, :]
    start = pointer + sample.to(tl.int64) * layout.sample
    offsets = rows.to(tl.int64) * layout.row + columns.to(tl.int64) * layout.column
    return start + offsets, (rows < entry.m) & (columns < entry.n)


@triton.jit
def _tile(pointers, entry, INDEX: tl.constexpr, sample, channel, position):
    """A tile ``(block_m, block_k)`` of a first map or ``(block_n, block_k)`` of a second map."""
    BLOCK_C: tl.constexpr = entry.block_m if INDEX % 2 == 0 else entry.block_n
    return load_map(pointers, entry, INDEX, sample, channel, position, BLOCK_C, entry.block_k)


@triton.jit
def load_map(
    pointers,
    entry,
    INDEX: tl.constexpr,
    sample,
    channel,
    position,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """A tile ``(BLOCK_C, BLOCK_K)`` of the map number INDEX of a pair."""
    # The MapRef gets no name: a name would turn the layout's constants into variables.
    return load_tile(
        MapRef(
            pointers[INDEX],
            entry.layouts[INDEX],
            entry.m if INDEX % 2 == 0 else entry.n,
            positions_of(entry, INDEX),
            pointers[MASK + network_of(INDEX, entry.residual)],
        ),
        sample,
        channel,
        position,
        BLOCK_C,
        BLOCK_K,
    )


@triton.jit
def write_map_gradient(value, pointers, entry, INDEX: tl.constexpr, sample, channel, position):
    """Write a tile of the gradient of the map number INDEX of a pair."""
    channels: tl.constexpr = entry.m if INDEX % 2 == 0 else entry.n
    positions = positions_of(entry, INDEX)
    write_gradient(
        value,
        MapRef(
            pointers[INDEX],
            entry.layouts[INDEX],
            channels,
            positions,
            pointers[MASK + network_of(INDEX, entry.residual)],
        ),
        MapRef(pointers[GRADIENT + INDEX], entry.gradients[INDEX], channels, positions, None),
        sample,
        channel,
        position,
    )


@triton.constexpr_function
def network_of(index: int, residual: str) -> int:
    """Whose positions the map number ``index`` has: 0 for the student's, 1 for the teacher's.

    If the networks' maps are subtracted, their positions and masks are the same.
    """
    return index // 2 if residual == "apart" else 0


@triton.jit
def positions_of(entry, INDEX: tl.constexpr):
    """How many positions the map number INDEX has, after pooling."""
    positions = entry.student_positions
    if network_of(INDEX, entry.residual) == 1:
        positions = entry.teacher_positions
    return positions


@triton.jit
def divisor_of(pointers, entry, INDEX: tl.constexpr, sample):
    """How many positions of the map number INDEX count in a sample."""
    counts = pointers[COUNTS + network_of(INDEX, entry.residual)]
    return counted(counts, positions_of(entry, INDEX), sample)


@triton.jit
def counted(counts, positions, sample):
    """How many positions count in a sample: as ``counts (B,)`` say, or all if there is no mask."""
    if counts is not None:
        positions = tl.load(counts + sample)
    return positions


@triton.jit
def range_of(part, PARTS: tl.constexpr, size, BLOCK: tl.constexpr):
    """The range of positions or channels of a part: whole blocks, but not beyond ``size``."""
    begin = 0
    end = size
    if PARTS > 1:
        span = tl.cdiv(tl.cdiv(size, BLOCK), PARTS) * BLOCK
        begin = part * span
        end = tl.minimum(begin + span, size)
    return begin, end
