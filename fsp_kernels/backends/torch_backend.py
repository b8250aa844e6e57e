"""The backend for any device that PyTorch supports: BLAS products over chunks that stay in cache.

Per sample, student ``a (m, K)``, ``b (n, K)``, teacher ``c``, ``d``; differences ``p = a - c``,
``q = b - d``; residual ``D (m, n)``. A chunk of samples is read twice: for the residual (or the
Gram blocks) and, while it is still in cache, for the gradients. BLAS writes these directly to their
final memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fsp_kernels.backends.devices import multiplies_bf16
from fsp_kernels.backends.tensors import counts, elements_of
from fsp_kernels.loss_plan import (
    Limits,
    LossPlan,
    MapPlan,
    PairPlan,
    Scaling,
    multiplied_dtypes,
)
from fsp_kernels.plan import (
    BF16_GRAM_FLOP_COST,
    GPU_GRAM_POSITIONS,
    GPU_TILE_CHANNELS,
    GRAM_FLOP_COST,
    accumulation_dtype,
    can_be_subtracted,
    difference_block,
    gram_channels,
    gram_dtype,
)
from fsp_kernels.pooling import pool, unpool

# A term (alpha, x, y) of a gradient: alpha * x @ y, batched; y = None stands for the identity. The
# pair's weight is part of x or y. It is not part of alpha: with an alpha of 0 BLAS would not read
# the operands and miss a NaN. The sum is not weighted at the end: it might overflow before.
Term = tuple[float, Tensor, Tensor | None]


class TorchBackend:
    """See :class:`fsp_kernels.backends.Backend` for what each method promises."""

    name = "torch"
    automatic = True
    transposes = True

    def why_unavailable(self) -> str | None:
        return None

    def why_unsupported(
        self,
        device: torch.device,  # noqa: ARG002
        dtypes: Sequence[torch.dtype],  # noqa: ARG002
    ) -> str | None:
        return None

    def limits(
        self,
        device: torch.device,
        student: Sequence[MapPlan],
        teacher: Sequence[MapPlan],
        precision: str,  # noqa: ARG002
    ) -> Limits:
        # On tensor cores products of half-precision maps are exact, while their differences would
        # be rounded. On a CPU maps are widened first, so differences are exact, too, and better.
        # Where the processor multiplies bf16, differences of bf16 maps are rounded to it instead.
        if device.type == "cpu":
            bf16 = set(multiplied_dtypes(student, teacher)) == {torch.bfloat16}
            if bf16 and can_be_subtracted(student, teacher) and multiplies_bf16():
                return Limits(gram_flop_cost=BF16_GRAM_FLOP_COST, bf16_forms=("matrix",))
            return Limits(gram_flop_cost=GRAM_FLOP_COST)
        return Limits(
            one_pass=GPU_TILE_CHANNELS, gram_positions=GPU_GRAM_POSITIONS, exact_halves=True
        )

    def matrix(self, first: Tensor, second: Tensor) -> Tensor:
        return _scaled_product(first, second.mT, first.shape[2])

    def matrix_backward(self, gradient: Tensor, other: Tensor, channels_last: bool) -> Tensor:
        positions = other.shape[2]
        if channels_last:
            return _scaled_product(other.mT, gradient.mT, positions).mT
        return _scaled_product(gradient, other, positions)

    def loss(
        self,
        maps: Sequence[Tensor],
        plan: LossPlan,
        weights: Sequence[float],
        masks: Sequence[Tensor] = (),
    ) -> tuple[Tensor, list[Tensor]]:
        remaining = iter(maps)
        losses: list[Tensor] = []
        gradients: list[Tensor] = []
        for pair, weight in zip(plan.pairs, weights, strict=True):
            members = [next(remaining) for _ in pair.maps]
            held = [
                None if m.gradient_dtype is None else torch.empty_like(x, dtype=m.gradient_dtype)
                for x, m in zip(members, pair.maps, strict=True)
            ]
            losses.append(pair_loss(members, held, pair, plan, weight, masks))
            gradients += [g for g in held if g is not None]
        if plan.by_pair:
            return torch.stack(losses), gradients
        return _sum(losses), gradients

    def scale(
        self, gradients: Sequence[Tensor], scaling: Scaling, factor: Tensor, in_place: bool
    ) -> list[Tensor]:
        each = elements_of(factor)
        pairs = list(zip(gradients, scaling.factors, strict=True))
        if in_place:
            # To read a factor would stall a device.
            is_one = [f.device.type == "cpu" and f.item() == 1 for f in each]
            scaled = [g if is_one[i] else g.mul_(each[i]) for g, i in pairs]
        else:
            scaled = [g * each[i] for g, i in pairs]
        return [g.to(dtype) for g, dtype in zip(scaled, scaling.dtypes, strict=True)]


def _scaled_product(x: Tensor, y: Tensor, positions: int) -> Tensor:
    """``x @ y / K``, batched; half-precision operands are widened, so accumulation is fp32.

    The loss multiplies in the same way, so the residual with a ready matrix of equal maps is zero.
    """
    dtype = torch.promote_types(x.dtype, y.dtype)
    wide = accumulation_dtype(dtype)
    x, y = x.to(wide), y.to(wide)
    # Not written to an existing tensor (out=), which vmap does not support.
    unread = x.new_empty(1, 1, 1)
    return torch.baddbmm(unread, x, y, beta=0, alpha=1 / positions).to(dtype)


def _sum(losses: list[Tensor]) -> Tensor:
    return losses[0] if len(losses) == 1 else torch.stack(losses).sum()


def pair_loss(
    maps: Sequence[Tensor],
    gradients: Sequence[Tensor | None],
    pair: PairPlan,
    plan: LossPlan,
    weight: float,
    masks: Sequence[Tensor] = (),
) -> Tensor:
    """The weighted loss of a pair, a scalar; fills ``gradients``, one for each map or ``None``."""
    factor = weight / pair.divisor
    if pair.samples == pair.batch:
        return _chunk_loss(maps, gradients, masks, pair, plan, factor)
    losses = []
    for start in range(0, pair.batch, pair.samples):
        chunk = slice(start, start + pair.samples)
        parts = [x[chunk] for x in maps], [None if g is None else g[chunk] for g in gradients]
        losses.append(_chunk_loss(*parts, [x[chunk] for x in masks], pair, plan, factor))
    return _sum(losses)


def _chunk_loss(
    maps: Sequence[Tensor],
    gradients: Sequence[Tensor | None],
    masks: Sequence[Tensor],
    pair: PairPlan,
    plan: LossPlan,
    factor: float,
) -> Tensor:
    """``factor`` times the loss of a chunk, summed over its samples; fills its gradients."""
    # The second maps of a symmetric pair are the first ones.
    places = [i - i % 2 if pair.symmetric else i for i in range(len(maps))]
    # The kernels for a CPU leave samples to PyTorch that are planned for them: these are widened.
    bf16 = pair.bf16_products and pair.evaluation == "chunks"
    dtype = torch.bfloat16 if bf16 else plan.compute_dtype
    rescales = [x.shape[1] / counts(x, plan.compute_dtype)[:, None, None] for x in masks]
    chunks = {}
    for i in dict.fromkeys(places):
        chunks[i] = _Chunk(maps[i], gradients[i], pair.maps[i], dtype)
        place = pair.maps[i].mask
        if place is not None:
            chunks[i].hide(masks[place], rescales[place])
    sweep = _gram_sweep if pair.form == "gram" else _matrix_sweep
    loss, terms = sweep([chunks[i] for i in places], pair, factor)
    for i, chunk in chunks.items():
        chunk.write_gradient(terms[i])
    return loss


class _Chunk:
    """A chunk of one map and of its gradient.

    ``flat (s, C, K)`` is the map, pooled and widened as the plan says, with zeros where its mask
    is false. ``rescale (s, 1, 1)`` is ``K`` over the number of positions that count; without a mask
    it is 1. ``writable`` is the gradient in the form of ``flat``, or ``None`` if its strides or
    dtype do not let BLAS write to it.
    """

    def __init__(
        self,
        x: Tensor,
        gradient: Tensor | None,
        map_plan: MapPlan,
        dtype: torch.dtype,
    ):
        self._size, self._mode, self._indices = map_plan.pooled_size, map_plan.pool, None
        self._gradient = gradient
        if x.dtype != dtype:
            x = x.to(dtype)
        if self._size is not None:
            x, self._indices = pool(x, self._size, self._mode, indexed=gradient is not None)
        self.flat = x.flatten(2)
        self.rescale: float | Tensor = 1.0
        self.writable: Tensor | None = None
        if gradient is not None and self._size is None and gradient.dtype == x.dtype:
            flat = gradient.flatten(2)
            self.writable = flat if flat.data_ptr() == gradient.data_ptr() else None

    def hide(self, mask: Tensor, rescale: Tensor) -> None:
        """Count only the positions where the mask ``(s, K)`` is true."""
        self.flat, self.rescale = self.flat.where(mask[:, None], 0), rescale

    def minus(self, other: _Chunk) -> Tensor:
        """The difference of two maps, stored in the memory of this one's gradient if possible."""
        if self.writable is None:
            return self.flat - other.flat
        return torch.sub(self.flat, other.flat, out=self.writable)

    def write_gradient(self, terms: Sequence[Term]) -> None:
        if self._gradient is None:
            return
        if self.writable is not None:
            _accumulate(self.writable, terms)
            return
        result = torch.empty_like(self.flat)
        _accumulate(result, terms)
        if self._size is None:
            self._gradient.copy_(result.view(self._gradient.shape))
        else:
            unpool(result, self._gradient, self._size, self._mode, self._indices)


