"""The loss for maps whose residual is too large for one program: it is computed in tiles.

The first launch writes slopes, the loss's derivatives by ``a b^T``, to a workspace: in bf16 if the
maps are bf16, else in fp32. If the tiles would not fill the device, several programs share a tile,
each with a part of the positions. In this case, or if the norm needs whole columns, the first
launch writes residuals, and a second launch adds the parts and computes loss and slopes. The last
launch writes the gradients.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from fsp_kernels.backends.triton.arithmetic import cast_finite, multiply_computed
from fsp_kernels.backends.triton.maps import (
    INT32_LIMIT,
    MapLayout,
    MapRef,
    load_tile,
    write_gradient,
)
from fsp_kernels.backends.triton.residual import (
    STUDENT_FIRST,
    MatrixLayout,
    counted,
    divisor_of,
    loss_and_slope,
    residual_tile,
    scaled_slope,
    write_matrix_gradient,
)

LARGEST_INT32 = tl.constexpr(INT32_LIMIT)


class GradientEntry(NamedTuple):
    """One gradient as a product: ``slope (own, other) @ map (other, K)``, for each sample."""

    own: MapLayout
    gradient: MapLayout
    other: MapLayout
    slope: MatrixLayout
    samples: int
    first_sample: int  # of the maps; it is the first sample of the workspace
    own_channels: Any  # constant, as all below but the positions
    other_channels: Any
    positions: int
    ratio: float  # the factor of the product, as far as it does not depend on a mask
    precision: Any
    block_own: Any
    block_other: Any
    block_k: Any
    stages: Any


@triton.jit
def fsp_residual(pointers, workspaces, partials, entries, places, COUNT: tl.constexpr, factors):
    """Write the losses of tiles, and their slopes to the workspaces ``(samples, m, n)``.

    A pair without a workspace has no slopes. A pair without ``finishes`` has no losses here, and
    its workspace ``(parts, samples, m, n)`` gets ``D / K`` instead of the slopes.
    """
    program = tl.program_id(0)
    start = 0
    for i in tl.static_range(COUNT):
        rows = tl.cdiv(entries[i].m, entries[i].block_m)
        columns = tl.cdiv(entries[i].n, entries[i].block_n)
        stop = start + entries[i].samples * (rows * columns * entries[i].parts)
        if (program >= start) & (program < stop):
            # Programs for the tiles of a sample are neighbours, so they find its maps in cache.
            index = program - start
            row = index // columns % rows * entries[i].block_m
            column = index % columns * entries[i].block_n
            part = index // (columns * rows) % entries[i].parts
            sample = index // (columns * rows * entries[i].parts)
            map_sample = sample + entries[i].first_sample
            tile = residual_tile(pointers[i], entries[i], map_sample, row, column, part)
            slot = part * entries[i].samples + sample
            if entries[i].finishes:
                loss, slope = loss_and_slope(tile, entries[i].norm)
                tl.store(partials + places[i] + program - start, loss * factors[i])
                divisor = divisor_of(pointers[i], entries[i], STUDENT_FIRST, map_sample)
                tile = scaled_slope(slope, 2 * factors[i], divisor)
            if workspaces[i] is not None:
                _store_tile(tile, workspaces[i], entries[i], slot, row, column)
        start = stop


@triton.jit
def fsp_combine(workspaces, partials, entries, places, COUNT: tl.constexpr, factors):
    """Add the parts of a tile, or of a block of columns; write its loss and slopes.

    ``workspaces`` holds for each pair that of the parts, that of the slopes and the counts of the
    student's mask. The slopes may be written over the first part.
    """
    program = tl.program_id(0)
    start = 0
    for i in tl.static_range(COUNT):
        rows = tl.cdiv(entries[i].m, entries[i].block_m) if entries[i].norm != "column" else 1
        columns = tl.cdiv(entries[i].n, entries[i].block_n)
        stop = start + entries[i].samples * rows * columns
        if (program >= start) & (program < stop):
            index = program - start
            row = index // columns % rows * entries[i].block_m
            column = index % columns * entries[i].block_n
            sample = index // (columns * rows)
            if entries[i].norm == "column":
                loss = _combine_columns(workspaces[i], entries[i], factors[i], sample, column)
            else:
                loss = _combine_tile(workspaces[i], entries[i], factors[i], sample, row, column)
            tl.store(partials + places[i] + program - start, loss * factors[i])
        start = stop


@triton.jit
def _combine_tile(workspace, entry, factor, sample, row, column):
    parts, slopes, counts = workspace
    loss, slope = loss_and_slope(_sum_of_parts(parts, entry, sample, row, column), entry.norm)
    if slopes is not None:
        divisor = counted(counts, entry.student_positions, sample + entry.first_sample)
        slope = scaled_slope(slope, 2 * factor, divisor)
        _store_tile(slope, slopes, entry, sample, row, column)
    return loss


@triton.jit
def _combine_columns(workspace, entry, factor, sample, column):
    parts, slopes, counts = workspace
    squares = tl.zeros((entry.block_n,), tl.float32)
    for row in range(0, entry.m, entry.block_m):
        total = _sum_of_parts(parts, entry, sample, row, column)
        squares += tl.sum(total * total, axis=0)
        if slopes is not None:
            _store_tile(total, parts, entry, sample, row, column)
    lengths = tl.sqrt_rn(squares)
    if slopes is not None:
        # As in PyTorch, the subgradient of a zero column is zero.
        inverse = tl.where(lengths == 0, 0.0, 1.0 / lengths)
        divisor = counted(counts, entry.student_positions, sample + entry.first_sample)
        tl.debug_barrier()  # the tiles are read again, maybe by other threads
        for row in range(0, entry.m, entry.block_m):
            addresses, mask = _workspace_tile(parts, entry, sample, row, column)
            slope = tl.load(addresses, mask, other=0.0) * inverse[None, :]
            _store_tile(scaled_slope(slope, factor, divisor), slopes, entry, sample, row, column)
    return tl.sum(lengths)


@triton.jit
def _sum_of_parts(parts, entry, sample, row, column):
    """The sum of the parts of a tile."""
    total = tl.zeros((entry.block_m, entry.block_n), tl.float32)
    for part in range(entry.parts):
        slot = part * entry.samples + sample
        addresses, mask = _workspace_tile(parts, entry, slot, row, column)
        total += tl.load(addresses, mask, other=0.0)
    return total


@triton.jit
def fsp_gradients(pointers, entries, COUNT: tl.constexpr):
    """Write ``ratio * slope @ other`` for every gradient. A program has one tile of a gradient.

    ``pointers`` holds for each one the map, the gradient, the other map, the slope and the mask.
    If the networks have different masks, there are the counts that multiply the ratio of a
    teacher's gradient and those that divide it, else ``None``.
    """
    program = tl.program_id(0)
    start = 0
    for i in tl.static_range(COUNT):
        rows = tl.cdiv(entries[i].own_channels, entries[i].block_own)
        columns = tl.cdiv(entries[i].positions, entries[i].block_k)
        stop = start + entries[i].samples * rows * columns
        if (program >= start) & (program < stop):
            index = program - start
            row = index % rows * entries[i].block_own
            column = index // rows % columns * entries[i].block_k
            sample = index // (rows * columns)
            _gradient_tile(pointers[i], entries[i], sample, row, column)
        start = stop


@triton.jit
def _gradient_tile(pointers, entry, sample, row, column):
    own, gradient, other, slope, own_mask, numerators, denominators = pointers
    map_sample = sample + entry.first_sample
    result = tl.zeros((entry.block_own, entry.block_k), tl.float32)
    rows = row + tl.arange(0, entry.block_own)
    slope += sample.to(tl.int64) * entry.slope.sample
    wide: tl.constexpr = entry.own_channels * entry.other_channels > LARGEST_INT32
    if wide:
        rows = rows.to(tl.int64)
    for start in tl.range(0, entry.other_channels, entry.block_other, num_stages=entry.stages):
        columns = start + tl.arange(0, entry.block_other)
        if wide:
            columns = columns.to(tl.int64)
        mask = (rows < entry.own_channels)[:, None] & (columns < entry.other_channels)[None, :]
        offsets = rows[:, None] * entry.slope.row + columns[None, :] * entry.slope.column
        x = tl.load(slope + offsets, mask, other=0.0)
        y = load_tile(
            MapRef(other, entry.other, entry.other_channels, entry.positions, own_mask),
            map_sample,
            start,
            column,
            entry.block_other,
            entry.block_k,
        )
        result = multiply_computed(x, y, result, own.dtype.element_ty, entry.precision)
    ratio = entry.ratio
    if numerators is not None:
        ratio *= tl.load(numerators + map_sample)
    if denominators is not None:
        ratio /= tl.load(denominators + map_sample)
    write_gradient(
        result * ratio,
        MapRef(own, entry.own, entry.own_channels, entry.positions, own_mask),
        MapRef(gradient, entry.gradient, entry.own_channels, entry.positions, None),
        map_sample,
        row,
        column,
    )


@triton.jit
def fsp_matrix_gradients(pointers, entries, COUNT: tl.constexpr):
    """Write the gradient of every ready matrix, from its slope. A program has one tile."""
    program = tl.program_id(0)
    start = 0
    for i in tl.static_range(COUNT):
        rows = tl.cdiv(entries[i].m, entries[i].block_m)
        columns = tl.cdiv(entries[i].n, entries[i].block_n)
        stop = start + entries[i].samples * rows * columns
        if (program >= start) & (program < stop):
            index = program - start
            row = index // columns % rows * entries[i].block_m
            column = index % columns * entries[i].block_n
            sample = index // (columns * rows)
            maps, workspace = pointers[i]
            addresses, mask = _workspace_tile(workspace, entries[i], sample, row, column)
            slope = tl.load(addresses, mask, other=0.0)
            map_sample = sample + entries[i].first_sample
            write_matrix_gradient(slope, maps, entries[i], map_sample, row, column)
        start = stop


@triton.jit
def _workspace_tile(workspace, entry, slot, row, column):
    """Pointers to a tile of the matrix number ``slot`` of a workspace, and their mask."""
    rows = (row + tl.arange(0, entry.block_m))[:, None]
    columns = (column + tl.arange(0, entry.block_n))[None, :]
    if entry.m * entry.n > LARGEST_INT32:
        rows = rows.to(tl.int64)
    start = workspace + slot.to(tl.int64) * (entry.m * entry.n)
    return start + rows * entry.n + columns, (rows < entry.m) & (columns < entry.n)


@triton.jit
def _store_tile(tile, workspace, entry, slot, row, column):
    """Write an fp32 tile to the matrix number ``slot``, in the workspace's dtype."""
    addresses, mask = _workspace_tile(workspace, entry, slot, row, column)
    if workspace.dtype.element_ty == tl.bfloat16:
        tl.store(addresses, cast_finite(tile), mask)
    else:
        tl.store(addresses, tile, mask)
