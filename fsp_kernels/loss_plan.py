"""What planning takes and gives: what there is to know of tensors, and how a loss is evaluated.

``plan.py`` makes the one of the other.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

Residual = Literal["difference", "direct"]
Form = Literal["matrix", "gram"]
Evaluation = Literal["chunks", "one pass", "tiles", "recomputed tiles"]

# The most elements of a pooling window that kernels take: their code unrolls it.
GPU_WINDOW = 64


class MapSpec(NamedTuple):
    """What checks and planning need to know of a tensor; hashable, unlike the tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    layout: torch.layout
    requires_grad: bool

    @classmethod
    def of(cls, tensor: Tensor) -> MapSpec:
        return cls(tensor.shape, tensor.dtype, tensor.device, tensor.layout, tensor.requires_grad)

    @property
    def positions(self) -> int:
        return math.prod(self.shape[2:])


PairSpec = tuple[MapSpec, MapSpec]
TeacherSpec = PairSpec | tuple[MapSpec]  # one entry: a ready FSP matrix (B, m, n)


@dataclass(frozen=True)
class MapPlan:
    """One feature map of a pair: what it is pooled to and what becomes of its gradient.

    ``pooled_size`` is ``None`` where the map keeps its spatial size. ``gradient_dtype`` is what the
    gradient is held in between forward and backward (``None``: no gradient wanted): the map's own
    dtype, except that fp16 waits in fp32. Its true size is about ``1/(B K)``, which fp16 would
    flush to zero before a loss scale arriving in backward could rescue it.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    pooled_size: tuple[int, ...] | None
    gradient_dtype: torch.dtype | None

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def gradient_bytes(self) -> int:
        dtype = self.gradient_dtype
        return 0 if dtype is None else math.prod(self.shape) * dtype.itemsize

    @property
    def positions(self) -> int:
        return math.prod(self.pooled_size or self.shape[2:])

    @cached_property
    def fused_windows(self) -> bool:
        """Whether kernels can pool while they read: by windows of one size, not too large."""
        sizes = list(zip(self.shape[2:], self.pooled_size or (), strict=False))
        window = math.prod(full // part for full, part in sizes)
        return all(full % part == 0 for full, part in sizes) and window <= GPU_WINDOW


@dataclass(frozen=True)
class PairPlan:
    """How one pair is evaluated.

    ``teacher`` holds two maps, or one when it is a ready matrix. ``evaluation`` is ``"chunks"``
    for the torch backend. Fused kernels hold a sample's residual or Gram blocks in one program
    (``"one pass"``), or store it by tiles (``"tiles"``), ``parts`` programs to a tile, or compute
    each tile where it is needed (``"recomputed tiles"``). Work proceeds ``samples`` at a time.
    ``passes`` is 1 when these are still at hand for the second sweep and 2 when the maps come from
    memory twice.
    """

    batch: int
    channels: tuple[int, int]  # (m, n)
    student: tuple[MapPlan, ...]
    teacher: tuple[MapPlan, ...]
    residual: Residual
    form: Form
    evaluation: Evaluation
    parts: int
    passes: int
    samples: int
    flops: int
    workspace_bytes: int

    @property
    def maps(self) -> tuple[MapPlan, ...]:
        return self.student + self.teacher

    @property
    def positions(self) -> int:
        return self.student[0].positions

    @property
    def bytes_moved(self) -> int:
        """Bytes that must cross the memory bus: maps ``passes`` times, gradients once."""
        reads = self.passes if self.wants_gradients else 1
        return reads * sum(m.bytes for m in self.maps) + self.gradient_bytes

    @property
    def gradient_bytes(self) -> int:
        return sum(m.gradient_bytes for m in self.maps)

    @property
    def wants_gradients(self) -> bool:
        return any(m.gradient_dtype is not None for m in self.maps)


@dataclass(frozen=True)
class LossPlan:
    """The evaluation of one :func:`fsp_kernels.fsp_loss` call; ``print`` it to read it.

    ``compute_dtype`` is what products are accumulated in and the dtype of the loss.
    """

    pairs: tuple[PairPlan, ...]
    pool: str
    norm: str
    device: str
    backend: str
    compute_dtype: torch.dtype

    def __hash__(self) -> int:
        return self._hash

    @cached_property
    def _hash(self) -> int:
        """Plans are keys of what is prepared for them, and every call looks that up."""
        return hash(self._fields)

    @property
    def _fields(self) -> tuple[Any, ...]:
        return tuple(getattr(self, field.name) for field in fields(self))

    def __reduce__(self) -> tuple[Any, ...]:
        return LossPlan, self._fields  # without what is cached: a hash holds in one process

    @property
    def flops(self) -> int:
        """Floating-point operations of the matrix products (a multiply-add is two)."""
        return sum(p.flops for p in self.pairs)

    @property
    def bytes_moved(self) -> int:
        """Bytes read and written in main memory, at least."""
        return sum(p.bytes_moved for p in self.pairs)

    @property
    def gradient_bytes(self) -> int:
        """Bytes of the gradients that forward leaves for backward."""
        return sum(p.gradient_bytes for p in self.pairs)

    @property
    def workspace_bytes(self) -> int:
        """Bytes of temporary memory at any one time, beyond the gradients."""
        # The torch backend takes pair after pair; fused kernels take all of them in one launch.
        total = max if self.backend == "torch" else sum
        return total(p.workspace_bytes for p in self.pairs)

    @property
    def extra_bytes(self) -> int:
        """Peak memory of a call beyond its inputs: gradients and workspace."""
        return self.gradient_bytes + self.workspace_bytes

    @cached_property
    def maps(self) -> tuple[MapPlan, ...]:
        """Every map in the order backends take them: pair by pair, student before teacher."""
        return tuple(m for pair in self.pairs for m in pair.maps)

    @cached_property
    def wanted_dtypes(self) -> tuple[torch.dtype, ...]:
        """The dtypes of the maps that want a gradient."""
        return tuple(m.dtype for m in self.maps if m.gradient_dtype is not None)

    @cached_property
    def fused_windows(self) -> bool:
        """Whether kernels can pool all maps while they read them."""
        return all(m.fused_windows for m in self.maps)

    def spread(self, gradients: Sequence[Tensor]) -> list[Tensor | None]:
        """The gradients in the places of the maps that want them, ``None`` in the others."""
        given = iter(gradients)
        return [None if m.gradient_dtype is None else next(given) for m in self.maps]

    def __str__(self) -> str:
        head = (
            f"fsp_loss on {self.device} by the {self.backend} backend, norm={self.norm!r}, "
            f"pool={self.pool!r}, accumulating in {_name(self.compute_dtype)}"
        )
        columns = ("pair", "B", "m x n", "K", "evaluation", "chunk", "GFLOP", "MB", "extra MB")
        rows = [columns, *(_row(i, p) for i, p in enumerate(self.pairs))]
        amounts = _amounts(self.flops, self.bytes_moved, self.extra_bytes)
        rows.append(("all", "", "", "", "", "", *amounts))
        widths = [max(len(row[i]) for row in rows) for i in range(len(columns))]
        lines = ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) for row in rows]
        return "\n".join([head, *(line.rstrip() for line in lines)])

    __repr__ = __str__


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _row(index: int, pair: PairPlan) -> tuple[str, ...]:
    return (
        str(index),
        str(pair.batch),
        "{} x {}".format(*pair.channels),
        str(pair.positions),
        f"{pair.residual}, {pair.form} form, {_how(pair)}",
        f"{pair.samples} samples",
        *_amounts(pair.flops, pair.bytes_moved, pair.gradient_bytes + pair.workspace_bytes),
    )


def _how(pair: PairPlan) -> str:
    if pair.evaluation == "chunks":
        return "one pass" if pair.passes == 1 else "two passes"
    return pair.evaluation if pair.parts == 1 else f"{pair.evaluation} in {pair.parts} parts"


def _amounts(flops: int, bytes_moved: int, extra_bytes: int) -> tuple[str, str, str]:
    return f"{flops / 1e9:.3f}", f"{bytes_moved / 1e6:.2f}", f"{extra_bytes / 1e6:.2f}"