def _matrix_sweep(
    chunks: Sequence[_Chunk], pair: PairPlan, factor: float
) -> tuple[Tensor, list[list[Term]]]:
    """``factor`` times the loss, summed over the samples, and the terms of its gradients.

    Both come from the residual.
    """
    residual = _residual(chunks, pair)
    wide = accumulation_dtype(residual.dtype)
    if pair.norm == "column":
        column_norms = torch.linalg.vector_norm(residual, dim=1, keepdim=True, dtype=wide)
        loss = column_norms.sum()
        # As in PyTorch, the subgradient of a zero column is zero.
        slope = residual.div_(column_norms.masked_fill_(column_norms == 0, math.inf))
    else:
        # First the norm of each row: a single sum over all m n would lose two digits in fp32.
        rows = torch.linalg.vector_norm(residual, dim=2, dtype=wide).view(-1)
        loss = torch.dot(rows, rows)
        slope = residual
    rescale = chunks[0].rescale
    if pair.wants_gradients:
        slope.mul_(pair.slope_scale * factor / pair.positions * rescale)
    a, b, *teacher = (chunk.flat for chunk in chunks)
    both = 2 if pair.has_symmetric_slope else 1

    def by_first_map(slope: Tensor) -> Tensor:
        adds = pair.symmetric and pair.wants_gradients and not pair.has_symmetric_slope
        return slope + slope.mT if adds else slope

    by_first = by_first_map(slope)
    terms: list[list[Term]] = [[(both, by_first, b)], [(1, slope.mT, a)]]
    if pair.masks[0] != pair.masks[1] and any(m.gradient_dtype for m in pair.teacher):
        # So far the slope is scaled for the student's maps.
        slope = slope * (chunks[2].rescale / rescale)
        by_first = by_first_map(slope)
    if len(teacher) == 1:
        return loss.mul_(factor), [*terms, [(-pair.positions, slope, None)]]
    c, d = teacher
    ratio = -pair.positions / c.shape[2]
    return loss.mul_(factor), [*terms, [(both * ratio, by_first, d)], [(ratio, slope.mT, c)]]


