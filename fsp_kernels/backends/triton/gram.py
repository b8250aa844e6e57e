"""The loss in one pass, Gram form: few positions, many channels; one program for each sample.

With the differences ``p = a - c`` and ``q = b - d`` of residual.py, and ``pp`` for ``p^T p``,

    ||D||^2 = <pp, bb> + 2 <cp, qb> + <cc, qq>

    D b   = p bb + c qb                     D^T a = b (pp + cp^T) + q (cp + cc)
    D d   = p (bb - qb^T) + c (qb - qq)     D^T c = b cp^T + q cc

so only six ``K x K`` blocks are accumulated, and no ``m x n`` object exists. Below, ``x, y`` stand
for ``p, c`` on the side of the first maps and for ``b, q`` on that of the second. Blocks that are
not being worked on wait in memory, 16 KB each that stay in cache: they would take more registers
than there are.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fsp_kernels.backends.triton.arithmetic import multiply, round_to_tf32
from fsp_kernels.backends.triton.maps import load_tile, write_gradient
from fsp_kernels.backends.triton.residual import difference


@triton.jit
def fsp_gram(pointers, scratches, partials, entries, first, COUNT: tl.constexpr, factors):
    """Weighted losses, one for each program, into ``partials``, and all gradients asked for.

    ``scratches`` hold ``kept`` blocks ``(block_k, block_k)`` for each sample: three of the first
    side, and the two of each gradient.
    """
    program = tl.program_id(0)
    start = 0
    for i in tl.static_range(COUNT):
        stop = start + entries[i].samples
        if (program >= start) & (program < stop):
            loss = _sample(pointers[i], scratches[i], entries[i], factors[i], program - start)
            tl.store(partials + first + program, loss)
        start = stop


@triton.jit
def _sample(pointers, scratch, entry, factor, sample):
    pp, cp, cc = _blocks(pointers, entry, 0, sample)
    tl.store(_kept(scratch, entry, 0, sample), pp)
    tl.store(_kept(scratch, entry, 1, sample), cp)
    tl.store(_kept(scratch, entry, 2, sample), cc)
    bb, qb, qq = _blocks(pointers, entry, 1, sample)
    tl.debug_barrier()  # what is kept is read by other threads than wrote it
    pp = tl.load(_kept(scratch, entry, 0, sample))
    cp = tl.load(_kept(scratch, entry, 1, sample))
    cc = tl.load(_kept(scratch, entry, 2, sample))
    # Scaled before products, which may overflow without.
    inverse = 1.0 / entry.student_positions
    inverse *= inverse
    products = pp * inverse * bb + 2 * (cp * inverse) * qb + cc * inverse * qq
    loss = tl.sum(tl.sum(products, axis=1))
    # Rounding errors may be larger than the loss. An overflow becomes NaN here, not zero.
    loss = tl.where(loss < 0, 0 * loss, loss)
    scale = 2 * factor * inverse
    if pointers[4] is not None:
        _keep(scale, bb, qb, scratch, entry, 0, sample)
    if pointers[5] is not None:
        _keep(scale, pp + tl.trans(cp), cp + cc, scratch, entry, 1, sample)
    if pointers[6] is not None:
        _keep(-scale, bb - tl.trans(qb), qb - qq, scratch, entry, 2, sample)
    if pointers[7] is not None:
        _keep(-scale, tl.trans(cp), cc, scratch, entry, 3, sample)
    tl.debug_barrier()
    if pointers[4] is not None:
        _sweep(pointers, scratch, entry, 0, sample)
    if pointers[5] is not None:
        _sweep(pointers, scratch, entry, 1, sample)
    if pointers[6] is not None:
        _sweep(pointers, scratch, entry, 2, sample)
    if pointers[7] is not None:
        _sweep(pointers, scratch, entry, 3, sample)
    return loss * factor


@triton.jit
def _blocks(pointers, entry, SIDE: tl.constexpr, sample):
    """``x^T x``, ``y^T x`` and ``y^T y``, each ``(block_k, block_k)``, of one side."""
    xx = tl.zeros((entry.block_k, entry.block_k), tl.float32)
    yx = tl.zeros((entry.block_k, entry.block_k), tl.float32)
    yy = tl.zeros((entry.block_k, entry.block_k), tl.float32)
    C: tl.constexpr = entry.m if SIDE == 0 else entry.n
    for channel in tl.range(0, C, entry.block_m, num_stages=entry.stages):
        x, y = _load_sides(pointers, entry, SIDE, C, sample, channel)
        xx = multiply(tl.trans(x), x, xx, entry.precision)
        yx = multiply(tl.trans(y), x, yx, entry.precision)
        yy = multiply(tl.trans(y), y, yy, entry.precision)
    return xx, yx, yy


@triton.jit
def _keep(scale, x_block, y_block, scratch, entry, OWN: tl.constexpr, sample):
    """Write the scaled blocks of the gradient of the map number OWN, transposed, as operands."""
    x_block *= scale
    y_block *= scale
    if entry.precision == "tf32":
        x_block = round_to_tf32(x_block)
        y_block = round_to_tf32(y_block)
    tl.store(_kept(scratch, entry, 3 + 2 * OWN, sample), tl.trans(x_block))
    tl.store(_kept(scratch, entry, 4 + 2 * OWN, sample), tl.trans(y_block))


@triton.jit
def _kept(scratch, entry, index, sample):
    """Pointers to a block of a sample."""
    K: tl.constexpr = entry.block_k
    k = tl.arange(0, K)
    start = scratch + (sample.to(tl.int64) * entry.kept + index) * (K * K)
    return start + k[:, None] * K + k[None, :]


@triton.jit
def _sweep(pointers, scratch, entry, OWN: tl.constexpr, sample):
    """Write ``x @ x_block + y @ y_block``, the gradient of the map number OWN."""
    SIDE: tl.constexpr = OWN % 2
    C: tl.constexpr = entry.m if SIDE == 0 else entry.n
    for channel in tl.range(0, C, entry.block_m, num_stages=entry.stages):
        x, y = _load_sides(pointers, entry, SIDE, C, sample, channel)
        # Transposed, so that the blocks are left operands: of these a warp holds its own rows only.
        x_block = tl.load(_kept(scratch, entry, 3 + 2 * OWN, sample))
        y_block = tl.load(_kept(scratch, entry, 4 + 2 * OWN, sample))
        gradient = tl.zeros((entry.block_k, entry.block_m), tl.float32)
        gradient = multiply(x_block, tl.trans(x), gradient, entry.precision)
        gradient = multiply(y_block, tl.trans(y), gradient, entry.precision)
        write_gradient(
            tl.trans(gradient),
            pointers[OWN],
            entry.layouts[OWN],
            pointers[4 + OWN],
            entry.gradients[OWN],
            sample,
            channel,
            0,
            C,
            entry.student_positions,
            entry.block_m,
            entry.block_k,
        )


@triton.jit
def _load_sides(pointers, entry, SIDE: tl.constexpr, C: tl.constexpr, sample, channel):
    """The tiles ``x, y (block_m, block_k)`` from ``channel`` on."""
    student = _load(pointers, entry, SIDE, C, sample, channel)
    teacher = _load(pointers, entry, SIDE + 2, C, sample, channel)
    apart = difference(student, teacher, tl.float32, entry.precision)
    if SIDE == 0:
        x, y = apart, teacher
    else:
        x, y = student, apart
    return x, y


@triton.jit
def _load(pointers, entry, INDEX: tl.constexpr, C: tl.constexpr, sample, channel):
    return load_tile(
        pointers[INDEX],
        entry.layouts[INDEX],
        sample,
        channel,
        0,
        C,
        entry.student_positions,
        entry.block_m,
        entry.block_k,
    )
