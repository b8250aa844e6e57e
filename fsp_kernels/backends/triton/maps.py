"""Feature maps inside a kernel: reading a tile, pooled on the way, and writing its gradient.

A map is read as it lies, by strides, one ``(channels, positions)`` tile at a time. Where it is
pooled to its partner's size each position of the tile stands for a window, and nothing pooled is
ever stored: the maximum is found again when its gradient is written.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import triton
import triton.language as tl

from fsp_kernels.backends.fused import Axes, axes_of
from fsp_kernels.backends.triton.arithmetic import cast

INT32_LIMIT = 2**31 - 1


class MapLayout(NamedTuple):
    """Where the elements of a map ``(B, C, *spatial)`` lie; strides in elements.

    Three spatial axes always, leading ones of size 1 where there are fewer. The kernel's code
    depends on the fields marked constant.
    """

    sample: int
    channel: int
    depth: int  # strides of the spatial axes
    height: int
    width: int
    rows: int  # sizes, after pooling, of the last two
    columns: int
    window: Any  # constant (d, h, w): elements pooled along each axis
    pool: Any  # constant: "none", "max" or "avg"
    flat: Any  # constant: positions lie `width` apart, whatever their axis
    wide: Any  # constant: offsets within a sample need 64 bits
    unit: Any  # constant: elements that are read and written at once; see `unit_of`
    inner: Any  # constant: whether channels, rather than positions, are neighbours in memory


def layout_of(
    shape: Sequence[int], strides: Sequence[int], size: Sequence[int] | None, pool: str
) -> MapLayout:
    """The layout of a map that is pooled to ``size``, a divisor of its own axis by axis."""
    axes = axes_of(shape, strides, size)
    reach = sum((s - 1) * abs(t) for s, t in zip(shape[1:], strides[1:], strict=True))
    constant = tl.constexpr
    return MapLayout(
        sample=strides[0],
        channel=strides[1],
        depth=axes.strides[0],
        height=axes.strides[1],
        width=axes.strides[2],
        rows=axes.sizes[1],
        columns=axes.sizes[2],
        window=tuple(constant(w) for w in axes.windows),
        pool=constant("none" if axes.windows == (1, 1, 1) else pool),
        flat=constant(axes.flat),
        wide=constant(reach > INT32_LIMIT),
        unit=constant(unit_of(strides, axes)),
        inner=constant(strides[1] == 1 and axes.strides[2] != 1),
    )


def unit_of(strides: Sequence[int], axes: Axes) -> int:
    """The largest power of two, at most 16, of elements that always lie together in a row.

    Rows begin at multiples of it, and end there: all strides but that of a row are divisible by it,
    and the positions if it is these that are neighbours. A compiler that knows it reads 14 x 14
    maps of bf16 by 8 bytes; Triton by itself looks for multiples of 16 elements, and reads them
    by 2.
    """
    sample, channel, position = *strides[:2], axes.strides[2]
    if not axes.flat:
        return 1
    if position == 1:
        return math.gcd(16, sample, channel, math.prod(axes.sizes))
    return math.gcd(16, sample, position) if channel == 1 else 1


@triton.jit
def load_tile(
    pointer,
    layout,
    sample,
    channel,
    position,
    channels: tl.constexpr,
    positions,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """``(BLOCK_C, BLOCK_K)`` from ``channel`` and ``position`` on, zero beyond the map's end.

    In the map's dtype, except that averages stay in fp32.
    """
    tile, _ = _load(
        pointer, layout, sample, channel, position, channels, positions, BLOCK_C, BLOCK_K
    )
    return tile


@triton.jit
def write_gradient(
    gradient,
    pointer,
    layout,
    gradient_pointer,
    gradient_layout,
    sample,
    channel,
    position,
    channels: tl.constexpr,
    positions,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Write ``gradient (BLOCK_C, BLOCK_K)`` of a tile that :func:`load_tile` read.

    The average passes it to each element of a window in equal parts, the maximum to the element
    that it was; windows of an integer ratio do not overlap, so each element is written once.
    """
    first, mask = _addresses(
        gradient_pointer,
        gradient_layout,
        sample,
        channel,
        position,
        channels,
        positions,
        BLOCK_C,
        BLOCK_K,
    )
    dtype: tl.constexpr = gradient_pointer.dtype.element_ty
    if layout.pool == "none":
        tl.store(first, cast(gradient, dtype), mask)
    elif layout.pool == "avg":
        share = gradient * (1.0 / (layout.window[0] * layout.window[1] * layout.window[2]))
        for d in tl.static_range(layout.window[0]):
            for h in tl.static_range(layout.window[1]):
                for w in tl.static_range(layout.window[2]):
                    tl.store(first + _within(gradient_layout, d, h, w), cast(share, dtype), mask)
    else:
        _, choice = _load(
            pointer, layout, sample, channel, position, channels, positions, BLOCK_C, BLOCK_K
        )
        for d in tl.static_range(layout.window[0]):
            for h in tl.static_range(layout.window[1]):
                for w in tl.static_range(layout.window[2]):
                    value = tl.where(choice == _element(layout, d, h, w), gradient, 0.0)
                    tl.store(first + _within(gradient_layout, d, h, w), cast(value, dtype), mask)


