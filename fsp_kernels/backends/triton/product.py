"""FSP matrices and their derivatives: a batched matrix product of operands of any strides.

``G = F1 F2^T / K`` and ``dF1 = dG F2 / K`` use one kernel with different strides. If the tiles of
a result would not fill the device, several programs share a tile. PyTorch then adds their parts.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fsp_kernels.backends.devices import fp32_precision, raw_stream
from fsp_kernels.backends.triton.arithmetic import cast, multiply
from fsp_kernels.backends.triton.configurations import configuration_of
from fsp_kernels.backends.triton.launch import Launch, device_family
from fsp_kernels.backends.triton.maps import INT32_LIMIT
from fsp_kernels.plan import HALF, parts_of


class Operand(NamedTuple):
    """Strides of ``(B, rows, columns)``, in elements."""

    batch: int
    row: int
    column: int


class Product(NamedTuple):
    """``out (B, M, N) = x (B, M, R) @ y (B, R, N) / divisor``.

    The kernel is compiled for each value of the fields marked constant.
    """

    x: Operand
    y: Operand
    out: Operand
    M: int
    N: int
    R: int
    parts: int  # of the sum over R
    part: int  # stride from one part of the result to the next
    wide: Any  # constant: offsets within a sample need 64 bits
    precision: Any  # constant, as all below
    block_m: Any
    block_n: Any
    block_r: Any
    stages: Any


@triton.jit
def fsp_product(x, y, out, product, divisor):
    """Write one tile of one sample, summed over one part; parts follow one another in ``out``."""
    tiles_n = tl.cdiv(product.N, product.block_n)
    tiles = tl.cdiv(product.M, product.block_m) * tiles_n
    program = tl.program_id(0)
    tile = program % tiles
    part = program // tiles % product.parts
    batch = (program // tiles // product.parts).to(tl.int64)
    rows = tile // tiles_n * product.block_m + tl.arange(0, product.block_m)
    columns = tile % tiles_n * product.block_n + tl.arange(0, product.block_n)
    inner = tl.arange(0, product.block_r)
    row_mask, column_mask = rows < product.M, columns < product.N
    if product.wide:
        rows, columns, inner = rows.to(tl.int64), columns.to(tl.int64), inner.to(tl.int64)
    x += batch * product.x.batch
    y += batch * product.y.batch
    span = tl.cdiv(tl.cdiv(product.R, product.block_r), product.parts) * product.block_r
    begin = part * span
    end = tl.minimum(begin + span, product.R)
    result = tl.zeros((product.block_m, product.block_n), tl.float32)
    for r in tl.range(begin, end, product.block_r, num_stages=product.stages):
        mask = r + inner < product.R
        x_tile = tl.load(
            x + rows[:, None] * product.x.row + (r + inner)[None, :] * product.x.column,
            row_mask[:, None] & mask[None, :],
            other=0.0,
        )
        y_tile = tl.load(
            y + (r + inner)[:, None] * product.y.row + columns[None, :] * product.y.column,
            mask[:, None] & column_mask[None, :],
            other=0.0,
        )
        result = multiply(x_tile, y_tile, result, product.precision)
    # Rounded as in the loss, so that the residual with a ready matrix of equal maps is zero.
    result = result * (1.0 / divisor)
    out += batch * product.out.batch + part.to(tl.int64) * product.part
    tl.store(
        out + rows[:, None] * product.out.row + columns[None, :] * product.out.column,
        cast(result, out.dtype.element_ty),
        row_mask[:, None] & column_mask[None, :],
    )


def batched_product(x: Tensor, y: Tensor, out: Tensor, divisor: float) -> None:
    """``out = x @ y / divisor`` on the current device: ``(B, M, R), (B, R, N) -> (B, M, N)``."""
    strides = x.stride(), y.stride(), out.stride()
    key = (tuple(x.shape), y.shape[2], strides, x.dtype, y.dtype, divisor)
    launch, parts = _prepared(*key, fp32_precision(), x.device)
    stream = raw_stream(x.device)
    if parts == 1:
        launch(stream, (x, y, out))
        return
    partial = out.new_empty((*out.shape[:1], parts, *out.shape[1:]), dtype=torch.float32)
    launch(stream, (x, y, partial))
    out.copy_(partial.sum(1))


def prepare(
    shape: tuple[int, int, int],
    columns: int,
    strides: tuple[tuple[int, ...], ...],
    x_dtype: torch.dtype,
    y_dtype: torch.dtype,
    divisor: float,
    precision: str,
    device: torch.device,  # noqa: ARG001  (a compiled kernel belongs to the current device)
) -> tuple[Launch, int]:
    """The launch of a product, and into how many parts it splits the sum."""
    batch, m, r = shape
    halves = x_dtype in HALF and y_dtype in HALF
    operands = zip(strides[:2], (x_dtype, y_dtype), strict=True)
    aligned = all(t * dtype.itemsize % 16 == 0 for each, dtype in operands for t in each if t != 1)
    kind = "half" if halves else precision
    c = configuration_of("product", kind, device_family(), "aligned" if aligned else "odd")
    assert c is not None
    tiles = batch * triton.cdiv(m, c.block_m) * triton.cdiv(columns, c.block_n)
    parts = parts_of(tiles, r)
    x, y, out = (Operand(*s) for s in strides)
    if parts > 1:
        out = Operand(parts * m * columns, columns, 1)
    reach = max(
        (m - 1) * x.row + (r - 1) * x.column,
        (r - 1) * y.row + (columns - 1) * y.column,
        (m - 1) * out.row + (columns - 1) * out.column,
    )
    constant = tl.constexpr
    product = Product(
        x=x,
        y=y,
        out=out,
        M=m,
        N=columns,
        R=r,
        parts=parts,
        part=m * columns,
        wide=constant(reach > INT32_LIMIT),
        precision=constant("tf32" if halves else precision),
        block_m=constant(c.block_m),
        block_n=constant(c.block_n),
        block_r=constant(c.block_k),
        stages=constant(c.stages),
    )
    return Launch(fsp_product, tiles * parts, c.warps, product, divisor), parts


_prepared = lru_cache(maxsize=1024)(prepare)
