"""Feature maps inside a kernel: read a tile and pool it, and write its gradient.

A map is read by its strides, one ``(channels, positions)`` tile at a time. If it is pooled to its
partner's size, each position of the tile stands for a window. The pooled map is not stored: the
maximum is found again when its gradient is written. If windows have two neighbours in a row, whole
rows are read and written. Other windows are read and written element by element.

A map that is not pooled may have a mask ``(B, K)``, true where a position counts. Other positions
are read as zeros, whatever they hold, and their gradient is zero.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import triton
import triton.language as tl

from fsp_kernels.backends.axes import Axes, axes_of
from fsp_kernels.backends.triton.arithmetic import cast

INT32_LIMIT = 2**31 - 1


class MapLayout(NamedTuple):
    """Strides and sizes of a map ``(B, C, *spatial)``; strides in elements.

    There are always three spatial axes. If the map has fewer, the leading ones have size 1. The
    kernel is compiled for each value of the fields marked constant.
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
    flat: Any  # constant: the stride `width` leads from each position to the next across all axes
    wide: Any  # constant: offsets within a sample need 64 bits
    span: Any  # constant: neighbours of a window that are read at once; see `span_of`
    unit: Any  # constant: elements that are read and written at once; see `unit_of`
    inner: Any  # constant: whether channels, not positions, are neighbours in memory


def layout_of(
    shape: Sequence[int], strides: Sequence[int], size: Sequence[int] | None, pool: str
) -> MapLayout:
    """The layout of a map that is pooled to ``size``, which divides the map's size axis by axis."""
    axes = axes_of(shape, strides, size)
    span = span_of(axes)
    reach = sum((s - 1) * abs(t) for s, t in zip(shape[1:], strides[1:], strict=True))
    reach = max(reach, span * math.prod(axes.sizes))  # positions are counted up to there
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
        span=constant(span),
        unit=constant(unit_of(strides, axes)),
        inner=constant(has_inner_channels(strides, axes)),
    )


def has_inner_channels(strides: Sequence[int], axes: Axes) -> bool:
    """Whether channels, not positions, are neighbours in memory."""
    return strides[1] == 1 and axes.strides[2] != 1


def span_of(axes: Axes) -> int:
    """How many elements of a window are read at once: 2 if it has two neighbours in a row, else 1.

    With 2, a row of the map is read without gaps, and a thread has both neighbours.
    """
    return 2 if axes.strides[2] == 1 and axes.windows[2] == 2 else 1


def unit_of(strides: Sequence[int], axes: Axes) -> int:
    """The largest power of two, at most 16, of elements into which all rows can be cut.

    It divides all strides other than that within a row. If positions are neighbours, it divides the
    length of a row, too. If the compiler knows it, it reads 14 x 14 maps of bf16 in units of 8
    bytes. Triton by itself only looks for multiples of 16 elements, and would read units of 2
    bytes. If windows are not read in whole rows, rows have gaps and the unit is 1.
    """
    sample, channel, position = *strides[:2], axes.strides[2]
    if position == 1 and axes.windows[2] == span_of(axes):
        row = math.prod(axes.sizes) if axes.flat else axes.sizes[2] * axes.windows[2]
        return math.gcd(16, sample, channel, *axes.strides[:2], row)
    return math.gcd(16, sample, position) if axes.flat and channel == 1 else 1


class MapRef(NamedTuple):
    """A feature map or its gradient, as an argument of the functions below."""

    pointer: Any
    layout: Any
    channels: Any  # constant
    positions: Any  # after pooling
    mask: Any  # pointer to the mask, or None; None if it is pooled


@triton.jit
def load_tile(x, sample, channel, position, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr):
    """A tile ``(BLOCK_C, BLOCK_K)`` that begins at ``channel`` and ``position``.

    It is zero beyond the map's end. It has the map's dtype, but averages are fp32.
    """
    tile, _ = _load(x, sample, channel, position, BLOCK_C, BLOCK_K)
    return tile


@triton.jit
def write_gradient(value, x, gradient, sample, channel, position):
    """Write the gradient ``value (BLOCK_C, BLOCK_K)`` of a tile of ``x`` to ``gradient``.

    For averages each element of a window gets an equal share. For maxima the element that was the
    maximum gets the whole. Windows do not overlap, so each element is written once.
    """
    BLOCK_C: tl.constexpr = value.shape[0]
    BLOCK_K: tl.constexpr = value.shape[1]
    window: tl.constexpr = x.layout.window[0] * x.layout.window[1] * x.layout.window[2]
    first, mask = _addresses(gradient, sample, channel, position, BLOCK_C, BLOCK_K)
    dtype: tl.constexpr = gradient.pointer.dtype.element_ty
    if x.layout.pool == "none":
        if x.mask is not None:
            # Not a product with zeros: if the slope is infinite, that would be NaN.
            value = tl.where(_counting(x, sample, position, BLOCK_K), value, 0.0)
        tl.store(first, cast(value, dtype), mask)
    else:
        if x.layout.pool == "max":
            _, choice = _load(x, sample, channel, position, BLOCK_C, BLOCK_K)
        else:
            value *= 1.0 / window
        span: tl.constexpr = gradient.layout.span
        # With a third axis, Triton converts the product's layout once, before this line.
        shared = tl.broadcast_to(cast(value, dtype)[:, :, None], (BLOCK_C, BLOCK_K, span))
        neighbours = tl.arange(0, span)[None, None, :]
        for i in tl.static_range(0, window, span):
            row = shared
            if x.layout.pool == "max":
                row = tl.where(choice[:, :, None] == neighbours + i, shared, 0.0)
            row = tl.reshape(row, (BLOCK_C, BLOCK_K * span))
            tl.store(first + _offset_in_window(gradient.layout, i), row, mask)