@triton.jit
def _load(
    pointer,
    layout,
    sample,
    channel,
    position,
    channels: tl.constexpr,
    positions,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The tile and, for maximum pooling, which element of each window it is."""
    first, mask = _addresses(
        pointer, layout, sample, channel, position, channels, positions, BLOCK_C, BLOCK_K
    )
    choice = tl.zeros((BLOCK_C, BLOCK_K), tl.int32)
    if layout.pool == "none":
        tile = tl.load(first, mask, other=0.0)
    elif layout.pool == "avg":
        total = tl.zeros((BLOCK_C, BLOCK_K), tl.float32)
        for d in tl.static_range(layout.window[0]):
            for h in tl.static_range(layout.window[1]):
                for w in tl.static_range(layout.window[2]):
                    value = tl.load(first + _within(layout, d, h, w), mask, other=0.0)
                    total += value.to(tl.float32)
        tile = total * (1.0 / (layout.window[0] * layout.window[1] * layout.window[2]))
    else:
        best = tl.full((BLOCK_C, BLOCK_K), -float("inf"), tl.float32)
        for d in tl.static_range(layout.window[0]):
            for h in tl.static_range(layout.window[1]):
                for w in tl.static_range(layout.window[2]):
                    value = tl.load(first + _within(layout, d, h, w), mask, other=0.0)
                    value = value.to(tl.float32)
                    # As PyTorch has it: the first among ties, the last among NaN.
                    take = (value > best) | (value != value)
                    best = tl.where(take, value, best)
                    choice = tl.where(take, _element(layout, d, h, w), choice)
        tile = best.to(pointer.dtype.element_ty)
    return tile, choice


@triton.jit
def _within(layout, d, h, w):
    """Offset of an element of a window from its first."""
    if layout.wide:
        d = tl.full((), d, tl.int64)
        h = tl.full((), h, tl.int64)
        w = tl.full((), w, tl.int64)
    return d * layout.depth + h * layout.height + w * layout.width


@triton.jit
def _element(layout, d, h, w):
    """Number of an element of a window."""
    return (d * layout.window[1] + h) * layout.window[2] + w


@triton.jit
def _addresses(
    pointer,
    layout,
    sample,
    channel,
    position,
    channels: tl.constexpr,
    positions,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """``(BLOCK_C, BLOCK_K)`` pointers, to the first element of each window, and their mask."""
    c = channel + tl.arange(0, BLOCK_C)
    k = position + tl.arange(0, BLOCK_K)
    end = positions if layout.inner else _in_units(positions, layout)
    mask = (k < end)[None, :]
    if channels % BLOCK_C != 0:
        mask = mask & (c < channels)[:, None]
    if layout.wide:
        c = c.to(tl.int64)
        k = k.to(tl.int64)
    if layout.flat:
        offsets = k * layout.width if layout.width == 1 else k * _in_units(layout.width, layout)
    else:
        line = k // layout.columns
        offsets = (
            (k % layout.columns) * layout.width * layout.window[2]
            + (line % layout.rows) * layout.height * layout.window[1]
            + (line // layout.rows) * layout.depth * layout.window[0]
        )
    start = pointer + sample.to(tl.int64) * _in_units(layout.sample, layout)
    if not layout.inner:
        c = c * _in_units(layout.channel, layout)
    return start + c[:, None] + offsets[None, :], mask


@triton.jit
def _in_units(x, layout):
    """``x``, a multiple of the layout's unit, as such to the compiler."""
    return x // layout.unit * layout.unit
