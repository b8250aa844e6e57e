"""Prepare and run the launches of a planned loss.

A call has a few launches, each for as many pairs as possible: one pass; tiles (residual,
gradients); Gram form (blocks, their sum, gradients). A last launch adds the partial losses.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import count
from operator import add, itemgetter, truediv

import torch
import triton
from torch import Tensor

from fsp_kernels.backends.devices import raw_stream
from fsp_kernels.backends.tensors import Slots, mask_slots_of, partner_of, slots_of, tensors_at
from fsp_kernels.backends.torch_backend import bmm_into
from fsp_kernels.backends.triton.elementwise import BLOCK, fsp_finish
from fsp_kernels.backends.triton.entries import PlannedPair
from fsp_kernels.backends.triton.gram import (
    COMBINED_ROWS,
    fsp_gram,
    fsp_gram_combine,
    fsp_gram_gradients,
)
from fsp_kernels.backends.triton.launch import Launch, Places, device_family
from fsp_kernels.backends.triton.one_pass import fsp_one_pass
from fsp_kernels.backends.triton.residual import COUNTS, MASK, Entry
from fsp_kernels.backends.triton.tiles import (
    GradientEntry,
    fsp_combine,
    fsp_gradients,
    fsp_matrix_gradients,
    fsp_residual,
)
from fsp_kernels.loss_plan import LAUNCH_SUMS, LaunchGroup, LossPlan
from fsp_kernels.plan import GRAM_BLOCKS

Run = Callable[[int, Sequence[Tensor], Sequence[float]], None]


class PreparedLoss:
    """The launches of a plan, group by group.

    A group is called with a list of all maps, the wanted gradients, the masks and their counts and,
    last, the partial losses.
    """

    def __init__(self, plan: LossPlan, tensors: Sequence[Tensor]):
        self._divisors = [p.divisor for p in plan.pairs]
        self._slots = list(map(add, slots_of(plan), mask_slots_of(plan)))
        family = device_family(tensors[0].device)
        pairs = [
            PlannedPair(i, pair, tensors_at(slots, tensors), family, plan.precision)
            for i, (pair, slots) in enumerate(zip(plan.pairs, self._slots, strict=True))
        ]
        self._partials = partials = _Partials(len(tensors))
        self._groups = [
            _prepare(group, [pairs[i] for i in group.pairs], self._slots, partials)
            for group in plan.launch_groups
        ]
        self._result_shape = (len(pairs),) if plan.by_pair else ()
        sums = partials.ranges(len(pairs)) if plan.by_pair else ((0, partials.count),)
        self._finish = []
        for first in range(0, len(sums), LAUNCH_SUMS):
            ranges = sums[first : first + LAUNCH_SUMS]
            constants = ranges, first, len(ranges), BLOCK
            self._finish.append(Launch(fsp_finish, len(ranges), 8, *constants))

    def __call__(self, tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
        stream = raw_stream(tensors[0].device)
        factors = list(map(truediv, weights, self._divisors))
        partials = tensors[0].new_empty(self._partials.count, dtype=torch.float32)
        tensors = [*tensors, partials]
        for run in self._groups:
            run(stream, tensors, factors)
        result = tensors[0].new_empty(self._result_shape, dtype=torch.float32)
        for finish in self._finish:
            finish(stream, (partials, result))
        return result


class _Partials:
    """The places of the partial losses. Those of a pair are neighbours, of all its samples.

    ``slot`` is the index of their tensor in the list of a call.
    """

    def __init__(self, slot: int):
        self.slot = slot
        self.count = 0
        self._ranges: dict[int, tuple[int, int]] = {}

    def place(self, pair: PlannedPair, entry: Entry, each: int) -> int:
        """The first place of an entry, which has ``each`` partial losses for a sample."""
        if pair.index not in self._ranges:
            start = self.count
            self.count += each * pair.plan.batch
            self._ranges[pair.index] = start, self.count
        return self._ranges[pair.index][0] + each * entry.first_sample

    def ranges(self, pairs: int) -> tuple[tuple[int, int], ...]:
        """Start and stop of each pair's."""
        return tuple(self._ranges[i] for i in range(pairs))


def _prepare(
    group: LaunchGroup,
    pairs: Sequence[PlannedPair],
    all_slots: Sequence[Slots],
    partials: _Partials,
) -> Run:
    slots = tuple(all_slots[p.index] for p in pairs)
    if group.evaluation == "one pass":
        return _OnePass(pairs, slots, partials)
    stored = _Tiles if group.evaluation == "tiles" else _GramBlocks
    return stored(pairs, slots, group.chunk, partials)


