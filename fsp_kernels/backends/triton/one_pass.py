"""The loss in one pass, matrix form: one program for each sample of each pair.

For pairs whose residual fits one program's registers (m, n <= 128). The first sweep over the
positions accumulates it. The second writes the gradients. It begins at the end, at what was read
last: where the maps of all programs at work exceed the cache, the rest of them is read again.
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
def fsp_one_pass(pointers, partials, entries, first, COUNT: tl.constexpr, factors):
    """Weighted losses, one for each program, into ``partials``, and all gradients asked for."""
    program = tl.program_id(0)
    start = 0
    for i in tl.static_range(COUNT):
        stop = start + entries[i].samples
        if (program >= start) & (program < stop):
            loss = _sample(pointers[i], entries[i], factors[i], program - start)
            tl.store(partials + first + program, loss)
        start = stop


@triton.jit
def _sample(pointers, entry, factor, sample):
    residual = residual_tile(pointers, entry, sample, 0, 0, 0)
    loss, slope = loss_and_slope(residual, entry.norm)
    scale = factor
    if entry.norm != "column":
        scale = factor * 2
    slope = scaled_slope(slope, scale, entry)
    if pointers[4] is not None:
        _sweep(slope, 1.0, pointers, entry, 1, 0, sample)
    if pointers[5] is not None:
        _sweep(tl.trans(slope), 1.0, pointers, entry, 0, 1, sample)
    if pointers[6] is not None:
        if entry.residual == "ready":
            write_matrix_gradient(slope, pointers, entry, sample, 0, 0)
        else:
            _sweep(slope, teacher_ratio(entry), pointers, entry, 3, 2, sample)
    if pointers[7] is not None:
        _sweep(tl.trans(slope), teacher_ratio(entry), pointers, entry, 2, 3, sample)
    return loss * factor


@triton.jit
def _sweep(slope, ratio, pointers, entry, OTHER: tl.constexpr, OWN: tl.constexpr, sample):
    """Write ``ratio * slope @ other``, the gradient of the map number OWN."""
    K = entry.student_positions
    if OWN >= 2:
        K = entry.teacher_positions
    OWN_C: tl.constexpr = entry.m if OWN % 2 == 0 else entry.n
    OTHER_C: tl.constexpr = entry.n if OWN % 2 == 0 else entry.m
    OWN_BLOCK: tl.constexpr = slope.shape[0]
    OTHER_BLOCK: tl.constexpr = slope.shape[1]
    BLOCK_K: tl.constexpr = entry.block_k
    last = tl.cdiv(K, BLOCK_K) * BLOCK_K - BLOCK_K
    for swept in tl.range(0, K, BLOCK_K, num_stages=entry.stages):
        k = last - swept
        other = load_tile(
            pointers[OTHER],
            entry.layouts[OTHER],
            sample,
            0,
            k,
            OTHER_C,
            K,
            OTHER_BLOCK,
            BLOCK_K,
        )
        gradient = tl.zeros((OWN_BLOCK, BLOCK_K), tl.float32)
        gradient = multiply_computed(
            slope, other, gradient, pointers[OWN].dtype.element_ty, entry.precision
        )
        write_gradient(
            gradient * ratio,
            pointers[OWN],
            entry.layouts[OWN],
            pointers[4 + OWN],
            entry.gradients[OWN],
            sample,
            0,
            k,
            OWN_C,
            K,
            OWN_BLOCK,
            BLOCK_K,
        )