def _residual(chunks: Sequence[_Chunk], pair: PairPlan) -> Tensor:
    """``D / K = G^S - G^T`` of a chunk, ``(s, m, n)``."""
    a, b, *teacher = (chunk.flat for chunk in chunks)
    rescale = chunks[0].rescale
    out = a.new_empty(a.shape[0], *pair.channels)
    scale = 1 / pair.positions
    if pair.residual == "difference":
        return _times(_difference(out, chunks, pair, scale), rescale)
    bmm_into(out, a, b.mT, scale)
    if len(teacher) == 1:
        return _times(out, rescale).sub_(teacher[0])
    c, d = teacher
    out = _times(out, rescale / chunks[2].rescale)
    bmm_into(out, c, d.mT, -1 / c.shape[2], keep=True)
    return _times(out, chunks[2].rescale)


def _times(x: Tensor, rescale: float | Tensor) -> Tensor:
    """``x * rescale`` in place. A number is 1: there is no mask."""
    return x.mul_(rescale) if isinstance(rescale, Tensor) else x


def _difference(out: Tensor, chunks: Sequence[_Chunk], pair: PairPlan, scale: float) -> Tensor:
    """``scale * D`` from the differences of the maps; ``out`` is its memory, or temporary."""
    a, b, c, d = (chunk.flat for chunk in chunks)
    if pair.symmetric:
        half = _half_of_difference(out, a, c, scale / 2)
        return half + half.mT
    no_place = chunks[0].writable is None and chunks[1].writable is None
    if no_place and (block := _difference_block(a, b)) < a.shape[2]:
        return _difference_by_blocks(out, (a, b), (c, d), scale, block)
    bmm_into(out, chunks[0].minus(chunks[2]), b.mT, scale)
    return bmm_into(out, c, chunks[1].minus(chunks[3]).mT, scale, keep=True)


