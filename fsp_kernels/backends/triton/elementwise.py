"""The sums of the partial losses, which end forward, and the scaling of gradients in backward."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from fsp_kernels.backends.devices import raw_stream
from fsp_kernels.backends.triton.arithmetic import cast
from fsp_kernels.backends.triton.launch import Launch
from fsp_kernels.loss_plan import Scaling

BLOCK = 1024  # fp32 elements: 16 bytes for each thread of 8 warps


@triton.jit
def fsp_finish(partials, out, ranges, first, COUNT: tl.constexpr, BLOCK: tl.constexpr):
    """``out[first + i]`` is the sum of the partial losses in range number i; it is not negative.

    A program adds a range in a fixed order. In Gram form rounding errors may be larger than the
    loss, so the sum may be below zero: then the result is zero, or NaN if the sum is -Inf after an
    overflow.
    """
    for i in tl.static_range(COUNT):
        if tl.program_id(0) == i:
            begin, stop = ranges[i]
            total = tl.zeros((BLOCK,), tl.float32)
            for start in range(begin, stop, BLOCK):
                index = start + tl.arange(0, BLOCK)
                total += tl.load(partials + index, index < stop, other=0.0)
            loss = tl.sum(total)
            tl.store(out + first + i, tl.where(loss < 0, 0 * loss, loss))


@triton.jit
def fsp_scale(
    pointers,
    factors,
    sizes,
    places,
    IN_PLACE: tl.constexpr,
    COUNT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """``out = gradient * factor`` for each pair of pointers. In place, a factor of 1 is skipped.

    ``places`` says which of ``factors`` each takes. They are read on the device, so the host need
    not wait for them. Each program works on all tensors.
    """
    value = tl.load(factors + places[0]).to(tl.float32)
    for i in tl.static_range(COUNT):
        gradient, out = pointers[i]
        if i > 0:  # noqa: SIM102  (the compiler decides both)
            if places[i] != places[i - 1]:
                value = tl.load(factors + places[i]).to(tl.float32)
        # A gradient that was held in another dtype must be written even if the factor is 1.
        if (not IN_PLACE) | (gradient.dtype != out.dtype) | (value != 1):
            first = tl.program_id(0).to(tl.int64) * BLOCK  # so that the loop counts in 64 bits
            for start in range(first, sizes[i], tl.num_programs(0) * BLOCK):
                index = start + tl.arange(0, BLOCK)
                mask = index < sizes[i]
                x = tl.load(gradient + index, mask, other=0.0).to(tl.float32)
                tl.store(out + index, cast(x * value, out.dtype.element_ty), mask)


# Enough programs to saturate memory, but so few that starting them for a factor of 1 costs nothing.
_PROGRAMS = 1024
_WARPS = 8
_MOST_TENSORS = 32  # for each launch: its parameters must fit 4 KB


def scale_into(
    scaled: Sequence[Tensor],
    gradients: Sequence[Tensor],
    scaling: Scaling,
    factor: Tensor,
    in_place: bool,
) -> None:
    """See :meth:`fsp_kernels.backends.fused.FusedBackend.scale_into`."""
    device, tensors = factor.device, [*gradients, *scaled, factor]
    for launch in _scale_launches(scaling, in_place, device):
        launch(raw_stream(device), tensors)


@lru_cache(maxsize=1024)
def _scale_launches(
    scaling: Scaling,
    in_place: bool,
    device: torch.device,  # noqa: ARG001  (a compiled kernel belongs to one device)
) -> list[Launch]:
    """Launches that together scale all gradients. Each takes the list of all tensors."""
    count = len(scaling.sizes)
    launches = []
    for start in range(0, count, _MOST_TENSORS):
        sizes = scaling.sizes[start : start + _MOST_TENSORS]
        grid = min(_PROGRAMS, triton.cdiv(max(sizes), BLOCK))
        pointers = tuple((start + i, count + start + i) for i in range(len(sizes)))
        factors = tuple(map(tl.constexpr, scaling.factors[start : start + _MOST_TENSORS]))
        constants = sizes, factors, in_place, len(sizes), BLOCK
        places = pointers, 2 * count
        launches.append(Launch(fsp_scale, grid, _WARPS, *constants, places=places))
    return launches
