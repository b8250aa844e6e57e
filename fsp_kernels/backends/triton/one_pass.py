"""The loss in one pass, matrix form: one program for each sample of each pair.

It is for pairs whose residual fits one program's registers (m, n <= 128). The first sweep over the
positions accumulates the residual. The second writes the gradients, from the last position to the
first: what was read last is still in cache, even if the maps of all running programs do not fit it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fsp_kernels.backends.triton.arithmetic import multiply_computed
from fsp_kernels.backends.triton.residual import (
    GRADIENT,
    STUDENT_FIRST,
    STUDENT_SECOND,
    TEACHER_FIRST,
    TEACHER_SECOND,
    divisor_of,
    load_map,
    loss_and_slope,
    positions_of,
    residual_tile,
    scaled_slope,
    teacher_ratio,
    write_map_gradient,
    write_matrix_gradient,
)


@triton.jit
def fsp_one_pass(pointers, partials, entries, places, COUNT: tl.constexpr, factors):
    """Write weighted losses, one for each program, to ``partials``, and all wanted gradients.

    The losses of an entry begin at its place.
    """
    program = tl.program_id(0)
    start = 0
    for i in tl.static_range(COUNT):
        stop = start + entries[i].samples
        if (program >= start) & (program < stop):
            loss = _sample_loss(pointers[i], entries[i], factors[i], program - start)
            tl.store(partials + places[i] + program - start, loss)
        start = stop


@triton.jit
def _sample_loss(pointers, entry, factor, sample):
    residual = residual_tile(pointers, entry, sample, 0, 0, 0)
    loss, slope = loss_and_slope(residual, entry.norm)
    scale = factor
    if entry.norm != "column":
        scale = factor * 2
    slope = scaled_slope(slope, scale, divisor_of(pointers, entry, STUDENT_FIRST, sample))
    if pointers[GRADIENT + STUDENT_FIRST] is not None:
        _write_gradient(slope, 1.0, pointers, entry, STUDENT_FIRST, sample)
    if pointers[GRADIENT + STUDENT_SECOND] is not None:
        _write_gradient(tl.trans(slope), 1.0, pointers, entry, STUDENT_SECOND, sample)
    if pointers[GRADIENT + TEACHER_FIRST] is not None:
        if entry.residual == "ready":
            write_matrix_gradient(slope, pointers, entry, sample, 0, 0)
        else:
            ratio = teacher_ratio(pointers, entry, sample)
            _write_gradient(slope, ratio, pointers, entry, TEACHER_FIRST, sample)
    if pointers[GRADIENT + TEACHER_SECOND] is not None:
        ratio = teacher_ratio(pointers, entry, sample)
        _write_gradient(tl.trans(slope), ratio, pointers, entry, TEACHER_SECOND, sample)
    return loss * factor


@triton.jit
def _write_gradient(slope, ratio, pointers, entry, OWN: tl.constexpr, sample):
    """Write ``ratio * slope @ other``, the gradient of the map number OWN."""
    K = positions_of(entry, OWN)
    BLOCK_K: tl.constexpr = entry.block_k
    dtype: tl.constexpr = pointers[OWN].dtype.element_ty
    last = tl.cdiv(K, BLOCK_K) * BLOCK_K - BLOCK_K
    for done in tl.range(0, K, BLOCK_K, num_stages=entry.stages):
        k = last - done
        other = load_map(pointers, entry, OWN ^ 1, sample, 0, k, slope.shape[1], BLOCK_K)
        gradient = tl.zeros((slope.shape[0], BLOCK_K), tl.float32)
        gradient = multiply_computed(slope, other, gradient, dtype, entry.precision)
        write_map_gradient(gradient * ratio, pointers, entry, OWN, sample, 0, k)