@triton.jit
def _load(x, sample, channel, position, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr):
    """The tile and, for max pooling, the number of the maximum within each window."""
    window: tl.constexpr = x.layout.window[0] * x.layout.window[1] * x.layout.window[2]
    first, mask = _addresses(x, sample, channel, position, BLOCK_C, BLOCK_K)
    choice = tl.zeros((BLOCK_C, BLOCK_K), tl.int32)
    if x.layout.pool == "none":
        if x.mask is None:
            tile = tl.load(first, mask, other=0.0)
        elif x.layout.inner:
            tile = tl.load(first, mask & _counting(x, sample, position, BLOCK_K), other=0.0)
        else:
            # With such a mask, positions that are neighbours would be read one by one.
            tile = tl.load(first, mask, other=0.0)
            tile = tl.where(_counting(x, sample, position, BLOCK_K), tile, 0.0)
    else:
        # In fp32: averages stay in fp32, and a maximum, being one of the elements, is exact.
        start = 0.0 if x.layout.pool == "avg" else -float("inf")
        tile = tl.full((BLOCK_C, BLOCK_K), start, tl.float32)
        for i in tl.static_range(0, window, x.layout.span):
            row = tl.load(first + _offset_in_window(x.layout, i), mask, other=0.0)
            values = _neighbours_of(row, x.layout, BLOCK_C, BLOCK_K)
            for j in tl.static_range(x.layout.span):
                value = values[j].to(tl.float32)
                if x.layout.pool == "avg":
                    tile += value
                else:
                    # As in PyTorch: the first of equal maxima, the last NaN.
                    take = (value > tile) | (value != value)
                    tile = tl.maximum(tile, value, propagate_nan=tl.PropagateNan.ALL)
                    choice = tl.where(take, i + j, choice)
        if x.layout.pool == "avg":
            tile *= 1.0 / window
        else:
            tile = tile.to(x.pointer.dtype.element_ty)
    return tile, choice


@triton.jit
def _counting(x, sample, position, BLOCK_K: tl.constexpr):
    """Which positions of a tile count, ``(1, BLOCK_K)``; none beyond the map's end."""
    k = position + tl.arange(0, BLOCK_K)
    start = x.mask + sample.to(tl.int64) * x.positions
    return (tl.load(start + k, k < x.positions, other=0) != 0)[None, :]


@triton.jit
def _neighbours_of(row, layout, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr):
    """The ``span`` neighbours that were read of each window, one tile for each."""
    return tl.split(tl.reshape(row, (BLOCK_C, BLOCK_K, 2))) if layout.span == 2 else (row,)


@triton.jit
def _offset_in_window(layout, INDEX: tl.constexpr):
    """Offset of an element of a window from its first element; elements are numbered row by row."""
    line = INDEX // layout.window[2]
    d = line // layout.window[1]
    h = line - d * layout.window[1]
    w = INDEX - line * layout.window[2]
    DTYPE: tl.constexpr = tl.int64 if layout.wide else tl.int32
    return (
        tl.full((), d, DTYPE) * layout.depth
        + tl.full((), h, DTYPE) * layout.height
        + tl.full((), w, DTYPE) * layout.width
    )


@triton.jit
def _addresses(x, sample, channel, position, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr):
    """Pointers ``(BLOCK_C, BLOCK_K * span)`` to the first ``span`` elements of windows; a mask."""
    span = x.layout.span
    if x.layout.wide:
        span = tl.full((), span, tl.int64)
    c = channel + tl.arange(0, BLOCK_C)
    k = position * span + tl.arange(0, BLOCK_K * x.layout.span)
    end = x.positions * span
    if not x.layout.inner:
        end = _in_units(end, x.layout)
    mask = (k < end)[None, :]
    if x.channels % BLOCK_C != 0:
        mask = mask & (c < x.channels)[:, None]
    if x.layout.wide:
        c = c.to(tl.int64)
    if x.layout.flat:
        # A constant decides: with a choice at run time, Triton 3.6 loses the alignment.
        offsets = k * (_in_units(x.layout.width, x.layout) if x.layout.inner else x.layout.width)
    else:
        row = _in_units(x.layout.columns * span, x.layout)
        line = k // row
        offsets = (
            (k % row) * x.layout.width * (x.layout.window[2] // x.layout.span)
            + (line % x.layout.rows) * _in_units(x.layout.height, x.layout) * x.layout.window[1]
            + (line // x.layout.rows) * _in_units(x.layout.depth, x.layout) * x.layout.window[0]
        )
    start = x.pointer + sample.to(tl.int64) * _in_units(x.layout.sample, x.layout)
    if not x.layout.inner:
        c = c * _in_units(x.layout.channel, x.layout)
    return start + c[:, None] + offsets[None, :], mask


@triton.jit
def _in_units(value, layout):
    """``value``, written so that the compiler knows that it is a multiple of the layout's unit."""
    return value // layout.unit * layout.unit
