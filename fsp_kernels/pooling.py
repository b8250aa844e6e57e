"""Pooling of one map of a pair to the other's size, and its gradient, with PyTorch's kernels.

So windows, ties and NaN are treated as by PyTorch's adaptive pooling. On a CPU these kernels visit
the windows of a contiguous map one by one. A channels-last copy or, for integer ratios, operations
on whole strided slices give the same result several times faster.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

aten = torch.ops.aten

CACHE_STRIDE = 4096  # addresses this many bytes apart share a set of a CPU's first-level cache
# PyTorch transposes in blocks from this many channels and positions on. Planes whose size is a
# multiple of CACHE_STRIDE always have the positions.
BLOCK_CHANNELS = 60


def match_spatial(first: Tensor, second: Tensor, mode: str) -> tuple[Tensor, Tensor]:
    """Each map pooled to the smaller of the two sizes, axis by axis, with PyTorch's autograd."""
    size = [min(p, q) for p, q in zip(first.shape[2:], second.shape[2:], strict=True)]
    adaptive_pool = getattr(F, f"adaptive_{mode}_pool{len(size)}d")
    first, second = (
        x if list(x.shape[2:]) == size else adaptive_pool(x, size) for x in (first, second)
    )
    return first, second


def pool(x: Tensor, size: Sequence[int], mode: str, indexed: bool) -> tuple[Tensor, Tensor | None]:
    """Pool ``x (B, C, *spatial)`` to ``(B, C, *size)``.

    Returns the pooled map and, if ``indexed`` and ``mode`` is ``"max"``, the flat index of each
    maximum within its spatial plane, which :func:`unpool` needs.
    """
    contiguous_on_cpu = x.device.type == "cpu" and x.stride(1) != 1
    window = _integer_window(x, size) if contiguous_on_cpu else None
    if mode == "avg":
        if window is not None:
            return _reduce_slices(x, window, torch.add).div_(math.prod(window)), None
        x, planar_size = _planar(x, size)
        average = aten._adaptive_avg_pool2d if x.ndim == 4 else aten._adaptive_avg_pool3d
        return average(x, planar_size), None
    if window is not None and not indexed:
        return _reduce_slices(x, window, torch.maximum), None
    if contiguous_on_cpu:
        x = _channels_last(x)
    x, planar_size = _planar(x, size)
    maximum = aten.adaptive_max_pool2d if x.ndim == 4 else aten.adaptive_max_pool3d
    return maximum(x, planar_size)


def unpool(
    gradient: Tensor, out: Tensor, size: Sequence[int], mode: str, indices: Tensor | None
) -> None:
    """Fill ``out (B, C, *spatial)`` from the pooled map's gradient ``(B, C, prod(size))``."""
    if mode == "max" and indices is not None:
        # Windows may overlap, so sums are formed in the gradient's dtype, which may be wider.
        flat = out if out.dtype == gradient.dtype else torch.empty_like(out, dtype=gradient.dtype)
        flat = flat.zero_().flatten(2)  # a copy if the strides need one
        flat.scatter_add_(2, indices.flatten(2), gradient)
        if flat.data_ptr() != out.data_ptr():
            out.copy_(flat.view(out.shape))
        return
    x, planar_size = _planar(out, size)
    backward = (
        aten._adaptive_avg_pool2d_backward if x.ndim == 4 else aten._adaptive_avg_pool3d_backward
    )
    gradient = gradient.reshape(*x.shape[:2], *planar_size)
    out.copy_(backward(gradient, x.to(gradient.dtype)).reshape(out.shape))


def _channels_last(x: Tensor) -> Tensor:
    """A channels-last copy of a contiguous map.

    If the size of a plane is a multiple of ``CACHE_STRIDE``, e.g. of 32 x 32 elements, the same
    position of different channels shares a set of the cache, which holds only a few of them. Sample
    by sample PyTorch transposes in blocks, which avoids this.
    """
    batch, channels, *spatial = x.shape
    plane = math.prod(spatial) * x.element_size()
    if plane % CACHE_STRIDE or channels < BLOCK_CHANNELS:
        return x.flatten(2).mT.contiguous().mT.view(x.shape)
    rows = x.new_empty(batch, math.prod(spatial), channels)
    for row, sample in zip(rows.unbind(), x.flatten(2).unbind(), strict=True):
        row.copy_(sample.T)
    return rows.mT.view(x.shape)


def _reduce_slices(
    x: Tensor, window: Sequence[int], operation: Callable[[Tensor, Tensor], Tensor]
) -> Tensor:
    """Combine the elements of each window, axis by axis; the contiguous axis comes last."""
    for axis, w in enumerate(window, start=2):
        total, *rest = x.unflatten(axis, (-1, w)).unbind(axis + 1)
        for part in rest:
            total = operation(total, part)
        x = total
    return x


def _planar(x: Tensor, size: Sequence[int]) -> tuple[Tensor, list[int]]:
    """Add an axis to a map of one spatial axis, for which PyTorch has no pooling kernels.

    Other maps are returned as they are.
    """
    return (x.unsqueeze(2), [1, *size]) if len(size) == 1 else (x, list(size))


def _integer_window(x: Tensor, size: Sequence[int]) -> list[int] | None:
    """The window of the plain pooling that equals the adaptive one; ``None`` if there is none."""
    if any(full % part for full, part in zip(x.shape[2:], size, strict=True)):
        return None
    return [full // part for full, part in zip(x.shape[2:], size, strict=True)]
