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
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Literal, NamedTuple

import torch
from torch import Tensor

Residual = Literal["difference", "direct"]
Form = Literal["matrix", "gram"]
Evaluation = Literal["chunks", "one pass", "tiles", "recomputed tiles"]

HALF = (torch.float16, torch.bfloat16)

# What the inputs, gradients and workspace of one chunk may occupy. A chunk is read by its first
# sweep and read again by its second, so it should still be in the last-level cache by then; below
# that, larger chunks are better, because each one pays a dozen operator calls. On a GPU the torch
# backend chunks to bound the workspace, not for locality.
CHUNK_BYTES = {"cpu": 32 << 20, "cuda": 256 << 20}
# But never fewer samples than this: a batched product gives each of a CPU's threads whole samples,
# which on 256 x 256 x 16384 is a fifth faster than sharing one.
CHUNK_SAMPLES = {"cpu": 4, "cuda": 1}
# Bytes of both differences of a chunk that the torch backend forms whole on a CPU, and of the
# blocks it takes larger ones in: writing fresh memory takes longer than reading the maps, and a
# block stays in cache. Smaller blocks make smaller products.
DIFFERENCES_WHOLE, DIFFERENCES_BLOCK = 16 << 20, 4 << 20
# What a flop of the Gram form costs a CPU, in flops of the matrix form: its products are smaller.
GRAM_FLOP_COST = 1.1
# A residual that one GPU program can keep in registers: in fp32 it is an operand of two TF32 terms,
# and takes twice as many. The most positions whose Gram blocks a program can keep, and the most for
# which a tile's share of a gradient fits beside the tile.
GPU_TILE_CHANNELS = 128
GPU_TILE_CHANNELS_FP32 = 64
GPU_GRAM_POSITIONS = 64
GPU_RECOMPUTE_POSITIONS = 256
# Programs that fill a large GPU (two for each of about 130 multiprocessors): with fewer tiles the
# positions are split. A constant, not the device's, so that results do not depend on the device.
GPU_PROGRAMS = 256
GPU_WINDOW = 64  # elements of a pooling window, which a kernel's code unrolls
GPU_PART_POSITIONS = 512  # and no part is shorter than this


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


@dataclass(frozen=True, eq=False)  # planning is cached, so a plan is equal to itself alone
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
        next(_pair_plans(s, t, pool, norm, device, compute_dtype, backend))
        for s, t in zip(student, teacher, strict=True)
    )
    return LossPlan(pairs, pool, norm, device, backend, compute_dtype)


def alternatives(
    student: PairSpec, teacher: TeacherSpec, pool: str, norm: str, backend: str
) -> list[LossPlan]:
    """Every evaluation that a backend has for a pair, each as a plan; the planned one first."""
    dtypes = [spec.dtype for spec in (*student, *teacher)]
    device, compute_dtype = student[0].device.type, accumulation_dtype(*dtypes)
    plans = _pair_plans(student, teacher, pool, norm, device, compute_dtype, backend)
    return [LossPlan((pair,), pool, norm, device, backend, compute_dtype) for pair in plans]


def fewest_flops(student: PairSpec, teacher: TeacherSpec, norm: str = "frobenius") -> int:
    """Of the forms a pair's loss can take, the flops of the one with fewest."""
    flops = _flops(_plan_maps(student), _plan_maps(teacher), norm)
    return student[0].shape[0] * min(flops.values())


def accumulation_dtype(*dtypes: torch.dtype) -> torch.dtype:
    """fp64 if any input is, else fp32."""
    return torch.float64 if torch.float64 in dtypes else torch.float32


def _pair_plans(
    student: PairSpec,
    teacher: TeacherSpec,
    pool: str,
    norm: str,
    device: str,
    compute_dtype: torch.dtype,
    backend: str,
) -> Iterator[PairPlan]:
    """The ways to evaluate a pair, best first."""
    fused = backend != "torch"
    batch, m = student[0].shape[:2]
    n = student[1].shape[1]
    student_maps, teacher_maps = _plan_maps(student), _plan_maps(teacher)
    maps = (*student_maps, *teacher_maps)
    k = student_maps[0].positions
    flops = _flops(student_maps, teacher_maps, norm)
    # Tensor cores would round the difference of half-precision maps, while their products are
    # exact. A CPU widens them first, so there the difference is exact and the better choice.
    averaged = any(plan.pooled_size for plan in maps) and pool == "avg"  # no longer half precision
    multiplied = maps if len(teacher) == 2 else student_maps
    exact = all(plan.dtype in HALF for plan in multiplied) and not (fused and averaged)
    rounds = exact and (fused or device != "cpu")
    tile = GPU_TILE_CHANNELS if exact or not fused else GPU_TILE_CHANNELS_FP32
    for form in _forms(flops, m, n, k, None if device == "cpu" and not fused else tile):
        # The Gram form of plain maps, instead of differences, cancels.
        difference = form == "gram" or (_subtractable(student_maps, teacher_maps) and not rounds)
        if fused:
            evaluations = _fused_evaluations(m, n, maps, pool, norm, form, exact, tile, backend)
        else:
            evaluations = _chunked_evaluations(
                m, n, k, maps, pool, form, difference, device, compute_dtype
            )
        for how in evaluations:
            yield PairPlan(
                batch=batch,
                channels=(m, n),
                student=student_maps,
                teacher=teacher_maps,
                residual="difference" if difference else "direct",
                form=form,
                evaluation=how.evaluation,
                parts=how.parts,
                passes=how.passes,
                samples=how.samples,
                flops=batch * (flops[form] + how.extra_flops),
                workspace_bytes=how.workspace_bytes,
            )


