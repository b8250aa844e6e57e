"""The loss by fused kernels: what is launched for a plan, prepared once and then only launched.

A call is a few launches at most, each over all pairs it serves: one pass in either form, or by
tiles (residual, gradients); and the sum of what the programs left.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import count
from operator import truediv
from typing import Any

import torch
import triton
from torch import Tensor

from fsp_kernels.backends.fused import Slots, partner_of, raw_stream, slots_of, tensors_at
from fsp_kernels.backends.triton.elementwise import BLOCK, fsp_finish
from fsp_kernels.backends.triton.entries import Pair
from fsp_kernels.backends.triton.gram import fsp_gram
from fsp_kernels.backends.triton.launch import Launch, Places, device_family
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

Run = Callable[[int, Sequence[Tensor], Sequence[float]], None]


class Program:
    """The launches of a plan, step by step.

    A step is called with all maps, the wanted gradients and, last, the partial losses.
    """

    def __init__(self, plan: LossPlan, tensors: Sequence[Tensor]):
        self._divisors = [p.divisor for p in plan.pairs]
        self._slots = slots_of(plan)
        family = device_family(tensors[0].device)
        pairs = [
            Pair(i, pair, tensors_at(slots, tensors), family, plan.precision)
            for i, (pair, slots) in enumerate(zip(plan.pairs, self._slots, strict=True))
        ]
        self._place = len(tensors)  # of the partial losses
        self._partials = 0
        self._steps = [self._prepare(step, [pairs[i] for i in step.pairs]) for step in plan.steps]
        self._finish = Launch(fsp_finish, 1, 8, self._partials, BLOCK)

    def __call__(self, tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
        stream = raw_stream(tensors[0].device)
        factors = list(map(truediv, weights, self._divisors))
        partials = tensors[0].new_empty(self._partials, dtype=torch.float32)
        tensors = [*tensors, partials]
        for step in self._steps:
            step(stream, tensors, factors)
        result = tensors[0].new_empty((), dtype=torch.float32)
        self._finish(stream, (partials, result))
        return result

    def _take_partials(self, count: int) -> int:
        """The first of as many places for partial losses."""
        self._partials += count
        return self._partials - count

    def _prepare(self, step: Step, pairs: Sequence[Pair]) -> Run:
        slots = tuple(self._slots[p.index] for p in pairs)
        if step.evaluation == "tiles":
            return _Tiles(pairs, slots, self._place, step.chunk, self._take_partials)
        if step.form == "gram":
            configured = [p.gram_entry() for p in pairs]
            scratches = tuple(self._place + 1 + i for i in range(len(pairs)))
            launch = self._launch(fsp_gram, configured, (slots, scratches, self._place))
            return _Gram(launch, pairs, [entry for entry, _ in configured])
        configured = [p.one_pass_entry() for p in pairs]
        return _OnePass(self._launch(fsp_one_pass, configured, (slots, self._place)), pairs)

    def _launch(
        self, kernel: Any, configured: Sequence[tuple[Entry, int]], places: Places
    ) -> Launch:
        """Of a kernel with one program for each sample."""
        entries = tuple(entry for entry, _ in configured)
        warps = max(warps for _, warps in configured)
        grid = sum(entry.samples for entry in entries)
        first = self._take_partials(grid)
        return Launch(kernel, grid, warps, entries, first, len(entries), places=places)


class _OnePass:
    """One launch of one_pass.py."""

    def __init__(self, launch: Launch, pairs: Sequence[Pair]):
        self._launch = launch
        self._indices = [p.index for p in pairs]

    def __call__(self, stream: int, tensors: Sequence[Tensor], factors: Sequence[float]) -> None:
        self._launch(stream, tensors, tuple([factors[i] for i in self._indices]))


class _Gram:
    """One launch of gram.py, with the memory its blocks wait in."""

    def __init__(self, launch: Launch, pairs: Sequence[Pair], entries: Sequence[Entry]):
        self._launch = launch
        self._indices = [p.index for p in pairs]
        self._scratches = [e.samples * e.kept.value * e.block_k.value**2 for e in entries]

    def __call__(self, stream: int, tensors: Sequence[Tensor], factors: Sequence[float]) -> None:
        scratches = [tensors[-1].new_empty(n) for n in self._scratches]
        weights = tuple([factors[i] for i in self._indices])
        self._launch(stream, [*tensors, *scratches], weights)


class _Tiles:
    """The launches of tiles.py over one chunk of samples of some pairs."""

    def __init__(
        self,
        pairs: Sequence[Pair],
        slots: tuple[Slots, ...],
        partials: int,
        chunk: int,
        take_partials: Callable[[int], int],
    ):
        # Those whose loss the first launch tells come first, and with them their partial losses.
        self._indices = [p.index for p in pairs]
        configured = [p.residual_entry(chunk) for p in pairs]
        entries = tuple(entry for entry, _ in configured)
        self._slopes = [
            ((e.samples, e.m.value, e.n.value), p.plan.slope_dtype)
            for p, e in zip(pairs, entries, strict=True)
        ]
        self._parts = [
            None if p.plan.finishes else (e.parts.value, *shape)
            for p, e, (shape, _) in zip(pairs, entries, self._slopes, strict=True)
        ]
        place = count(partials + 1)
        parts = [None if shape is None else next(place) for shape in self._parts]
        slopes = [None if dtype is None else next(place) for _, dtype in self._slopes]

        warps = max(warps for _, warps in configured)
        programs = [e.samples * e.parts.value * _tiles(e) for e in entries]
        grid = sum(programs)
        told = [number for p, number in zip(pairs, programs, strict=True) if p.plan.finishes]
        first = take_partials(sum(told))
        written = tuple(s if p is None else p for s, p in zip(slopes, parts, strict=True))
        places: Places = (slots, written, partials)
        self._residual = Launch(
            fsp_residual, grid, warps, entries, first, len(entries), places=places
        )

        self._combined = [i for i, p in enumerate(pairs) if not p.plan.finishes]
        if self._combined:
            chosen = tuple(pairs[i].combine_entry(entries[i]) for i in self._combined)
            grid = sum(_combined_tiles(e) for e in chosen)
            first = take_partials(grid)
            places = tuple((parts[i], slopes[i]) for i in self._combined), partials
            self._combine = Launch(fsp_combine, grid, 4, chosen, first, len(chosen), places=places)

        products = [p.gradient_entries(e) for p, e in zip(pairs, entries, strict=True)]
        gradients = tuple(entry for found in products for _, entry, _ in found)
        self._gradients = None
        if gradients:
            warps = max(warps for found in products for *_, warps in found)
            grid = sum(_gradient_tiles(e) for e in gradients)
            places = tuple(
                (own_slots[own], own_slots[4 + own], own_slots[partner_of(own)], slope)
                for own_slots, slope, found in zip(slots, slopes, products, strict=True)
                for own, *_ in found
            )
            self._gradients = Launch(
                fsp_gradients, grid, warps, gradients, len(gradients), places=(places,)
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
        if self._matrix_gradients is not None:
            self._matrix_gradients(stream, tensors)

    def _slope(self, index: int, parts: Tensor | None, partials: Tensor) -> Tensor | None:
        """Where slopes go: over the first part, if that has their dtype."""
        shape, dtype = self._slopes[index]
        if dtype is None:
            return None
        if parts is not None and parts.dtype == dtype:
            return parts[0]
        return partials.new_empty(shape, dtype=dtype)


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
