"""The loss in Gram form, for few positions and many channels.

With the differences ``p = a - c`` and ``q = b - d`` of residual.py, and ``pp`` for ``p^T p``,

    ||D||^2 = <pp, bb> + 2 <cp, qb> + <cc, qq>

    D b   = p bb + c qb                     D^T a = b (pp + cp^T) + q (cp + cc)
    D d   = p (bb - qb^T) + c (qb - qq)     D^T c = b cp^T + q cc

so only six ``K x K`` blocks are accumulated, and no ``m x n`` object exists. Below, ``x, y`` stand
for ``p, c`` on the side of the first maps and for ``b, q`` on the side of the second maps.

There are three launches. The first writes blocks, each summed over a part of the channels: a
program for each sample would not fill the device. The second adds the parts; it writes the loss and
the blocks that the gradients are products with (operands). The third writes the gradients.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fsp_kernels.backends.triton.arithmetic import cast, multiply, round_to_tf32
from fsp_kernels.backends.triton.residual import (
    GRADIENT,
    MASK,
    counted,
    difference,
    load_map,
    range_of,
    write_map_gradient,
)
from fsp_kernels.plan import GRAM_BLOCKS

BLOCKS = tl.constexpr(GRAM_BLOCKS)  # in this order: pp, cp, cc, bb, qb, qq
# Rows that a program of the second launch adds, of all blocks; several programs share a sample.
COMBINED_ROWS = tl.constexpr(8)


@triton.jit
def fsp_gram(pointers, workspaces, entries, COUNT: tl.constexpr):
    """Write the parts of all blocks, ``(parts, samples, BLOCKS, block_k, block_k)``.

    A program computes one part of one block: all blocks of a side would need too many registers.
    """
    program = tl.program_id(0)
    start = 0
    for i in tl.static_range(COUNT):
        stop = start + BLOCKS * entries[i].parts * entries[i].samples
        if (program >= start) & (program < stop):
            # Programs for the blocks of a part are neighbours, so they find its maps in cache.
            index = (program - start) // BLOCKS
            part = index % entries[i].parts
            sample = index // entries[i].parts
            for block in tl.static_range(BLOCKS):
                if (program - start) % BLOCKS == block:
                    _write_block(pointers[i], workspaces[i], entries[i], block, sample, part)
        start = stop


@triton.jit
def _write_block(pointers, workspace, entry, INDEX: tl.constexpr, sample, part):
    """Write a part of ``x^T x``, ``y^T x`` or ``y^T y`` of one side."""
    SIDE: tl.constexpr = INDEX // 3
    C: tl.constexpr = entry.m if SIDE == 0 else entry.n
    # For sm_100, Triton 3.6 cannot compile the product of a tile with itself, unless the tile is as
    # memory holds it. With one of the two negated it can.
    IS_SQUARE: tl.constexpr = INDEX % 3 != 1
    IS_DIFFERENCE: tl.constexpr = INDEX % 5 == 0
    IS_CHANGED: tl.constexpr = entry.layouts[2 - SIDE].pool != "none" or pointers[MASK] is not None
    NEGATED: tl.constexpr = IS_SQUARE and (IS_DIFFERENCE or IS_CHANGED)
    block = tl.zeros((entry.block_k, entry.block_k), tl.float32)
    begin, end = range_of(part, entry.parts, C, entry.block_m)
    for channel in tl.range(begin, end, entry.block_m, num_stages=entry.stages):
        x, y = _load_sides(pointers, entry, SIDE, sample + entry.first_sample, channel)
        left = x if INDEX % 3 == 0 else y
        right = y if INDEX % 3 == 2 else x
        if NEGATED:
            left = cast(-left.to(tl.float32), left.dtype)  # the interpreter cannot negate bf16
        block = multiply(tl.trans(left), right, block, entry.precision)
    if NEGATED:
        block = -block
    slot = part * entry.samples + sample
    rows = tl.arange(0, entry.block_k)
    tl.store(_row_addresses(workspace, entry, BLOCKS, slot, INDEX, rows), block)


@triton.jit
def fsp_gram_combine(workspaces, partials, entries, places, COUNT: tl.constexpr, factors):
    """Add the parts of some rows of a sample's blocks; write their loss and the operands.

    ``workspaces`` holds for each pair that of the blocks, that of the operands and the counts of
    its mask. The operands of a sample are ``operand_count`` blocks ``(block_k, block_k)``, two for
    each gradient.
    """
    program = tl.program_id(0)
    start = 0
    for i in tl.static_range(COUNT):
        groups: tl.constexpr = entries[i].block_k // COMBINED_ROWS
        stop = start + groups * entries[i].samples
        if (program >= start) & (program < stop):
            index = program - start
            sample = index // groups
            rows = index % groups * COMBINED_ROWS + tl.arange(0, COMBINED_ROWS)
            loss = _combine_rows(workspaces[i], entries[i], factors[i], sample, rows)
            tl.store(partials + places[i] + program - start, loss * factors[i])
        start = stop


@triton.jit
def _combine_rows(workspaces, entry, factor, sample, rows):
    """The loss of some rows, without its factor. Rounding errors may make it negative."""
    blocks, operands, counts = workspaces
    pp = _sum_of_parts(blocks, entry, 0, sample, rows)
    cp = _sum_of_parts(blocks, entry, 1, sample, rows)
    cc = _sum_of_parts(blocks, entry, 2, sample, rows)
    bb = _sum_of_parts(blocks, entry, 3, sample, rows)
    qb = _sum_of_parts(blocks, entry, 4, sample, rows)
    qq = _sum_of_parts(blocks, entry, 5, sample, rows)
    # Scaled before they are multiplied, because the products might overflow.
    inverse = 1.0 / counted(counts, entry.student_positions, sample + entry.first_sample)
    inverse *= inverse
    products = pp * inverse * bb + 2 * (cp * inverse) * qb + cc * inverse * qq
    if operands is not None:
        pc = _sum_of_parts_transposed(blocks, entry, 1, sample, rows)
        bq = _sum_of_parts_transposed(blocks, entry, 4, sample, rows)
        scale = 2 * factor * inverse
        _write_operands(scale, bb, bq, operands, entry, 0, sample, rows)
        _write_operands(scale, pp + cp, pc + cc, operands, entry, 1, sample, rows)
        if entry.operand_count > 4:
            _write_operands(-scale, bb - qb, bq - qq, operands, entry, 2, sample, rows)
            _write_operands(-scale, cp, cc, operands, entry, 3, sample, rows)
    return tl.sum(tl.sum(products, axis=1))


@triton.jit
def _sum_of_parts(blocks, entry, INDEX: tl.constexpr, sample, rows):
    """The sum of the parts of some rows of a block."""
    total = tl.zeros((COMBINED_ROWS, entry.block_k), tl.float32)
    for part in range(entry.parts):
        slot = part * entry.samples + sample
        total += tl.load(_row_addresses(blocks, entry, BLOCKS, slot, INDEX, rows))
    return total


@triton.jit
def _sum_of_parts_transposed(blocks, entry, INDEX: tl.constexpr, sample, columns):
    """The sum of the parts of some columns of a block, transposed."""
    K: tl.constexpr = entry.block_k
    total = tl.zeros((COMBINED_ROWS, entry.block_k), tl.float32)
    for part in range(entry.parts):
        slot = part * entry.samples + sample
        start = blocks + (slot.to(tl.int64) * BLOCKS + INDEX) * (K * K)
        total += tl.load(start + columns[:, None] + tl.arange(0, K)[None, :] * K)
    return total


@triton.jit
def _write_operands(scale, x_rows, y_rows, operands, entry, OWN: tl.constexpr, sample, rows):
    """Write rows of both operands, transposed, for the gradient of the map number OWN."""
    x_rows *= scale
    y_rows *= scale
    if entry.precision == "tf32":
        x_rows = round_to_tf32(x_rows)
        y_rows = round_to_tf32(y_rows)
    tl.store(_row_addresses(operands, entry, entry.operand_count, sample, 2 * OWN, rows), x_rows)
    tl.store(
        _row_addresses(operands, entry, entry.operand_count, sample, 2 * OWN + 1, rows), y_rows
    )


@triton.jit
def fsp_gram_gradients(pointers, workspaces, entries, COUNT: tl.constexpr):
    """Write ``x @ x_block + y @ y_block`` for every gradient. A program has a part of channels."""
    program = tl.program_id(0)
    start = 0
    for i in tl.static_range(COUNT):
        for own in tl.static_range(4):
            if pointers[i][GRADIENT + own] is not None:
                stop = start + entries[i].parts * entries[i].samples
                if (program >= start) & (program < stop):
                    part = (program - start) % entries[i].parts
                    sample = (program - start) // entries[i].parts
                    _write_gradient(pointers[i], workspaces[i], entries[i], own, sample, part)
                start = stop


@triton.jit
def _write_gradient(pointers, operands, entry, OWN: tl.constexpr, sample, part):
    """Write a part of the gradient of the map number OWN."""
    # Stored transposed, so that they are left operands, of which a warp holds only its own rows.
    rows = tl.arange(0, entry.block_k)
    x_block = tl.load(_row_addresses(operands, entry, entry.operand_count, sample, 2 * OWN, rows))
    y_block = tl.load(
        _row_addresses(operands, entry, entry.operand_count, sample, 2 * OWN + 1, rows)
    )
    C: tl.constexpr = entry.m if OWN % 2 == 0 else entry.n
    map_sample = sample + entry.first_sample
    begin, end = range_of(part, entry.parts, C, entry.block_m)
    for channel in tl.range(begin, end, entry.block_m, num_stages=entry.stages):
        x, y = _load_sides(pointers, entry, OWN % 2, map_sample, channel)
        gradient = tl.zeros((entry.block_k, entry.block_m), tl.float32)
        gradient = multiply(x_block, tl.trans(x), gradient, entry.precision)
        gradient = multiply(y_block, tl.trans(y), gradient, entry.precision)
        write_map_gradient(tl.trans(gradient), pointers, entry, OWN, map_sample, channel, 0)


@triton.jit
def _row_addresses(workspace, entry, PER_SAMPLE: tl.constexpr, slot, index, rows):
    """Pointers to rows of the block number ``index`` of a slot, which has ``PER_SAMPLE`` blocks."""
    K: tl.constexpr = entry.block_k
    start = workspace + (slot.to(tl.int64) * PER_SAMPLE + index) * (K * K)
    return start + rows[:, None] * K + tl.arange(0, K)[None, :]


@triton.jit
def _load_sides(pointers, entry, SIDE: tl.constexpr, sample, channel):
    """The tiles ``x, y (block_m, block_k)`` from ``channel`` on."""
    BLOCK_C: tl.constexpr = entry.block_m
    student = load_map(pointers, entry, SIDE, sample, channel, 0, BLOCK_C, entry.block_k)
    teacher = load_map(pointers, entry, SIDE + 2, sample, channel, 0, BLOCK_C, entry.block_k)
    differences = difference(student, teacher, tl.float32, entry.precision)
    if SIDE == 0:
        x, y = differences, teacher
    else:
        x, y = student, differences
    return x, y