def _subtractable(student: Sequence[MapPlan], teacher: Sequence[MapPlan]) -> bool:
    """Whether a difference of the two networks' maps exists."""
    return len(teacher) == 2 and teacher[0].positions == student[0].positions


class _Evaluation(NamedTuple):
    """What :class:`PairPlan` says of a pair's evaluation."""

    evaluation: Evaluation
    samples: int
    passes: int
    workspace_bytes: int
    parts: int = 1
    extra_flops: int = 0  # for each sample


def _chunked_evaluations(
    m: int,
    n: int,
    k: int,
    maps: Sequence[MapPlan],
    pool: str,
    form: Form,
    difference: bool,
    device: str,
    compute_dtype: torch.dtype,
) -> Iterator[_Evaluation]:
    """The torch backend's, which differ in the samples of a chunk."""
    batch = maps[0].shape[0]
    blocks = (8 if any(p.gradient_dtype for p in maps) else 6) * k * k if form == "gram" else m * n
    workspace = blocks * compute_dtype.itemsize + sum(
        _map_workspace(plan, pool, form, compute_dtype, subtracted=difference and i < 2)
        for i, plan in enumerate(maps)
    )
    per_sample = workspace + sum(p.bytes + p.gradient_bytes for p in maps) // batch
    kind = "cpu" if device == "cpu" else "cuda"
    fitting = CHUNK_BYTES[kind] // per_sample
    passes = _passes(form, m, n, device, fits=fitting >= CHUNK_SAMPLES[kind])
    chosen = _equal_chunks(batch, max(CHUNK_SAMPLES[kind], fitting))
    nowhere = (
        form == "matrix" and difference and not any(_in_place(x, compute_dtype) for x in maps[:2])
    )
    column = (m + n) * compute_dtype.itemsize  # of both differences, for each sample
    for samples in dict.fromkeys((chosen, batch, min(batch, CHUNK_SAMPLES[kind]))):
        total = samples * workspace
        if nowhere:
            total -= samples * column * (k - difference_block(device, k, samples * column))
        yield _Evaluation("chunks", samples, passes, total)