def _difference_block(a: Tensor, b: Tensor) -> int:
    column = (a.shape[1] + b.shape[1]) * a.shape[0] * a.itemsize
    return difference_block(a.device.type, a.shape[2], column)


def _difference_by_blocks(
    out: Tensor,
    student: tuple[Tensor, Tensor],
    teacher: tuple[Tensor, Tensor],
    scale: float,
    block: int,
) -> Tensor:
    """The same, with large differences formed in blocks of positions.

    It is used where the gradients' memory cannot hold the differences.
    """
    (a, b), (c, d) = student, teacher
    p, q = torch.empty_like(a[..., :block]), torch.empty_like(b[..., :block])

    def multiply(here: slice, width: int, keep: bool) -> None:
        torch.sub(a[..., here], c[..., here], out=p[..., :width])
        torch.sub(b[..., here], d[..., here], out=q[..., :width])
        bmm_into(out, p[..., :width], b[..., here].mT, scale, keep)
        bmm_into(out, c[..., here], q[..., :width].mT, scale, keep=True)

    return _sum_blocks(out, a.shape[2], block, multiply)


def _half_of_difference(out: Tensor, a: Tensor, c: Tensor, scale: float) -> Tensor:
    """``X = scale (a - c) (a + c)^T``, in blocks of positions if the maps are large.

    ``X + X^T = 2 scale (a a^T - c c^T)``.
    """
    block = _difference_block(a, a)
    p, total = (torch.empty_like(a[..., :block]) for _ in range(2))

    def multiply(here: slice, width: int, keep: bool) -> None:
        torch.sub(a[..., here], c[..., here], out=p[..., :width])
        torch.add(a[..., here], c[..., here], out=total[..., :width])
        bmm_into(out, p[..., :width], total[..., :width].mT, scale, keep)

    return _sum_blocks(out, a.shape[2], block, multiply)


def _sum_blocks(
    out: Tensor, positions: int, block: int, multiply: Callable[[slice, int, bool], None]
) -> Tensor:
    """Sum products over blocks of positions. ``multiply`` writes them to ``out`` or adds them.

    The blocks of bf16 products are added in fp32.
    """
    rounds = block < positions and out.dtype == torch.bfloat16
    total = out.new_zeros(out.shape, dtype=torch.float32) if rounds else None
    for start in range(0, positions, block):
        width = min(block, positions - start)
        multiply(slice(start, start + block), width, start > 0 and total is None)
        if total is not None:
            total += out
    return out if total is None else out.copy_(total)


