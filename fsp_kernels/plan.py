"""Choose how each pair of a loss is evaluated, from shapes alone.

Student ``a = F1_S (m, K)``, ``b = F2_S (n, K)``; teacher ``c = F1_T``, ``d = F2_T``. Loss and
gradients need only the residual ``D = a b^T - c d^T`` (times ``1/K``). It has two expressions,

* *direct*: ``a b^T - c d^T``;
* *difference*: ``p b^T + c q^T`` with ``p = a - c``, ``q = b - d``. It takes the same flops, but
  subtracts before it rounds. So the gradient stays accurate as the student nears the teacher;

and two forms,

* *matrix*: ``D`` itself is accumulated, ``O(m n K)``;
* *gram*: with ``P = [p c]``, ``Q = [b q]``, ``||D||^2 = <P^T P, Q^T Q>``. Only ``K x K`` blocks
  are formed, ``O((m + n) K^2)``: cheaper for few positions and many channels.

A pair of a map with itself, in both networks (``a = b``, ``c = d``), is *symmetric*: ``D`` equals
its transpose, so the gradients by ``a`` and ``b`` are one product. A backend that ``transposes``
also takes one product for the difference, ``X + X^T`` with ``X = (a - c) (a + c)^T / 2``, and half
of the Gram blocks.

The ``limits`` of a backend say what it can do. This module alone chooses among that. It is a pure
function of metadata, so plans are cached and can be tested for any device without having one.
:func:`fsp_kernels.explain` shows the result.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import NamedTuple, Protocol

import torch

from fsp_kernels.launch_plan import Chosen, launch_groups
from fsp_kernels.loss_plan import (
    HALF,
    Evaluation,
    Form,
    Limits,
    LossPlan,
    MapPlan,
    MapSpec,
    MaskIndices,
    PairPlan,
    PairSpec,
    Residual,
    TeacherSpec,
    contiguous_strides,
    multiplied_dtypes,
)

# The most bytes of inputs, gradients and workspace of a chunk. On a CPU a chunk is read twice, and
# should still be in the last-level cache the second time. Within this limit larger chunks are
# better, because each chunk takes a dozen operator calls. On a GPU the torch backend uses chunks to
# bound the workspace, not for locality.
CHUNK_BYTES = {"cpu": 32 << 20, "cuda": 256 << 20}
# The fewest samples of a chunk: a batched product gives each of a CPU's threads whole samples. On
# 256 x 256 x 16384 this is a fifth faster than sharing one.
CHUNK_SAMPLES = {"cpu": 4, "cuda": 1}
# On a CPU the torch backend forms both differences of a chunk whole if they have at most so many
# bytes. Larger ones are formed in blocks: writing fresh memory takes longer than reading the maps,
# and a block stays in cache. Smaller blocks would make smaller products.
DIFFERENCES_WHOLE, DIFFERENCES_BLOCK = 16 << 20, 4 << 20
# The cost of a flop of a Gram block on a CPU, relative to other products: blocks are fp64 and their
# products small.
GRAM_FLOP_COST = 2.6
BF16_GRAM_FLOP_COST = 5.2  # the same beside products of bf16
GRAM_BLOCK_BYTES = 1 << 20  # of maps that are widened to fp64 at a time; they stay in cache
CPU_GRAM_FLOP_COST = 1.8  # the same cost for the kernels of the CPU backend
CPU_OPERAND_BYTES = 2 << 20  # of operands that a thread of the CPU backend copies at a time
CPU_PANEL = 32  # channels that it copies at a time to pool them, if they do not adjoin
GPU_TILE_CHANNELS = 128  # of a tile of a residual on a GPU
GPU_GRAM_POSITIONS = 64  # the most for which Gram blocks stay on chip on a GPU
# Programs that fill a large GPU (two for each of about 130 multiprocessors). With fewer tiles the
# positions are split. This is a constant so that results do not depend on the device.
GPU_PROGRAMS = 256
GPU_PART_POSITIONS = 128  # the fewest positions of a part
GPU_PART_CHANNELS = 128  # the fewest channels of a part, if a sum over channels is split
# If a gradient's product has more flops than this for each byte, BLAS should be faster than our own
# kernel. Predicted from the kernel's machine code, not measured. Below, memory bounds both.
GPU_BLAS_INTENSITY = 128
GRAM_BLOCKS = 6  # of each sample
FP32_BYTES = torch.float32.itemsize


def pooled_size(first: Sequence[int], second: Sequence[int]) -> tuple[int, ...]:
    """The spatial size that both maps of a pair are pooled to: the smaller, axis by axis."""
    return tuple(min(p, q) for p, q in zip(first, second, strict=True))


class Planned(Protocol):
    """What planning needs of a backend."""

    name: str

    @property
    def transposes(self) -> bool:
        """See :class:`fsp_kernels.backends.Backend`."""

    def __hash__(self) -> int: ...  # part of the key of cached plans

    def limits(
        self,
        device: torch.device,
        student: Sequence[MapPlan],
        teacher: Sequence[MapPlan],
        precision: str,
    ) -> Limits:
        """See :class:`fsp_kernels.backends.Backend`."""


@lru_cache(maxsize=1024)
def plan_loss(
    student: tuple[PairSpec, ...],
    teacher: tuple[TeacherSpec, ...],
    pool: str,
    norm: str,
    backend: Planned,
    precision: str,
    reduction: str = "sum",
    symmetric: Sequence[bool] = (),
    masks: MaskIndices = (None, None),
) -> LossPlan:
    """Plan a loss over checked inputs.

    ``MapSpec.requires_grad`` says which gradients are wanted. ``precision``, ``"tf32x3"`` or
    ``"tf32"``, says how fp32 maps are multiplied on tensor cores. ``symmetric`` says which pairs
    are evaluated as symmetric ones, see :func:`symmetric_pairs`; none if it is empty. ``masks`` are
    the indices of the networks' masks.
    """
    flags = symmetric or (False,) * len(student)
    chosen = [
        next(_pair_plans(s, t, pool, norm, backend, precision, flag, masks))
        for s, t, flag in zip(student, teacher, flags, strict=True)
    ]
    device = student[0][0].device
    return _loss_plan(chosen, device, pool, norm, backend, precision, reduction)


def symmetric_pairs(
    same: Sequence[bool], ready: Sequence[bool], norm: str, backend: Planned
) -> tuple[bool, ...]:
    """Which pairs of a map with itself a backend evaluates as symmetric ones.

    Without transposing it can double the gradient ``S a``, if the slope ``S`` is symmetric. That
    does not hold for the column norm, nor for ready matrices, which need not be symmetric.
    """
    return tuple(
        x and (backend.transposes or (norm != "column" and not is_matrix))
        for x, is_matrix in zip(same, ready, strict=True)
    )


def alternatives(
    student: PairSpec, teacher: TeacherSpec, pool: str, norm: str, backend: Planned, precision: str
) -> list[LossPlan]:
    """One plan for each evaluation that a backend has for a pair; the chosen one comes first."""
    found = _pair_plans(student, teacher, pool, norm, backend, precision)
    device = student[0].device
    return [_loss_plan([each], device, pool, norm, backend, precision) for each in found]


def fewest_flops(
    student: PairSpec, teacher: TeacherSpec, norm: str = "frobenius", symmetric: bool = False
) -> int:
    """The flops of a pair's loss in the form that has fewest."""
    maps = [_plan_maps(x, "max", symmetric) for x in (student, teacher)]
    flops = _flops(maps[0], maps[1], norm, halved=symmetric)
    return student[0].shape[0] * min(flops.values())