def difference_block(device: str, positions: int, column: int) -> int:
    """Positions that the torch backend subtracts at a time; ``column``: bytes of one of them."""
    if device != "cpu" or positions * column <= DIFFERENCES_WHOLE:
        return positions
    return max(1, min(positions, DIFFERENCES_BLOCK // column))


def _in_place(plan: MapPlan, compute_dtype: torch.dtype) -> bool:
    """Whether products can be written where the gradient is going to be."""
    return plan.gradient_dtype == compute_dtype and plan.pooled_size is None


def _fused_evaluations(
    m: int,
    n: int,
    maps: Sequence[MapPlan],
    pool: str,
    norm: str,
    form: Form,
    exact: bool,
    tile: int,
    backend: str,
) -> Iterator[_Evaluation]:
    batch = maps[0].shape[0]
    networks = maps[::2] if len(maps) == 4 else maps[:1]  # the first map of each there is
    pooled = batch * sum(_pooled_workspace(plan, pool) for plan in maps)
    if form == "gram":
        kept = 0  # on chip, but Triton's compiler cannot keep the blocks there
        if backend == "triton":
            k = max(16, 1 << (networks[0].positions - 1).bit_length())  # as blocks, powers of two
            kept = batch * _gram_blocks(maps) * k * k * torch.float32.itemsize
        yield _Evaluation("one pass", batch, 1, pooled + kept)
        return
    if max(m, n) <= tile:
        yield _Evaluation("one pass", batch, 1, pooled)
    k = max(plan.positions for plan in networks)
    gradients = any(plan.gradient_dtype for plan in maps)
    tiles = batch * math.ceil(m / GPU_TILE_CHANNELS) * math.ceil(n / GPU_TILE_CHANNELS)
    parts = parts_of(tiles, k)
    stored = 4 * m * n * parts if gradients or parts > 1 or norm == "column" else 0
    samples = _equal_chunks(batch, max(1, CHUNK_BYTES["cuda"] // max(1, stored)))
    by_tiles = [_Evaluation("tiles", samples, 2, pooled + samples * stored, parts)]
    # In fp32 a tile is an operand of two terms: beside it the gradient does not fit, and to compute
    # it twice costs more than the bytes. What is pooled would be pooled twice, too.
    read_as_is = exact and not any(plan.pooled_size for plan in maps)
    if gradients and norm != "column" and k <= GPU_RECOMPUTE_POSITIONS and read_as_is:
        products = 2 * m * n * sum(plan.positions for plan in networks)
        recomputed = _Evaluation("recomputed tiles", batch, 2, pooled, extra_flops=products)
        # Storing writes and reads m n for each sample, recomputing reads (m + n) K once more.
        by_tiles.insert(0 if m * n > (m + n) * k else 1, recomputed)
    yield from by_tiles


def parts_of(tiles: int, positions: int) -> int:
    """Into how many a sum over positions is split, so that the tiles of a result fill a device."""
    return max(1, min(GPU_PROGRAMS // tiles, positions // GPU_PART_POSITIONS))


def stored_samples(pair: PairPlan) -> int:
    """How many samples at a time, if a pair's residual is to be stored in one part."""
    stored = 4 * math.prod(pair.channels)
    return _equal_chunks(pair.batch, max(1, CHUNK_BYTES["cuda"] // stored))


def gram_blocks(pair: PairPlan) -> int:
    """``K x K`` blocks that the Triton backend keeps in memory for each sample of a Gram form."""
    return _gram_blocks(pair.maps)


def _gram_blocks(maps: Sequence[MapPlan]) -> int:
    """Three, and two for each gradient, with places for the teacher's if any of these is wanted."""
    wanted = [plan.gradient_dtype is not None for plan in maps]
    return 3 + (8 if any(wanted[2:]) else 4 if any(wanted) else 0)


def _equal_chunks(batch: int, most: int) -> int:
    """Samples at a time, at most ``most`` and equally many: a small last chunk costs as much."""
    return math.ceil(batch / math.ceil(batch / most))


def _pooled_workspace(plan: MapPlan, pool: str) -> int:
    """Bytes for each sample of a map that is pooled before the kernels see it."""
    if plan.pooled_size is None or plan.fused_windows:
        return 0
    width = plan.dtype.itemsize if pool == "max" else torch.float32.itemsize
    if plan.gradient_dtype is not None:
        width += torch.float32.itemsize + (torch.int64.itemsize if pool == "max" else 0)
    # Averages are taken in fp32, of an fp32 copy.
    copied = pool == "avg" and plan.dtype in HALF
    copy = math.prod(plan.shape[1:]) * torch.float32.itemsize if copied else 0
    return plan.shape[1] * plan.positions * width + copy


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


def _flops(student: Sequence[MapPlan], teacher: Sequence[MapPlan], norm: str) -> dict[Form, int]:
    """Per sample, of each form there is."""
    m, n, k = student[0].shape[1], student[1].shape[1], student[0].positions
    flops: dict[Form, int] = {"matrix": _matrix_flops(m, n, student, teacher)}
    if _subtractable(student, teacher) and norm != "column":  # which needs the columns of D
        flops["gram"] = _gram_flops(m, n, k, (*student, *teacher))
    return flops


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


def _forms(flops: dict[Form, int], m: int, n: int, k: int, tile: int | None) -> list[Form]:
    """Best first; ``tile``: the largest residual of one program on a GPU, ``None`` on a CPU."""
    if "gram" not in flops or (tile is not None and k > GPU_GRAM_POSITIONS):
        return ["matrix"]
    if tile is not None and max(m, n) <= tile:
        # Memory-bound either way; one accumulator is simpler than six.
        return ["matrix", "gram"]
    cost = {"matrix": 1.0, "gram": GRAM_FLOP_COST if tile is None else 1.0}
    return sorted(flops, key=lambda form: flops[form] * cost[form])


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
    wanted, in_place = plan.gradient_dtype is not None, _in_place(plan, compute_dtype)
    total = 0 if plan.dtype == compute_dtype else full
    if plan.pooled_size is not None:
        total += pooled
        if wanted and pool == "max":  # a channels-last copy and the indices of the maxima
            total += full + plan.shape[1] * plan.positions * torch.int64.itemsize
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
