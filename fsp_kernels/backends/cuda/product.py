"""FSP matrices and their derivatives, by the first launch of csrc/tiles.cuh without a teacher.

``G = F1 F2^T / K`` and ``dF1 = dG F2 / K`` use one kernel with different strides. If the tiles of
a result would not fill the device, several blocks share a tile. PyTorch then adds their parts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from fsp_kernels.backends.cuda.extension import index_of, module, scalar_of
from fsp_kernels.backends.cuda.maps import map_spec, matrix_spec, operand_of, splits
from fsp_kernels.backends.devices import fp32_precision, raw_stream
from fsp_kernels.plan import parts_of


def batched_product(x: Tensor, y: Tensor, out: Tensor, positions: int) -> None:
    """``out = x @ y / positions``: ``(B, M, R), (B, R, N) -> (B, M, N)``."""
    key = (x.shape, y.shape[2], x.stride(), y.stride(), out.stride(), x.dtype, y.dtype)
    launches, parts = _prepared_product(*key, fp32_precision(), index_of(x))
    result = out
    if parts > 1:
        result = out.new_empty((parts, *out.shape), dtype=torch.float32)
    addresses = [x.data_ptr(), y.data_ptr(), result.data_ptr()]
    launches(raw_stream(x.device), addresses, [1 / positions])
    if parts > 1:
        out.copy_(result.sum(0))


@lru_cache(maxsize=1024)
def _prepared_product(
    shape: torch.Size,
    columns: int,
    x_strides: tuple[int, ...],
    y_strides: tuple[int, ...],
    out_strides: tuple[int, ...],
    x_dtype: torch.dtype,
    y_dtype: torch.dtype,
    precision: str,
    device: int,
) -> tuple[Any, int]:
    """The launch of a product, and into how many parts it splits the sum."""
    batch, m, r = shape
    operand = operand_of([x_dtype, y_dtype])
    tile = module().residual_tile(scalar_of(operand))
    tiles = batch * math.ceil(m / tile) * math.ceil(columns / tile)
    parts = parts_of(tiles, r)

    def meta(size: Sequence[int], strides: Sequence[int], dtype: torch.dtype) -> Tensor:
        return torch.empty_strided(tuple(size), tuple(strides), dtype=dtype, device="meta")

    x = meta((batch, m, r), x_strides, x_dtype)
    y = meta((batch, r, columns), y_strides, y_dtype).mT
    if parts > 1:
        out = torch.empty(batch, m, columns, device="meta")
    else:
        out = meta((batch, m, columns), out_strides, torch.promote_types(x_dtype, y_dtype))
    pair = module().Pair(
        maps=[map_spec(0, x), map_spec(1, y), None, None],
        gradients=[None] * 4,
        out=matrix_spec(2, out),
        out_part=batch * m * columns,
        samples=batch,
        first_sample=0,
        channels=(m, columns),
        positions=(r, r),
        parts=parts,
        residual=module().Residual.plain,
        norm=module().Norm.squares,
        split=splits([x_dtype, y_dtype], precision),
        finishes=False,
        index=0,
        factor=1.0,
    )
    launches = module().LaunchSequence(device, f"{batch} products ({m}, {r}) x ({r}, {columns})")
    launches.add_residual(scalar_of(operand), [pair])
    return launches, parts
