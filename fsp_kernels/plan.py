"""Shapes in, evaluation out: how a loss is going to be computed, decided before any data is read.

Student ``a = F1_S (m, K)``, ``b = F2_S (n, K)``; teacher ``c = F1_T``, ``d = F2_T``. All that loss
and gradients need is the residual ``D = a b^T - c d^T`` (times ``1/K``). It has two expressions,

* *direct*: ``a b^T - c d^T``;
* *difference*: ``p b^T + c q^T`` with ``p = a - c``, ``q = b - d``. The same flops, but the
  subtraction happens before rounding can hurt, so the gradient survives as student nears teacher;

and two forms,

* *matrix*: ``D`` itself is accumulated, ``O(m n K)``;
* *gram*: with ``P = [p c]``, ``Q = [b q]`` it is ``||D||^2 = <P^T P, Q^T Q>``, so only ``K x K``
  blocks are formed, ``O((m + n) K^2)``: cheaper for few positions and many channels.

Everything here is a pure function of metadata, so it is cached and can be tested for any device
without having one. :func:`fsp_kernels.explain` shows the outcome.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, NamedTuple

import torch
from torch import Tensor

Residual = Literal["difference", "direct"]
Form = Literal["matrix", "gram"]

HALF = (torch.float16, torch.bfloat16)

# What the inputs, gradients and workspace of one chunk may occupy. A chunk is read by its first
# sweep and read again by its second, so it should still be in the last-level cache by then; below
# that, larger chunks are better, because each one pays a dozen operator calls. On a GPU the torch
# backend chunks to bound the workspace, not for locality.
CHUNK_BYTES = {"cpu": 32 << 20, "cuda": 256 << 20}
# But never fewer samples than this: a batched product gives each of a CPU's threads whole samples,
# which on 256 x 256 x 16384 is a fifth faster than sharing one.
CHUNK_SAMPLES = {"cpu": 4, "cuda": 1}
# A tile of residual that one GPU program can keep in registers, and the most positions whose Gram
# blocks it can.
GPU_TILE_CHANNELS = 128
GPU_GRAM_POSITIONS = 64


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


@dataclass(frozen=True)
class PairPlan:
    """How one pair is evaluated.

    ``teacher`` holds two maps, or one when it is a ready matrix. Work proceeds ``samples`` at a
    time. ``passes`` is 1 when a chunk is still at hand for its second sweep and 2 when the maps
    come from memory twice.
    """

    batch: int
    channels: tuple[int, int]  # (m, n)
    student: tuple[MapPlan, ...]
    teacher: tuple[MapPlan, ...]
    residual: Residual
    form: Form
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
        return max(p.workspace_bytes for p in self.pairs)

    @property
    def extra_bytes(self) -> int:
        """Peak memory of a call beyond its inputs: gradients and workspace."""
        return self.gradient_bytes + self.workspace_bytes

    @property
    def maps(self) -> tuple[MapPlan, ...]:
        """Every map in the order backends take them: pair by pair, student before teacher."""
        return tuple(m for pair in self.pairs for m in pair.maps)

    @property
    def wanted_dtypes(self) -> list[torch.dtype]:
        """The dtypes of the maps that want a gradient."""
        return [m.dtype for m in self.maps if m.gradient_dtype is not None]

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


def pooled_size(first: Sequence[int], second: Sequence[int]) -> tuple[int, ...]:
    """The spatial size both maps of a pair are brought to: the smaller, axis by axis."""
    return tuple(min(p, q) for p, q in zip(first, second, strict=True))


@lru_cache(maxsize=1024)
def plan_loss(
    student: tuple[PairSpec, ...],
    teacher: tuple[TeacherSpec, ...],
    pool: str,
    norm: str,
    backend: str,
) -> LossPlan:
    """Plan a loss over checked inputs; ``MapSpec.requires_grad`` says which gradients it wants."""
    specs = [spec for pair in (*student, *teacher) for spec in pair]
    device = specs[0].device.type
    compute_dtype = accumulation_dtype(*(spec.dtype for spec in specs))
    pairs = tuple(
        _plan_pair(s, t, pool, norm, device, compute_dtype)
        for s, t in zip(student, teacher, strict=True)
    )
    return LossPlan(pairs, pool, norm, device, backend, compute_dtype)


def accumulation_dtype(*dtypes: torch.dtype) -> torch.dtype:
    """fp64 if any input is, else fp32."""
    return torch.float64 if torch.float64 in dtypes else torch.float32


def _plan_pair(
    student: PairSpec,
    teacher: TeacherSpec,
    pool: str,
    norm: str,
    device: str,
    compute_dtype: torch.dtype,
) -> PairPlan:
    batch, m = student[0].shape[:2]
    n = student[1].shape[1]
    student_maps, teacher_maps = _plan_maps(student), _plan_maps(teacher)
    maps = (*student_maps, *teacher_maps)
    k = student_maps[0].positions
    subtractable = len(teacher) == 2 and teacher_maps[0].positions == k
    flops: dict[Form, int] = {"matrix": _matrix_flops(m, n, student_maps, teacher_maps)}
    if subtractable and norm != "column":  # the column norm needs the columns of D
        flops["gram"] = _gram_flops(m, n, k, maps)
    form = _choose_form(flops, m, n, k, device)
    # Tensor cores would round the difference of half-precision maps, while their products are
    # exact. A CPU widens them first, so there the difference is exact and the better choice.
    rounds = device != "cpu" and all(plan.dtype in HALF for plan in maps)
    # The Gram form of plain maps, instead of differences, cancels.
    difference = form == "gram" or (subtractable and not rounds)
    residual: Residual = "difference" if difference else "direct"

    blocks = (8 if any(p.gradient_dtype for p in maps) else 6) * k * k if form == "gram" else m * n
    workspace = blocks * compute_dtype.itemsize + sum(
        _map_workspace(plan, pool, form, compute_dtype, subtracted=difference and i < 2)
        for i, plan in enumerate(maps)
    )
    per_sample = workspace + sum(p.bytes + p.gradient_bytes for p in maps) // batch
    kind = "cpu" if device == "cpu" else "cuda"
    fitting = CHUNK_BYTES[kind] // per_sample
    chunks = math.ceil(batch / max(CHUNK_SAMPLES[kind], fitting))
    samples = math.ceil(batch / chunks)  # of equal size: a small last chunk costs as many calls
    return PairPlan(
        batch=batch,
        channels=(m, n),
        student=student_maps,
        teacher=teacher_maps,
        residual=residual,
        form=form,
        passes=_passes(form, m, n, device, fits=fitting >= CHUNK_SAMPLES[kind]),
        samples=samples,
        flops=batch * flops[form],
        workspace_bytes=samples * workspace,
    )


def _plan_maps(specs: TeacherSpec) -> tuple[MapPlan, ...]:
    size = pooled_size(specs[0].shape[2:], specs[-1].shape[2:])
    return tuple(
        MapPlan(
            shape=tuple(spec.shape),
            dtype=spec.dtype,
            pooled_size=None if tuple(spec.shape[2:]) == size or len(specs) == 1 else size,
            gradient_dtype=gradient_dtype(spec.dtype) if spec.requires_grad else None,
        )
        for spec in specs
    )


def gradient_dtype(dtype: torch.dtype) -> torch.dtype:
    """What a gradient waits in between forward and backward; see :class:`MapPlan`."""
    return torch.float32 if dtype == torch.float16 else dtype


def _matrix_flops(m: int, n: int, student: Sequence[MapPlan], teacher: Sequence[MapPlan]) -> int:
    """Per sample: one product per network for the residual, one per gradient of a map."""
    maps = [*student, *teacher] if len(teacher) == 2 else [*student]
    products = [pair[0].positions for pair in (student, teacher) if len(pair) == 2]
    products += [plan.positions for plan in maps if plan.gradient_dtype is not None]
    return 2 * m * n * sum(products)


def _gram_flops(m: int, n: int, k: int, maps: Sequence[MapPlan]) -> int:
    """Per sample: six ``K x K`` blocks, and for each gradient two products ``(C, K) (K, K)``."""
    gradients = sum(4 * plan.shape[1] for plan in maps if plan.gradient_dtype is not None)
    return (6 * (m + n) + gradients) * k * k


def _choose_form(flops: dict[Form, int], m: int, n: int, k: int, device: str) -> Form:
    if "gram" not in flops:
        return "matrix"
    if device != "cpu" and k > GPU_GRAM_POSITIONS:
        return "matrix"
    if device != "cpu" and max(m, n) <= GPU_TILE_CHANNELS:
        return "matrix"  # memory-bound either way; one accumulator is simpler than six
    return "gram" if flops["gram"] < flops["matrix"] else "matrix"


def _passes(form: Form, m: int, n: int, device: str, fits: bool) -> int:
    if device == "cpu":
        return 1 if fits else 2
    one_program = form == "gram" or max(m, n) <= GPU_TILE_CHANNELS
    return 1 if one_program else 2


def _map_workspace(
    plan: MapPlan, pool: str, form: Form, compute_dtype: torch.dtype, subtracted: bool
) -> int:
    """Temporary bytes one map needs for each sample of a chunk, as the torch backend works."""
    width = compute_dtype.itemsize
    full, pooled = math.prod(plan.shape[1:]) * width, plan.shape[1] * plan.positions * width
    wanted, as_it_is = plan.gradient_dtype is not None, plan.gradient_dtype == compute_dtype
    total = 0 if plan.dtype == compute_dtype else full
    if plan.pooled_size is not None:
        total += pooled
        if wanted and pool == "max":  # a channels-last copy and the indices of the maxima
            total += full + plan.shape[1] * plan.positions * torch.int64.itemsize
    in_place = wanted and as_it_is and plan.pooled_size is None
    if subtracted and (form == "gram" or not in_place):  # else it is held in the gradient's place
        total += pooled
    if wanted and not in_place:
        total += pooled
    return total


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _row(index: int, pair: PairPlan) -> tuple[str, ...]:
    return (
        str(index),
        str(pair.batch),
        "{} x {}".format(*pair.channels),
        str(pair.positions),
        f"{pair.residual}, {pair.form} form, " + ("one pass" if pair.passes == 1 else "two passes"),
        f"{pair.samples} samples",
        *_amounts(pair.flops, pair.bytes_moved, pair.gradient_bytes + pair.workspace_bytes),
    )


def _amounts(flops: int, bytes_moved: int, extra_bytes: int) -> tuple[str, str, str]:
    return f"{flops / 1e9:.3f}", f"{bytes_moved / 1e6:.2f}", f"{extra_bytes / 1e6:.2f}"
