"""Kernel arguments from a map and its strides (``Map`` in csrc/types.h); the dtype of products."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fsp_kernels.backends.axes import axes_of
from fsp_kernels.backends.cuda.extension import module, scalar_of
from fsp_kernels.plan import HALF


def map_spec(
    slot: int,
    x: Tensor,
    size: Sequence[int] | None = None,
    pool: str = "none",
) -> Any:
    """The description of a map or gradient ``(B, C, *spatial)`` with any strides.

    ``size``: the spatial size that kernels pool the map to, if they do.
    """
    strides = x.stride()
    axes = axes_of(x.shape, strides, size)
    channel, position = strides[1], axes.strides[2]
    channels_inner = channel < position
    inner, outer = (channel, position) if channels_inner else (position, channel)
    line_bytes = [t * x.element_size() for t in (strides[0], outer)]
    return module().Map(
        slot=slot,
        scalar=scalar_of(x.dtype),
        strides=(strides[0], channel, *axes.strides),
        rows=axes.sizes[1],
        columns=axes.sizes[2],
        window=axes.windows,
        pool=getattr(module().Pool, "none" if axes.windows == (1, 1, 1) else pool),
        flat=axes.flat,
        channels_inner=channels_inner,
        unit=math.gcd(16, *line_bytes) if axes.flat and inner == 1 else 1,
    )


def matrix_spec(slot: int, x: Tensor) -> Any:
    """The description of a matrix ``(B, m, n)``, as a map of m channels and n positions."""
    return map_spec(slot, x)


def operand_of(dtypes: Sequence[torch.dtype]) -> torch.dtype:
    """The dtype that maps are multiplied in: their own, or fp32 if these differ."""
    return dtypes[0] if len(set(dtypes)) == 1 else torch.float32


def splits(dtypes: Sequence[torch.dtype], precision: str) -> bool:
    """Whether fp32 operands take three products of TF32. One is exact for half-precision maps."""
    return precision == "tf32x3" and any(dtype not in HALF for dtype in dtypes)