def accumulation_dtype(*dtypes: torch.dtype) -> torch.dtype:
    """fp64 if any input is, else fp32."""
    return torch.float64 if torch.float64 in dtypes else torch.float32


def _loss_plan(
    chosen: Sequence[Chosen],
    device: torch.device,
    pool: str,
    norm: str,
    backend: Planned,
    precision: str,
    reduction: str = "sum",
) -> LossPlan:
    pairs = tuple(pair for pair, _ in chosen)
    dtype = accumulation_dtype(*(m.dtype for pair in pairs for m in pair.maps))
    groups = tuple(launch_groups(chosen))
    name = backend.name
    return LossPlan(pairs, groups, pool, norm, reduction, device.type, name, dtype, precision)


def _pair_plans(
    student: PairSpec,
    teacher: TeacherSpec,
    pool: str,
    norm: str,
    backend: Planned,
    precision: str,
    symmetric: bool = False,
    masks: MaskIndices = (None, None),
) -> Iterator[Chosen]:
    """All ways to evaluate a pair, best first."""
    symmetric_slope = norm != "column" and len(teacher) == 2
    assert not symmetric or backend.transposes or symmetric_slope, "see symmetric_pairs"
    device = student[0].device
    student_maps, teacher_maps = (
        _plan_maps(x, pool, symmetric, mask)
        for x, mask in zip((student, teacher), masks, strict=True)
    )
    maps = (*student_maps, *teacher_maps)
    limits = backend.limits(device, student_maps, teacher_maps, precision)
    batch, m = student[0].shape[:2]
    n = student[1].shape[1]
    compute_dtype = accumulation_dtype(*(plan.dtype for plan in maps))
    halves = all(dtype in HALF for dtype in multiplied_dtypes(student_maps, teacher_maps))
    halved = symmetric and backend.transposes
    # One product of rounded differences takes half the time of two exact ones.
    exact = halves and limits.exact_halves and not (halved and limits.bf16_forms)
    flops = _flops(student_maps, teacher_maps, norm, exact, halved)
    for form in _forms(flops, m, n, student_maps[0].positions, limits, halved):
        residual = _residual(form, student_maps, teacher_maps, exact)
        bf16 = form in limits.bf16_forms
        if "chunks" in limits.evaluations:
            how = form, residual, norm, symmetric
            dtype = torch.bfloat16 if bf16 else compute_dtype
            evaluations = _chunked_evaluations(maps, *how, device.type, dtype)
        elif "samples" in limits.evaluations:
            evaluations = iter([_by_samples(m, n, maps, form, symmetric)])
        else:
            evaluations = _fused_evaluations(m, n, maps, norm, form, limits)
        for found in evaluations:
            plan = PairPlan(
                batch=batch,
                channels=(m, n),
                student=student_maps,
                teacher=teacher_maps,
                norm=norm,
                residual=residual,
                form=form,
                evaluation=found.evaluation,
                parts=found.parts,
                slope_dtype=found.slope_dtype,
                blas_gradients=found.blas_gradients,
                passes=found.passes,
                samples=found.samples,
                flops=batch * flops[form],
                scratch_bytes=found.scratch_bytes,
                pooled_bytes=found.pooled_bytes,
                symmetric=symmetric,
                bf16_products=bf16,
            )
            yield plan, limits