class _OnePass:
    """The launch of one_pass.py."""

    def __init__(
        self,
        pairs: Sequence[PlannedPair],
        slots: tuple[Slots, ...],
        partials: _Partials,
    ):
        self._indices = [p.index for p in pairs]
        entries, warps = _entries_and_warps([p.one_pass_entry() for p in pairs])
        grid = sum(e.samples for e in entries)
        losses = tuple(partials.place(p, e, 1) for p, e in zip(pairs, entries, strict=True))
        constants = entries, losses, len(entries)
        places: Places = slots, partials.slot
        self._launch = Launch(fsp_one_pass, grid, warps, *constants, places=places)

    def __call__(self, stream: int, tensors: Sequence[Tensor], factors: Sequence[float]) -> None:
        self._launch(stream, tensors, tuple([factors[i] for i in self._indices]))


class _GramBlocks:
    """The launches of gram.py over one chunk of samples of some pairs."""

    def __init__(
        self,
        pairs: Sequence[PlannedPair],
        slots: tuple[Slots, ...],
        chunk: int,
        partials: _Partials,
    ):
        self._indices = [p.index for p in pairs]
        entries, warps = _entries_and_warps([p.gram_entry(chunk) for p in pairs])
        programs = [e.samples * e.parts.value for e in entries]
        sides = [e.block_k.value for e in entries]
        self._stored = [
            (number, GRAM_BLOCKS, k, k) for number, k in zip(programs, sides, strict=True)
        ]
        place = count(partials.slot + 1)
        blocks = tuple(next(place) for _ in pairs)
        operands = tuple(next(place) if e.operand_count.value else None for e in entries)
        self._stored += [
            (e.samples, e.operand_count.value, k, k)
            for e, k in zip(entries, sides, strict=True)
            if e.operand_count.value
        ]

        grid = GRAM_BLOCKS * sum(programs)
        self._gram = Launch(fsp_gram, grid, warps, entries, len(entries), places=(slots, blocks))
        each = [k // COMBINED_ROWS.value for k in sides]
        grid = sum(e.samples * programs for e, programs in zip(entries, each, strict=True))
        losses = tuple(map(partials.place, pairs, entries, each))
        constants = entries, losses, len(entries)
        counts = [own_slots[COUNTS.value] for own_slots in slots]
        places: Places = tuple(zip(blocks, operands, counts, strict=True)), partials.slot
        self._combine = Launch(fsp_gram_combine, grid, 4, *constants, places=places)
        wanted = [sum(m.gradient_dtype is not None for m in p.plan.maps) for p in pairs]
        grid = sum(number * n for number, n in zip(programs, wanted, strict=True))
        self._gradients = None
        if grid:
            self._gradients = Launch(
                fsp_gram_gradients, grid, warps, entries, len(entries), places=(slots, operands)
            )

    def __call__(self, stream: int, tensors: Sequence[Tensor], factors: Sequence[float]) -> None:
        tensors = [*tensors, *[tensors[-1].new_empty(shape) for shape in self._stored]]
        self._gram(stream, tensors)
        self._combine(stream, tensors, tuple([factors[i] for i in self._indices]))
        if self._gradients is not None:
            self._gradients(stream, tensors)


class _Tiles:
    """The launches of tiles.py over one chunk of samples of some pairs."""

    def __init__(
        self,
        pairs: Sequence[PlannedPair],
        slots: tuple[Slots, ...],
        chunk: int,
        partials: _Partials,
    ):
        self._indices = [p.index for p in pairs]
        entries, warps = _entries_and_warps([p.residual_entry(chunk) for p in pairs])
        self._slopes = [
            ((e.samples, e.m.value, e.n.value), p.plan.slope_dtype)
            for p, e in zip(pairs, entries, strict=True)
        ]
        self._parts = [
            None if p.plan.finishes else (e.parts.value, *shape)
            for p, e, (shape, _) in zip(pairs, entries, self._slopes, strict=True)
        ]
        place = count(partials.slot + 1)
        parts = [None if shape is None else next(place) for shape in self._parts]
        slopes = [None if dtype is None else next(place) for _, dtype in self._slopes]

        grid = sum(e.samples * e.parts.value * _tiles(e) for e in entries)
        losses = tuple(
            partials.place(p, e, e.parts.value * _tiles(e)) if p.plan.finishes else 0
            for p, e in zip(pairs, entries, strict=True)
        )
        written = tuple(s if p is None else p for s, p in zip(slopes, parts, strict=True))
        places: Places = (slots, written, partials.slot)
        self._residual = Launch(
            fsp_residual, grid, warps, entries, losses, len(entries), places=places
        )

        self._combined = [i for i, p in enumerate(pairs) if not p.plan.finishes]
        if self._combined:
            chosen = tuple(pairs[i].combine_entry(entries[i]) for i in self._combined)
            each = [_combined_tiles(e) for e in chosen]
            grid = sum(e.samples * programs for e, programs in zip(chosen, each, strict=True))
            losses = tuple(map(partials.place, [pairs[i] for i in self._combined], chosen, each))
            workspaces = tuple(
                (parts[i], slopes[i], slots[i][COUNTS.value]) for i in self._combined
            )
            places = workspaces, partials.slot
            self._combine = Launch(fsp_combine, grid, 4, chosen, losses, len(chosen), places=places)

        found = [
            (
                _gradient_places(own_slots, slope, own),
                _of_both_maps(entry) if p.plan.symmetric else entry,
                warps,
                p.plan,
                own,
            )
            for p, e, own_slots, slope in zip(pairs, entries, slots, slopes, strict=True)
            for own, entry, warps in p.gradient_entries(e)
        ]
        self._by_blas = [
            (itemgetter(*places[1:4]), own, entry)
            for places, entry, _, plan, own in found
            if plan.blas_gradients
        ]
        launched = [x[:3] for x in found if not x[3].blas_gradients]
        self._gradients = None
        if launched:
            places, gradients, each = zip(*launched, strict=True)
            grid = sum(_gradient_tiles(e) for e in gradients)
            self._gradients = Launch(
                fsp_gradients, grid, max(each), gradients, len(gradients), places=(places,)
            )
        matrices = [i for i, p in enumerate(pairs) if p.wants_matrix_gradient]
        self._matrix_gradients = None
        if matrices:
            chosen = tuple(entries[i] for i in matrices)
            grid = sum(e.samples * _tiles(e) for e in chosen)
            places = tuple((slots[i], slopes[i]) for i in matrices)
            self._matrix_gradients = Launch(
                fsp_matrix_gradients, grid, 4, chosen, len(chosen), places=(places,)
            )

    def __call__(self, stream: int, tensors: Sequence[Tensor], factors: Sequence[float]) -> None:
        partials = tensors[-1]
        weights = tuple([factors[i] for i in self._indices])
        parts = [None if shape is None else partials.new_empty(shape) for shape in self._parts]
        slopes = [self._slope(i, whole, partials) for i, whole in enumerate(parts)]
        tensors = [*tensors, *[x for x in (*parts, *slopes) if x is not None]]
        self._residual(stream, tensors, weights)
        if self._combined:
            self._combine(stream, tensors, tuple([weights[i] for i in self._combined]))
        if self._gradients is not None:
            self._gradients(stream, tensors)
        for operands_of, own, entry in self._by_blas:
            gradient, other, slope = operands_of(tensors)
            _multiply_by_blas(gradient, other, slope, own, entry)
        if self._matrix_gradients is not None:
            self._matrix_gradients(stream, tensors)

    def _slope(self, index: int, parts: Tensor | None, partials: Tensor) -> Tensor | None:
        """The tensor for a pair's slopes: the memory of the first part, if the dtypes are equal."""
        shape, dtype = self._slopes[index]
        if dtype is None:
            return None
        if parts is not None and parts.dtype == dtype:
            return parts[0]
        return partials.new_empty(shape, dtype=dtype)


def _of_both_maps(entry: GradientEntry) -> GradientEntry:
    """The gradient of a map that is both maps of its pair: twice that of one."""
    return entry._replace(ratio=2 * entry.ratio)


def _gradient_places(slots: Slots, slope: int | None, own: int) -> Places:
    """What fsp_gradients takes for the map number ``own`` of a pair with these slots.

    Last are the counts that multiply and divide the ratio: the slope is divided by the student's
    counts. If the teacher's mask is another, its gradients must be divided by its own instead.
    """
    mask, counts = slots[MASK.value + own // 2], slots[COUNTS.value :]
    of_ratio = (None, None) if own < 2 or counts[0] == counts[1] else counts
    return slots[own], slots[4 + own], slots[partner_of(own)], slope, mask, *of_ratio


def _multiply_by_blas(
    gradient: Tensor, other: Tensor, slope: Tensor, own: int, entry: GradientEntry
) -> None:
    """Write the gradient of the map number ``own`` by PyTorch, instead of fsp_gradients."""
    samples = slice(entry.first_sample, entry.first_sample + entry.samples)
    x = slope if own % 2 == 0 else slope.mT
    bmm_into(gradient.flatten(2)[samples], x, other.flatten(2)[samples], entry.ratio)


def _entries_and_warps(found: Sequence[tuple[Entry, int]]) -> tuple[tuple[Entry, ...], int]:
    """The entries of a launch, and the largest number of warps among them."""
    return tuple(entry for entry, _ in found), max(warps for _, warps in found)


def _tiles(entry: Entry) -> int:
    rows = triton.cdiv(entry.m.value, entry.block_m.value)
    return rows * triton.cdiv(entry.n.value, entry.block_n.value)


def _combined_tiles(entry: Entry) -> int:
    """Programs of fsp_combine for a sample: one for each tile, or block of columns."""
    columns: int = triton.cdiv(entry.n.value, entry.block_n.value)
    return columns if entry.norm.value == "column" else _tiles(entry)


def _gradient_tiles(entry: GradientEntry) -> int:
    rows = triton.cdiv(entry.own_channels.value, entry.block_own.value)
    return entry.samples * rows * triton.cdiv(entry.positions, entry.block_k.value)