def _gram_sweep(
    chunks: Sequence[_Chunk], pair: PairPlan, factor: float
) -> tuple[Tensor, list[list[Term]]]:
    """``factor`` times the loss, summed over the samples, and the terms of its gradients.

    Both come from ``K x K`` blocks, which are fp64 on a CPU. The terms of the loss are as large as
    ``||G||^2`` even where the residual is small, so fp32 would leave an error of ``eps ||G||^2``,
    of either sign.
    """
    a, b, c, d = (chunk.flat for chunk in chunks)
    p = a - c
    q = p if pair.symmetric else b - d
    pp, cp, cc = _gram_blocks(p, c)
    if pair.symmetric:  # b = p + c
        qq, qb = pp, pp + cp.mT
        bb = (qb + cp).add_(cc)
    else:
        bb, qb, qq = _gram_blocks(b, q)
    factor /= pair.positions**2
    scale = 4 * factor if pair.symmetric else 2 * factor
    rescale = chunks[0].rescale ** 2

    def operand(block: Tensor) -> Tensor:
        return block.mul_(scale * rescale).to(p.dtype)

    # D b = p bb + c qb and D^T a = b (pp + cp^T) + q (cp + cc), with a = p + c; likewise d = b - q.
    first, second, teacher_first, teacher_second = (m.gradient_dtype is not None for m in pair.maps)
    terms: list[list[Term]] = [[], [], [], []]
    if first:
        terms[0] = [(1, p, operand(bb.clone())), (1, c, operand(qb.clone()))]
    if second:
        terms[1] = [(1, b, operand(pp + cp.mT)), (1, q, operand(cp + cc))]
    if teacher_first:
        terms[2] = [(-1, p, operand(bb - qb.mT)), (-1, c, operand(qb - qq))]
    if teacher_second:
        terms[3] = [(-1, b, operand(cp.mT.clone())), (-1, q, operand(cc.clone()))]
    losses = cc.mul_(qq).addcmul_(cp, qb, value=2).addcmul_(pp, bb).sum((1, 2), keepdim=True)
    losses = _times(losses.clamp_(min=0), rescale)
    return losses.sum().mul_(factor).to(p.dtype), terms


def _gram_blocks(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``x^T x``, ``y^T x`` and ``y^T y``, each ``(s, K, K)``, of two ``(s, C, K)``.

    If the blocks have a wider dtype, ``x`` and ``y`` are widened some channels at a time. Channels
    are then next to each other in memory, which is fastest for BLAS.
    """
    samples, channels, positions = x.shape
    dtype = gram_dtype(x.device.type, x.dtype)
    xx, yx, yy = (x.new_empty(samples, positions, positions, dtype=dtype) for _ in range(3))
    block = channels
    if dtype != x.dtype:
        block = gram_channels(samples, channels, positions)
        wide = x.new_empty(2, samples, positions, block, dtype=dtype)
    for start in range(0, channels, block):
        u, v = x[:, start : start + block], y[:, start : start + block]
        if dtype != x.dtype:
            u, v = (
                to[..., : part.shape[1]].mT.copy_(part)
                for to, part in zip(wide, (u, v), strict=True)
            )
        for out, left, right in ((xx, u, u), (yx, v, u), (yy, v, v)):
            bmm_into(out, left.mT, right, 1, keep=start > 0)
    return xx, yx, yy


def _accumulate(out: Tensor, terms: Sequence[Term]) -> None:
    for i, (alpha, x, y) in enumerate(terms):
        if y is None:
            torch.mul(x, alpha, out=out)
        else:
            bmm_into(out, x, y, alpha, keep=i > 0)


def bmm_into(out: Tensor, x: Tensor, y: Tensor, alpha: float, keep: bool = False) -> Tensor:
    """``out = alpha * x @ y``, or ``out += alpha * x @ y`` if ``keep``, in one batched BLAS call.

    If ``out`` is channels-last, its transpose is contiguous: BLAS writes ``y^T x^T`` to ``out^T``.
    """
    if not out.is_contiguous() and out.mT.is_contiguous():
        out, x, y = out.mT, y.mT, x.mT
        return torch.baddbmm(out, x, y, beta=int(keep), alpha=alpha, out=out).mT
    return torch.baddbmm(out, x, y, beta=int(keep), alpha=alpha, out=out)