def _residual(
    form: Form, student: Sequence[MapPlan], teacher: Sequence[MapPlan], exact_products: bool
) -> Residual:
    """How the residual is computed.

    ``exact_products``: products are exact, while a difference of the maps would be rounded.
    """
    if len(teacher) == 1:
        return "ready"
    if not can_be_subtracted(student, teacher):
        return "apart"
    # The Gram form needs differences: without them its terms cancel.
    return "direct" if exact_products and form == "matrix" else "difference"


def can_be_subtracted(student: Sequence[MapPlan], teacher: Sequence[MapPlan]) -> bool:
    """Whether there are maps of both networks, and the same number of their positions counts."""
    s, t = student[0], teacher[0]
    return len(teacher) == 2 and (s.positions, s.mask) == (t.positions, t.mask)


class _Evaluation(NamedTuple):
    """The fields of :class:`PairPlan` that depend on the evaluation."""

    evaluation: Evaluation
    samples: int
    passes: int
    scratch_bytes: int
    pooled_bytes: int = 0
    parts: int = 1
    slope_dtype: torch.dtype | None = None
    blas_gradients: bool = False


def _chunked_evaluations(
    maps: Sequence[MapPlan],
    form: Form,
    residual: Residual,
    norm: str,
    symmetric: bool,
    device: str,
    compute_dtype: torch.dtype,
) -> Iterator[_Evaluation]:
    """The evaluations of the torch backend. They differ in the samples of a chunk."""
    batch, m, n, k = maps[0].shape[0], maps[0].shape[1], maps[1].shape[1], maps[0].positions
    difference = residual == "difference"
    widens = form == "gram" and gram_dtype(device, compute_dtype) != compute_dtype
    no_place = (
        form == "matrix"
        and difference
        and (symmetric or not any(_in_place(x, compute_dtype) for x in maps[:2]))
    )
    column = (m + n) * compute_dtype.itemsize  # of both differences, for each sample
    subtracted = difference and not no_place
    blocks, transposed = m * n * compute_dtype.itemsize, 0
    if symmetric:
        maps = maps[::2]
        transposed = blocks if _adds_transpose(maps, form, residual, norm) else 0
    if maps[0].mask != maps[-1].mask and any(
        plan.gradient_dtype for plan in maps[len(maps) // 2 :]
    ):
        transposed = 2 * transposed + blocks  # the slope of the teacher's maps, too
    if form == "gram":
        blocks = _gram_workspace(k, maps, device, compute_dtype)

    def workspace(block: int) -> int:
        """Bytes for each sample, if so many positions are subtracted at a time."""
        subtracting = column * block if no_place else 0
        if no_place and block < k and compute_dtype == torch.bfloat16:
            subtracting += FP32_BYTES * m * n  # the sum of the blocks' products
        beside = max(subtracting, transposed)  # one after the other
        return (
            blocks
            + beside
            + sum(
                _map_workspace(plan, form, compute_dtype, subtracted and i < len(maps) // 2)
                for i, plan in enumerate(maps)
            )
        )

    per_sample = workspace(k) + sum(p.bytes + p.gradient_bytes for p in maps) // batch
    kind = "cpu" if device == "cpu" else "cuda"
    fitting = CHUNK_BYTES[kind] // per_sample
    if widens:  # the block of widened channels takes GRAM_BLOCK_BYTES, but at least one channel
        fitting = (CHUNK_BYTES[kind] - GRAM_BLOCK_BYTES) // (per_sample + 16 * k)
    passes = _passes(form, m, n, device, fits=fitting >= CHUNK_SAMPLES[kind])
    chosen = _equal_chunks(batch, max(CHUNK_SAMPLES[kind], fitting))
    for samples in dict.fromkeys((chosen, batch, min(batch, CHUNK_SAMPLES[kind]))):
        total = samples * workspace(difference_block(device, k, samples * column))
        if widens:
            sides = (m,) if symmetric else (m, n)
            total += samples * _gram_widening(sides, k, samples, blocks)
        yield _Evaluation("chunks", samples, passes, total)


def _by_samples(
    m: int, n: int, maps: Sequence[MapPlan], form: Form, symmetric: bool
) -> _Evaluation:
    """The evaluation by the kernels of the CPU backend.

    A sample's maps are read twice, the second time from cache if they fit. Positions that count are
    copied if they do not adjoin, with two rows of their places and one row of a gradient.
    """
    batch, k = maps[0].shape[0], maps[0].positions
    sample = sum(plan.bytes + plan.gradient_bytes for plan in maps) // batch
    own = FP32_BYTES * m * n if form == "matrix" else 2 * FP32_BYTES * (GRAM_BLOCKS + 1) * k * k
    for plan in maps:
        if plan.pooled_size is not None:  # the map, its gradient, the places of maxima; two panels
            own += 3 * FP32_BYTES * plan.shape[1] * plan.positions
            own += 2 * FP32_BYTES * CPU_PANEL * math.prod(plan.shape[2:])
            if plan.multiplied_dtype == torch.bfloat16:  # maxima are rounded to it
                own += plan.multiplied_dtype.itemsize * plan.shape[1] * plan.positions
    passes = 1 if sample <= CHUNK_BYTES["cpu"] else 2
    masked = [plan for plan in (maps[::2] if symmetric else maps) if plan.mask is not None]
    own += sum(FP32_BYTES * (plan.shape[1] + 3) * plan.positions for plan in masked)
    return _Evaluation("samples", batch, passes, own + CPU_OPERAND_BYTES)


def _adds_transpose(maps: Sequence[MapPlan], form: Form, residual: Residual, norm: str) -> bool:
    """Whether a symmetric pair takes a second matrix: a residual or slope plus its transpose."""
    gradients = any(plan.gradient_dtype is not None for plan in maps)
    slopes = gradients and (norm == "column" or residual == "ready")
    return form == "matrix" and (residual == "difference" or slopes)


def difference_block(device: str, positions: int, column: int) -> int:
    """Positions that the torch backend subtracts at a time. ``column``: the bytes of a position."""
    if device != "cpu" or positions * column <= DIFFERENCES_WHOLE:
        return positions
    return max(1, min(positions, DIFFERENCES_BLOCK // column))


def gram_dtype(device: str, compute_dtype: torch.dtype) -> torch.dtype:
    """The dtype of the torch backend's Gram blocks. A GPU may be slow in fp64 or lack it."""
    return torch.float64 if device == "cpu" else compute_dtype


def gram_channels(samples: int, channels: int, positions: int) -> int:
    """Channels of both sides that the torch backend widens to fp64 at a time."""
    return _equal_chunks(channels, max(1, GRAM_BLOCK_BYTES // (16 * samples * positions)))


def _gram_workspace(
    k: int, maps: Sequence[MapPlan], device: str, compute_dtype: torch.dtype
) -> int:
    """Bytes of a sample's blocks: six, two for each gradient, one more if these are narrower.

    A symmetric pair has five: two of the six are equal. Its ``maps`` are the first ones.
    """
    wide = gram_dtype(device, compute_dtype)
    gradients = sum(plan.gradient_dtype is not None for plan in maps)
    one_more = wide.itemsize if gradients and wide != compute_dtype else 0
    blocks = GRAM_BLOCKS if len(maps) == 4 else 5
    return k * k * (blocks * wide.itemsize + 2 * gradients * compute_dtype.itemsize + one_more)


def _gram_widening(sides: Sequence[int], k: int, samples: int, blocks: int) -> int:
    """Bytes of a sample's widened channels beyond ``blocks``: most blocks are allocated later.

    ``sides``: the channels of each side, or of one if the pair is symmetric.
    """
    # While the second three fp64 blocks are accumulated, the first three exist too.
    needed = (
        16 * k * gram_channels(samples, c, k) + 24 * k * k * side
        for side, c in enumerate(sides, start=1)
    )
    return max(0, max(needed) - blocks)


def _in_place(plan: MapPlan, compute_dtype: torch.dtype) -> bool:
    """Whether products can be written directly to the gradient."""
    return plan.gradient_dtype == compute_dtype and plan.pooled_size is None


def _fused_evaluations(
    m: int,
    n: int,
    maps: Sequence[MapPlan],
    norm: str,
    form: Form,
    limits: Limits,
) -> Iterator[_Evaluation]:
    """The evaluations by fused kernels that the limits allow, best first."""
    batch = maps[0].shape[0]
    networks = maps[::2] if len(maps) == 4 else maps[:1]  # the first map of each network
    pooled = batch * sum(_pooled_workspace(plan) for plan in maps)
    if form == "gram":
        if "blocks" not in limits.evaluations:
            yield _Evaluation("one pass", batch, 1, 0, pooled)
            return
        # One program for each side of each sample would not fill a device, so channels are split.
        parts = max(1, min(GPU_PROGRAMS // (2 * batch), max(m, n) // GPU_PART_CHANNELS))
        block = gram_block(maps[0].positions) ** 2 * FP32_BYTES
        stored = (GRAM_BLOCKS * parts + gram_operands(maps)) * block
        samples = _chunk_of_stored(batch, stored)
        yield _Evaluation("blocks", samples, 2, samples * stored, pooled, parts)
        return
    k = max(plan.positions for plan in networks)
    one_pass = _Evaluation("one pass", batch, 1, 0, pooled)
    fits = max(m, n) <= limits.one_pass
    # If a sample could have many parts, one program for each sample leaves most of a device idle.
    first = parts_of(batch, k) < limits.one_pass_parts
    if fits and first:
        yield one_pass
    gradients = any(plan.gradient_dtype for plan in maps)
    programs = batch * math.ceil(m / GPU_TILE_CHANNELS) * math.ceil(n / GPU_TILE_CHANNELS)
    parts = parts_of(programs, k)
    slope_dtype = _slope_dtype(maps, limits) if gradients else None
    stored = 0 if slope_dtype is None else slope_dtype.itemsize * m * n
    if parts > 1 or norm == "column":  # fp32 slopes replace the first part
        stored = FP32_BYTES * m * n * parts + (stored if slope_dtype == torch.bfloat16 else 0)
    samples = _chunk_of_stored(batch, stored)
    tiles = _Evaluation("tiles", samples, 2, samples * stored, pooled, parts, slope_dtype)
    # PyTorch's product would read the positions that do not count, too.
    masked = any(plan.mask is not None for plan in maps)
    suits_blas = limits.blas_gradients and slope_dtype == torch.bfloat16 and not masked
    yield from _with_blas(tiles, m, n, k) if suits_blas else [tiles]
    if fits and not first:
        yield one_pass


def _with_blas(tiles: _Evaluation, m: int, n: int, k: int) -> list[_Evaluation]:
    """Both ways to compute gradients from stored bf16 tiles, our kernel and BLAS; faster first."""
    elements = m * n + (m + n) * k  # read and written for one gradient
    by_blas = 2 * m * n * k > GPU_BLAS_INTENSITY * elements * torch.bfloat16.itemsize
    return [tiles._replace(blas_gradients=x) for x in (by_blas, not by_blas)]


def _slope_dtype(maps: Sequence[MapPlan], limits: Limits) -> torch.dtype:
    """The dtype of tiles stored for the gradients: bf16 if the maps are bf16, else fp32."""
    rounds = limits.bf16_slopes and len(maps) == 4
    rounds = rounds and all(plan.multiplied_dtype == torch.bfloat16 for plan in maps)
    return torch.bfloat16 if rounds else torch.float32


def parts_of(tiles: int, positions: int) -> int:
    """Into how many parts a sum over positions is split, so that there are enough programs."""
    return max(1, min(GPU_PROGRAMS // tiles, positions // GPU_PART_POSITIONS))


def gram_operands(maps: Sequence[MapPlan]) -> int:
    """How many blocks of each sample the gradients of the Gram form are products with.

    There are two for each map. Those of the teacher's maps exist only if it wants a gradient.
    """
    wanted = [plan.gradient_dtype is not None for plan in maps]
    return 8 if any(wanted[2:]) else 4 if any(wanted) else 0


def gram_block(positions: int) -> int:
    """The side of a Gram block in fused kernels: a power of two."""
    return max(16, 1 << (positions - 1).bit_length())


def _chunk_of_stored(batch: int, stored: int) -> int:
    """Samples at a time if ``stored`` bytes are stored for each."""
    return _equal_chunks(batch, max(1, CHUNK_BYTES["cuda"] // max(1, stored)))


def _equal_chunks(batch: int, most: int) -> int:
    """Samples at a time, at most ``most``; chunks are equal, as a small last one costs as much."""
    return math.ceil(batch / math.ceil(batch / most))


def _pooled_workspace(plan: MapPlan) -> int:
    """Bytes for each sample of a map, if fused kernels cannot pool it."""
    return 0 if plan.pooled_size is None or plan.fused_windows else _pooled_bytes(plan)


def _pooled_bytes(plan: MapPlan) -> int:
    """Bytes for each sample of a map that PyTorch pools before the kernels read it."""
    width = plan.multiplied_dtype.itemsize
    if plan.gradient_dtype is not None:
        width += FP32_BYTES + (torch.int64.itemsize if plan.pool == "max" else 0)
    # Averages are computed in fp32 from an fp32 copy.
    copied = plan.pool == "avg" and plan.dtype in HALF
    copy = math.prod(plan.shape[1:]) * FP32_BYTES if copied else 0
    return plan.shape[1] * plan.positions * width + copy


def _plan_maps(
    specs: TeacherSpec, pool: str, symmetric: bool = False, mask: int | None = None
) -> tuple[MapPlan, ...]:
    """The plans of a network's maps. The second map of a symmetric pair wants no gradient."""
    if len(specs) == 1:
        return (_plan_map(specs[0], specs[0].shape[2:], pool),)
    first, second = specs
    if symmetric:
        second = second._replace(requires_grad=False)
    size = pooled_size(first.shape[2:], second.shape[2:])
    return _plan_map(first, size, pool, mask), _plan_map(second, size, pool, mask)


def _plan_map(spec: MapSpec, size: Sequence[int], pool: str, mask: int | None = None) -> MapPlan:
    shape = tuple(spec.shape)
    pooled = shape[2:] != tuple(size)
    return MapPlan(
        shape=shape,
        strides=contiguous_strides(shape) if spec.strides is None else tuple(spec.strides),
        dtype=spec.dtype,
        pooled_size=tuple(size) if pooled else None,
        pool=pool if pooled else "none",  # type: ignore[arg-type]
        gradient_dtype=gradient_dtype(spec.dtype) if spec.requires_grad else None,
        mask=mask,
    )


def gradient_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of a gradient between forward and backward; see :class:`MapPlan`."""
    return torch.float32 if dtype == torch.float16 else dtype


def _flops(
    student: Sequence[MapPlan],
    teacher: Sequence[MapPlan],
    norm: str,
    exact_products: bool = False,
    halved: bool = False,
) -> dict[Form, int]:
    """Flops per sample, by form. ``halved``: a symmetric pair of a backend that transposes."""
    m, n, k = student[0].shape[1], student[1].shape[1], student[0].positions
    one_product = halved and _residual("matrix", student, teacher, exact_products) == "difference"
    flops: dict[Form, int] = {"matrix": _matrix_flops(m, n, student, teacher, one_product)}
    # The Gram form does not have the columns of D.
    if can_be_subtracted(student, teacher) and norm != "column":
        flops["gram"] = _gram_flops(m, n, k, (*student, *teacher), halved)
    return flops


def _matrix_flops(
    m: int, n: int, student: Sequence[MapPlan], teacher: Sequence[MapPlan], one_product: bool
) -> int:
    """Flops per sample: a product for each network's residual and for each gradient of a map.

    ``one_product``: both residuals together take one.
    """
    maps = [*student, *teacher] if len(teacher) == 2 else [*student]
    networks = (student,) if one_product else (student, teacher)
    products = [pair[0].positions for pair in networks if len(pair) == 2]
    products += [plan.positions for plan in maps if plan.gradient_dtype is not None]
    return 2 * m * n * sum(products)


def _gram_flops(m: int, n: int, k: int, maps: Sequence[MapPlan], halved: bool) -> int:
    """Flops per sample: the blocks; two ``(C, K) (K, K)`` products for each gradient."""
    gradients = sum(4 * plan.shape[1] for plan in maps if plan.gradient_dtype is not None)
    return _block_flops(m, n, k, halved) + gradients * k * k


def _block_flops(m: int, n: int, k: int, halved: bool) -> int:
    """Flops per sample: three ``K x K`` blocks of each side, or of one."""
    return 6 * (m if halved else m + n) * k * k


def _forms(
    flops: dict[Form, int], m: int, n: int, k: int, limits: Limits, halved: bool
) -> list[Form]:
    """The forms that the limits allow, best first."""
    if "gram" not in flops or (limits.gram_positions is not None and k > limits.gram_positions):
        return ["matrix"]
    if max(m, n) <= limits.one_pass:
        # Memory is the limit in either form; one accumulator is simpler than six blocks.
        return ["matrix", "gram"]
    costs: dict[Form, float] = {**flops}
    costs["gram"] += (limits.gram_flop_cost - 1) * _block_flops(m, n, k, halved)
    return sorted(costs, key=lambda form: costs[form])


def _passes(form: Form, m: int, n: int, device: str, fits: bool) -> int:
    if device == "cpu":
        return 1 if fits else 2
    one_program = form == "gram" or max(m, n) <= GPU_TILE_CHANNELS
    return 1 if one_program else 2


def _map_workspace(plan: MapPlan, form: Form, compute_dtype: torch.dtype, subtracted: bool) -> int:
    """Temporary bytes that the torch backend needs for each sample of one map."""
    width = compute_dtype.itemsize
    full, pooled = math.prod(plan.shape[1:]) * width, plan.shape[1] * plan.positions * width
    wanted, in_place = plan.gradient_dtype is not None, _in_place(plan, compute_dtype)
    total = 0 if plan.dtype == compute_dtype and plan.mask is None else full
    if plan.pooled_size is not None:
        total += pooled
        if wanted and plan.pool == "max":  # a channels-last copy and the indices of the maxima
            total += full + plan.shape[1] * plan.positions * torch.int64.itemsize
    if subtracted and (form == "gram" or not in_place):  # else the gradient's memory holds it
        total += pooled
    if wanted and not in_place:
        total += pooled
    return total
