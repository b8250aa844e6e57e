"""The loss for maps whose residual no single program can hold: tile by tile, then the gradients.

The first launch writes the residual to a workspace; where the tiles would not fill the device,
several programs share one, each with a part of the positions. Then, or where the norm needs whole
columns, a second launch adds the parts and takes the norm. The last writes the gradients.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from fsp_kernels.backends.triton.arithmetic import multiply_computed
from fsp_kernels.backends.triton.maps import INT32_LIMIT, MapLayout, load_tile, write_gradient
from fsp_kernels.backends.triton.residual import (
    MatrixLayout,
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
    first_sample: int  # in the maps; the workspace begins at it
    own_channels: Any  # constant, as all below but the positions
    other_channels: Any
    positions: int
    precision: Any
    block_own: Any
    block_other: Any
    block_k: Any
    stages: Any


@triton.jit
def fsp_residual(pointers, workspaces, partials, entries, first, COUNT: tl.constexpr, factors):
    """``D / K`` to the workspaces, ``(parts, samples, m, n)`` each, and the losses of the tiles.

    Without a workspace, the loss alone; without ``finishes``, the residual alone.
    """
    program = tl.program_id(0)
    start = 0
    for i in tl.static_range(COUNT):
        rows = tl.cdiv(entries[i].m, entries[i].block_m)
        columns = tl.cdiv(entries[i].n, entries[i].block_n)
        stop = start + entries[i].samples * (rows * columns * entries[i].parts)
        if (program >= start) & (program < stop):
            # The tiles of a sample are neighbours, so that they find its maps in cache.
            index = program - start
            row = index // columns % rows * entries[i].block_m
            column = index % columns * entries[i].block_n
            part = index // (columns * rows) % entries[i].parts
            sample = index // (columns * rows * entries[i].parts)
            map_sample = sample + entries[i].first_sample
            tile = residual_tile(pointers[i], entries[i], map_sample, row, column, part)
            if workspaces[i] is not None:
                slot = part * entries[i].samples + sample
                addresses, mask = _workspace_tile(workspaces[i], entries[i], slot, row, column)
                tl.store(addresses, tile, mask)
            if entries[i].finishes:
                loss, _ = loss_and_slope(tile, entries[i].norm)
                tl.store(partials + first + program, loss * factors[i])
        start = stop


@triton.jit
def fsp_combine(workspaces, partials, entries, first, COUNT: tl.constexpr, factors):
    """Add the parts of a block of columns and take its norm; the slope replaces the first part."""
    program = tl.program_id(0)
    start = 0
    for i in tl.static_range(COUNT):
        columns = tl.cdiv(entries[i].n, entries[i].block_n)
        stop = start + entries[i].samples * columns
        if (program >= start) & (program < stop):
            index = program - start
            column = index % columns * entries[i].block_n
            loss = _combine(workspaces[i], entries[i], index // columns, column)
            tl.store(partials + first + program, loss * factors[i])
        start = stop


@triton.jit
def _combine(workspace, entry, sample, column):
    squares = tl.zeros((entry.block_n,), tl.float32)
    for row in range(0, entry.m, entry.block_m):
        total = tl.zeros((entry.block_m, entry.block_n), tl.float32)
        for part in range(entry.parts):
            slot = part * entry.samples + sample
            addresses, mask = _workspace_tile(workspace, entry, slot, row, column)
            total += tl.load(addresses, mask, other=0.0)
        squares += tl.sum(total * total, axis=0)
        addresses, mask = _workspace_tile(workspace, entry, sample, row, column)
        tl.store(addresses, total, mask)
    if entry.norm == "column":
        lengths = tl.sqrt_rn(squares)
        # The subgradient of a zero column is zero, as PyTorch has it.
        inverse = tl.where(lengths == 0, 0.0, 1.0 / lengths)
        tl.debug_barrier()  # the tiles are read again, perhaps by other threads
        for row in range(0, entry.m, entry.block_m):
            addresses, mask = _workspace_tile(workspace, entry, sample, row, column)
            tl.store(addresses, tl.load(addresses, mask, other=0.0) * inverse[None, :], mask)
        squares = lengths
    return tl.sum(squares)


@triton.jit
def fsp_gradients(pointers, entries, COUNT: tl.constexpr, factors):
    """``(factor * slope) @ other`` for every gradient; a tile of channels and positions each."""
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
            _gradient_tile(pointers[i], entries[i], factors[i], sample, row, column)
        start = stop


@triton.jit
def _gradient_tile(pointers, entry, factor, sample, row, column):
    own, gradient, other, slope = pointers
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
        x = tl.load(slope + offsets, mask, other=0.0) * factor
        y = load_tile(
            other,
            entry.other,
            map_sample,
            start,
            column,
            entry.other_channels,
            entry.positions,
            entry.block_other,
            entry.block_k,
        )
        result = multiply_computed(x, y, result, entry.precision)
    write_gradient(
        result,
        own,
        entry.own,
        gradient,
        entry.gradient,
        map_sample,
        row,
        column,
        entry.own_channels,
        entry.positions,
        entry.block_own,
        entry.block_k,
    )


@triton.jit
def fsp_matrix_gradients(pointers, entries, COUNT: tl.constexpr, factors):
    """``-factor * slope`` to the gradient of every ready matrix; a tile each."""
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
            slope = scaled_slope(tl.load(addresses, mask, other=0.0), factors[i], entries[i])
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
