"""The loss by fused kernels: what is launched for a plan, prepared once and then only launched.

A call is a few launches at most, each over all pairs it serves: one pass; by tiles (residual,
gradients); in Gram form (blocks, their sum, gradients); and the sum of what the programs left.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import triton
from torch import Tensor

from fsp_kernels.backends.fused import Programs, Slots, partner_of, raw_stream, slots_of
from fsp_kernels.backends.torch_backend import bmm_into
from fsp_kernels.backends.triton.elementwise import BLOCK, fsp_finish
from fsp_kernels.backends.triton.entries import Pair
from fsp_kernels.backends.triton.gram import (
    COMBINED_ROWS,
    fsp_gram,
    fsp_gram_combine,
    fsp_gram_gradients,
)
from fsp_kernels.backends.triton.launch import Launch, device_family
from fsp_kernels.backends.triton.one_pass import fsp_one_pass
from fsp_kernels.backends.triton.residual import Entry
from fsp_kernels.backends.triton.tiles import (
    GradientEntry,
    fsp_combine,
    fsp_gradients,
    fsp_matrix_gradients,
    fsp_residual,
)
from fsp_kernels.loss_plan import LossPlan, Step
from fsp_kernels.plan import GRAM_BLOCKS

Run = Callable[[int, Sequence[Slots], Sequence[float], Tensor], None]


class Program:
    """The launches of a plan, step by step."""

    def __init__(self, plan: LossPlan, maps: Sequence[Tensor], gradients: Sequence[Tensor | None]):
        self._divisors = [p.divisor for p in plan.pairs]
        self._sizes = [len(p.maps) for p in plan.pairs]
        family = device_family(maps[0].device)
        slots = slots_of(self._sizes, maps, gradients)
        pairs = [
            Pair(i, pair, s, family, plan.precision)
            for i, (pair, s) in enumerate(zip(plan.pairs, slots, strict=True))
        ]
        self._partials = 0
        self._steps = [self._prepare(step, [pairs[i] for i in step.pairs]) for step in plan.steps]
        self._finish = Launch(fsp_finish, 1, 8, self._partials, BLOCK)

    def __call__(
        self,
        maps: Sequence[Tensor],
        gradients: Sequence[Tensor | None],
        weights: Sequence[float],
    ) -> Tensor:
        stream = raw_stream(maps[0].device)
        slots = slots_of(self._sizes, maps, gradients)
        factors = [w / divisor for w, divisor in zip(weights, self._divisors, strict=True)]
        partials = maps[0].new_empty(self._partials, dtype=torch.float32)
        for step in self._steps:
            step(stream, slots, factors, partials)
        result = maps[0].new_empty((), dtype=torch.float32)
        self._finish(stream, (partials, result))
        return result

    def _take_partials(self, count: int) -> int:
        """The first of as many places for partial losses."""
        self._partials += count
        return self._partials - count

    def _prepare(self, step: Step, pairs: Sequence[Pair]) -> Run:
        if step.evaluation == "tiles":
            return _Tiles(pairs, step.chunk, self._take_partials)
        if step.evaluation == "blocks":
            return _Blocks(pairs, step.chunk, self._take_partials)
        return _OnePass(pairs, self._take_partials)


_PROGRAMS = Programs(Program)
loss = _PROGRAMS.loss


class _OnePass:
    """The launch of one_pass.py."""

    def __init__(self, pairs: Sequence[Pair], take_partials: Callable[[int], int]):
        self._indices = [p.index for p in pairs]
        entries, warps = _configured([p.one_pass_entry() for p in pairs])
        grid = sum(e.samples for e in entries)
        self._launch = Launch(fsp_one_pass, grid, warps, entries, take_partials(grid), len(entries))

    def __call__(
        self, stream: int, slots: Sequence[Slots], factors: Sequence[float], partials: Tensor
    ) -> None:
        mine = tuple([slots[i] for i in self._indices])
        self._launch(stream, (mine, partials), tuple([factors[i] for i in self._indices]))


class _Blocks:
    """The launches of gram.py over one chunk of samples of some pairs."""

    def __init__(self, pairs: Sequence[Pair], chunk: int, take_partials: Callable[[int], int]):
        self._indices = [p.index for p in pairs]
        entries, warps = _configured([p.gram_entry(chunk) for p in pairs])
        programs = [e.samples * e.parts.value for e in entries]
        self._gram = Launch(fsp_gram, 2 * sum(programs), warps, entries, len(entries))
        blocks = [(e.block_k.value, e.block_k.value) for e in entries]
        self._blocks = [
            (count, GRAM_BLOCKS, *block) for count, block in zip(programs, blocks, strict=True)
        ]
        self._operands = [
            (e.samples, e.kept.value, *block) if e.kept.value else None
            for e, block in zip(entries, blocks, strict=True)
        ]
        grid = sum(e.samples * e.block_k.value // COMBINED_ROWS.value for e in entries)
        first = take_partials(grid)
        self._combine = Launch(fsp_gram_combine, grid, 4, entries, first, len(entries))
        wanted = [sum(m.gradient_dtype is not None for m in p.plan.maps) for p in pairs]
        grid = sum(count * n for count, n in zip(programs, wanted, strict=True))
        self._gradients = None
        if grid:
            self._gradients = Launch(fsp_gram_gradients, grid, warps, entries, len(entries))

    def __call__(
        self, stream: int, slots: Sequence[Slots], factors: Sequence[float], partials: Tensor
    ) -> None:
        mine = tuple([slots[i] for i in self._indices])
        blocks = tuple([partials.new_empty(shape) for shape in self._blocks])
        operands = tuple([x and partials.new_empty(x) for x in self._operands])
        self._gram(stream, (mine, blocks))
        weights = tuple([factors[i] for i in self._indices])
        workspaces = tuple(zip(blocks, operands, strict=True))
        self._combine(stream, (workspaces, partials), weights)
        if self._gradients:
            self._gradients(stream, (mine, operands))


class _Tiles:
    """The launches of tiles.py over one chunk of samples of some pairs."""

    def __init__(self, pairs: Sequence[Pair], chunk: int, take_partials: Callable[[int], int]):
        # Those whose loss the first launch tells come first, and with them their partial losses.
        self._indices = [p.index for p in pairs]
        entries, warps = _configured([p.residual_entry(chunk) for p in pairs])
        programs = [e.samples * e.parts.value * _tiles(e) for e in entries]
        grid = sum(programs)
        told = [count for p, count in zip(pairs, programs, strict=True) if p.plan.finishes]
        first = take_partials(sum(told))
        self._residual = Launch(fsp_residual, grid, warps, entries, first, len(entries))

        self._slopes = [
            ((e.samples, e.m.value, e.n.value), p.plan.slope_dtype)
            for p, e in zip(pairs, entries, strict=True)
        ]
        self._parts = [
            None if p.plan.finishes else (e.parts.value, *shape)
            for p, e, (shape, _) in zip(pairs, entries, self._slopes, strict=True)
        ]
        self._combined = [i for i, p in enumerate(pairs) if not p.plan.finishes]
        if self._combined:
            chosen = tuple(pairs[i].combine_entry(entries[i]) for i in self._combined)
            grid = sum(_combined_tiles(e) for e in chosen)
            first = take_partials(grid)
            self._combine = Launch(fsp_combine, grid, 4, chosen, first, len(chosen))

        products = [p.gradient_entries(e) for p, e in zip(pairs, entries, strict=True)]
        wanted = [(i, *found) for i, each in enumerate(products) for found in each]
        self._by_blas = [x[:3] for x in wanted if pairs[x[0]].plan.blas_gradients]
        launched = [x for x in wanted if not pairs[x[0]].plan.blas_gradients]
        self._products = [(i, own) for i, own, *_ in launched]
        if launched:
            gradients = tuple(entry for _, _, entry, _ in launched)
            warps = max(warps for *_, warps in launched)
            grid = sum(_gradient_tiles(e) for e in gradients)
            self._gradients = Launch(fsp_gradients, grid, warps, gradients, len(gradients))
        self._matrices = [i for i, p in enumerate(pairs) if p.wants_matrix_gradient]
        if self._matrices:
            chosen = tuple(entries[i] for i in self._matrices)
            grid = sum(e.samples * _tiles(e) for e in chosen)
            self._matrix_gradients = Launch(fsp_matrix_gradients, grid, 4, chosen, len(chosen))

    def __call__(
        self, stream: int, slots: Sequence[Slots], factors: Sequence[float], partials: Tensor
    ) -> None:
        mine = tuple([slots[i] for i in self._indices])
        weights = tuple([factors[i] for i in self._indices])
        parts = [None if shape is None else partials.new_empty(shape) for shape in self._parts]
        slopes = [self._slope(i, whole, partials) for i, whole in enumerate(parts)]
        written = tuple([s if p is None else p for s, p in zip(slopes, parts, strict=True)])
        self._residual(stream, (mine, written, partials), weights)
        if self._combined:
            chosen = tuple([(parts[i], slopes[i]) for i in self._combined])
            self._combine(stream, (chosen, partials), tuple([weights[i] for i in self._combined]))
        if self._products:
            pointers = tuple(
                [
                    (mine[i][own], mine[i][4 + own], mine[i][partner_of(own)], slopes[i])
                    for i, own in self._products
                ]
            )
            self._gradients(stream, (pointers,))
        for i, own, entry in self._by_blas:
            _multiply_by_blas(own, mine[i], slopes[i], entry)
        if self._matrices:
            self._matrix_gradients(stream, (tuple([(mine[i], slopes[i]) for i in self._matrices]),))

    def _slope(self, index: int, parts: Tensor | None, partials: Tensor) -> Tensor | None:
        """Where slopes go: over the first part, if that has their dtype."""
        shape, dtype = self._slopes[index]
        if dtype is None:
            return None
        if parts is not None and parts.dtype == dtype:
            return parts[0]
        return partials.new_empty(shape, dtype=dtype)


def _multiply_by_blas(own: int, slots: Slots, slope: Tensor | None, entry: GradientEntry) -> None:
    """Write the gradient of the map number ``own``, as fsp_gradients does."""
    other, gradient = slots[partner_of(own)], slots[4 + own]
    assert slope is not None
    assert other is not None
    assert gradient is not None
    samples = slice(entry.first_sample, entry.first_sample + entry.samples)
    x = slope if own % 2 == 0 else slope.mT
    bmm_into(gradient.flatten(2)[samples], x, other.flatten(2)[samples], entry.ratio)


def _configured(found: Sequence[tuple[Entry, int]]) -> tuple[tuple[Entry, ...], int]:
    """The entries of a launch, and the most warps that any of them wants."""
    return tuple(entry for entry, _ in found), max(warps for _, warps in found)


def _tiles(entry: Entry) -> int:
    rows = triton.cdiv(entry.m.value, entry.block_m.value)
    return rows * triton.cdiv(entry.n.value, entry.block_n.value)


def _combined_tiles(entry: Entry) -> int:
    """What programs of fsp_combine take: tiles, or blocks of columns."""
    columns = triton.cdiv(entry.n.value, entry.block_n.value)
    return entry.samples * (columns if entry.norm.value == "column" else _tiles(entry))


def _gradient_tiles(entry: GradientEntry) -> int:
    rows = triton.cdiv(entry.own_channels.value, entry.block_own.value)
    return entry.samples * rows * triton.cdiv(entry.positions, entry.block_k.value)
