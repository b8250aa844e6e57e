"""The loss for many channels and few positions where no residual is stored, in one launch.

A program owns some channels of one map, and with them their gradient over all positions. It goes
over the other map's channels, computes the residual tile of each block and adds what it gives the
gradient at once. Every tile is computed twice, once for each side, and never written.

Sides are alike but for their names: an entry for the second map has the maps of a pair swapped.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fsp_kernels.backends.triton.arithmetic import multiply_computed
from fsp_kernels.backends.triton.maps import load_tile, write_gradient
from fsp_kernels.backends.triton.residual import (
    loss_and_slope,
    residual_tile,
    scaled_slope,
    teacher_ratio,
    write_matrix_gradient,
)


@triton.jit
def fsp_recompute(pointers, partials, entries, first, COUNT: tl.constexpr, factors):
    """Losses into ``partials`` by the entries that ``finish``, and the gradients of a and c."""
    program = tl.program_id(0)
    start = 0
    for i in tl.static_range(COUNT):
        rows = tl.cdiv(entries[i].m, entries[i].block_m)
        stop = start + entries[i].samples * rows
        if (program >= start) & (program < stop):
            index = program - start
            row = index % rows * entries[i].block_m
            loss = _rows_of_sample(pointers[i], entries[i], factors[i], index // rows, row)
            if entries[i].finishes:
                tl.store(partials + first + program, loss)
        start = stop


@triton.jit
def _rows_of_sample(pointers, entry, factor, sample, row):
    scale = 2 * factor
    total = 0.0
    student = _zeros(entry, entry.chunks[0])
    teacher = _zeros(entry, entry.chunks[1])
    for column in range(0, entry.n, entry.block_n):
        slope = residual_tile(pointers, entry, sample, row, column, 0)
        if entry.finishes:
            loss, slope = loss_and_slope(slope, entry.norm)
            total += loss
        slope = scaled_slope(slope, scale, entry)
        student = _add(student, slope, pointers, entry, 1, sample, column, entry.student_positions)
        teacher = _add(teacher, slope, pointers, entry, 3, sample, column, entry.teacher_positions)
        if entry.residual == "ready" and pointers[6] is not None:
            write_matrix_gradient(slope, pointers, entry, sample, row, column)
    _write(student, 1.0, pointers, entry, 0, sample, row, entry.student_positions)
    _write(teacher, teacher_ratio(entry), pointers, entry, 2, sample, row, entry.teacher_positions)
    return total * factor


@triton.jit
def _zeros(entry, CHUNKS: tl.constexpr):
    """A gradient ``(block_m, K)`` as blocks ``(block_m, block_k)``."""
    blocks = ()
    for _ in tl.static_range(CHUNKS):
        blocks += (tl.zeros((entry.block_m, entry.block_k), tl.float32),)
    return blocks


@triton.jit
def _add(blocks, slope, pointers, entry, OTHER: tl.constexpr, sample, column, positions):
    """The blocks with ``slope @ other`` added, ``other (block_n, K)`` from ``column`` on."""
    result = ()
    for i in tl.static_range(len(blocks)):
        other = load_tile(
            pointers[OTHER],
            entry.layouts[OTHER],
            sample,
            column,
            i * entry.block_k,
            entry.n,
            positions,
            entry.block_n,
            entry.block_k,
        )
        result += (multiply_computed(slope, other, blocks[i], entry.precision),)
    return result


@triton.jit
def _write(blocks, ratio, pointers, entry, OWN: tl.constexpr, sample, row, positions):
    for i in tl.static_range(len(blocks)):
        write_gradient(
            blocks[i] * ratio,
            pointers[OWN],
            entry.layouts[OWN],
            pointers[4 + OWN],
            entry.gradients[OWN],
            sample,
            row,
            i * entry.block_k,
            entry.m,
            positions,
            entry.block_m,
            entry.block_k,
        )
