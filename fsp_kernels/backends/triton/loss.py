"""The loss by fused kernels: what is launched for a plan, prepared once and then only launched.

A call is a few launches at most, each over all pairs it serves: one pass in either form, tiles
recomputed, tiles stored (residual, gradients); and the sum of what the programs left.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from fsp_kernels.backends.fused import Programs, Slots, partner_of, raw_stream, slots_of
from fsp_kernels.backends.triton.elementwise import BLOCK, fsp_finish
from fsp_kernels.backends.triton.entries import Pair, swap
from fsp_kernels.backends.triton.gram import fsp_gram
from fsp_kernels.backends.triton.launch import Launch, device_family
from fsp_kernels.backends.triton.one_pass import fsp_one_pass
from fsp_kernels.backends.triton.recompute import fsp_recompute
from fsp_kernels.backends.triton.residual import Entry
from fsp_kernels.backends.triton.tiles import (
    GradientEntry,
    fsp_combine,
    fsp_gradients,
    fsp_residual,
)
from fsp_kernels.loss_plan import LossPlan

Step = Callable[[int, Sequence[Slots], Sequence[float], Tensor], None]


# Of one launch: a kernel has code for each of its pairs, and takes as long to compile.
_MOST_PAIRS = 8


class Program:
    """The launches of a plan."""

    def __init__(self, plan: LossPlan, maps: Sequence[Tensor], gradients: Sequence[Tensor | None]):
        self._divisors = [
            p.batch * (math.prod(p.channels) if plan.norm == "mse" else 1) for p in plan.pairs
        ]
        self._sizes = [len(p.maps) for p in plan.pairs]
        family = device_family()
        slots = slots_of(self._sizes, maps, gradients)
        pairs = [
            Pair(i, pair, plan, s, family)
            for i, (pair, s) in enumerate(zip(plan.pairs, slots, strict=True))
        ]
        self._steps: list[Step] = []
        self._partials = 0
        for evaluation, build in (
            ("one pass", self._add_one_pass),
            ("recomputed tiles", self._add_recompute),
            ("tiles", self._add_tiles),
        ):
            chosen = [p for p in pairs if p.plan.evaluation == evaluation]
            for start in range(0, len(chosen), _MOST_PAIRS):
                build(chosen[start : start + _MOST_PAIRS])
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

    def _add_one_pass(self, pairs: Sequence[Pair]) -> None:
        # The largest samples first: the small ones fill the device while the last of them end.
        pairs = sorted(pairs, key=lambda p: -p.plan.flops / p.plan.batch)
        matrix = [p for p in pairs if p.plan.form == "matrix"]
        if matrix:
            launch = self._launch(fsp_one_pass, [p.one_pass_entry() for p in matrix])
            self._steps.append(_OnSlots(launch, [(p.index, False) for p in matrix]))
        gram = [p for p in pairs if p.plan.form == "gram"]
        if gram:
            configured = [p.gram_entry() for p in gram]
            launch = self._launch(fsp_gram, configured)
            self._steps.append(_Gram(launch, gram, [entry for entry, _ in configured]))

    def _launch(self, kernel: Any, configured: Sequence[tuple[Entry, int]]) -> Launch:
        """Of a kernel with one program for each sample."""
        entries = tuple(entry for entry, _ in configured)
        warps = max(warps for _, warps in configured)
        grid = sum(entry.samples for entry in entries)
        return Launch(kernel, grid, warps, entries, self._take_partials(grid), len(entries))

    def _add_recompute(self, pairs: Sequence[Pair]) -> None:
        # One side of each pair tells the loss: these come first, so that their partial losses are
        # those of the first programs.
        sides = [(p, p.sides_with_gradients()[0]) for p in pairs]
        sides += [(p, swapped) for p in pairs for swapped in p.sides_with_gradients()[1:]]
        configured = [p.recompute_entry(swapped) for p, swapped in sides]
        entries = tuple(entry for entry, _ in configured)
        warps = max(warps for _, warps in configured)
        programs = [e.samples * triton.cdiv(e.m.value, e.block_m.value) for e in entries]
        grid = sum(programs)
        first = self._take_partials(sum(programs[: len(pairs)]))
        launch = Launch(fsp_recompute, grid, warps, entries, first, len(entries))
        self._steps.append(_OnSlots(launch, [(p.index, swapped) for p, swapped in sides]))

    def _add_tiles(self, pairs: Sequence[Pair]) -> None:
        chunks = max(triton.cdiv(p.plan.batch, p.plan.samples) for p in pairs)
        for chunk in range(chunks):
            chosen = [p for p in pairs if chunk * p.plan.samples < p.plan.batch]
            self._steps.append(_Tiles(chosen, chunk, self._take_partials))


_PROGRAMS = Programs(Program)
loss = _PROGRAMS.loss


class _OnSlots:
    """One launch on the maps and gradients of some pairs, some with their sides swapped."""

    def __init__(self, launch: Launch, pairs: Sequence[tuple[int, bool]]):
        self._launch = launch
        self._pairs = pairs

    def __call__(
        self, stream: int, slots: Sequence[Slots], factors: Sequence[float], partials: Tensor
    ) -> None:
        chosen = tuple([swap(slots[i]) if swapped else slots[i] for i, swapped in self._pairs])
        self._launch(stream, (chosen, partials), tuple([factors[i] for i, _ in self._pairs]))


class _Gram:
    """One launch of gram.py, with the memory its blocks wait in."""

    def __init__(self, launch: Launch, pairs: Sequence[Pair], entries: Sequence[Entry]):
        self._launch = launch
        self._indices = [p.index for p in pairs]
        self._scratches = [e.samples * e.kept.value * e.block_k.value**2 for e in entries]

    def __call__(
        self, stream: int, slots: Sequence[Slots], factors: Sequence[float], partials: Tensor
    ) -> None:
        chosen = tuple([slots[i] for i in self._indices])
        scratches = tuple([partials.new_empty(n) for n in self._scratches])
        weights = tuple([factors[i] for i in self._indices])
        self._launch(stream, (chosen, scratches, partials), weights)


class _Tiles:
    """The launches of tiles.py over one chunk of samples of some pairs."""

    def __init__(self, pairs: Sequence[Pair], chunk: int, take_partials: Callable[[int], int]):
        # Those whose loss the first launch tells come first, so that their partial losses are those
        # of the first programs.
        pairs = sorted(pairs, key=lambda p: not p.finishes)
        self._indices = [p.index for p in pairs]
        configured = [p.residual_entry(chunk) for p in pairs]
        entries = tuple(entry for entry, _ in configured)
        warps = max(warps for _, warps in configured)
        programs = [e.samples * e.parts.value * _tiles(e) for e in entries]
        grid = sum(programs)
        told = [count for p, count in zip(pairs, programs, strict=True) if p.finishes]
        first = take_partials(sum(told))
        self._residual = Launch(fsp_residual, grid, warps, entries, first, len(entries))

        self._workspaces = [
            (e.parts.value * e.samples, e.m.value, e.n.value) if p.stores else None
            for p, e in zip(pairs, entries, strict=True)
        ]
        self._combined = [i for i, p in enumerate(pairs) if not p.finishes]
        if self._combined:
            chosen = tuple(entries[i] for i in self._combined)
            grid = sum(e.samples * triton.cdiv(e.n.value, e.block_n.value) for e in chosen)
            first = take_partials(grid)
            self._combine = Launch(fsp_combine, grid, warps, chosen, first, len(chosen))

        products = [p.gradient_entries(e) for p, e in zip(pairs, entries, strict=True)]
        self._products = [
            (i, own, scale) for i, found in enumerate(products) for own, scale, _, _ in found
        ]
        if self._products:
            gradients = tuple(entry for found in products for _, _, entry, _ in found)
            warps = max(warps for found in products for *_, warps in found)
            grid = sum(_gradient_tiles(e) for e in gradients)
            self._gradients = Launch(fsp_gradients, grid, warps, gradients, len(gradients))
        self._matrices = [
            (i, e.first_sample, e.samples, pairs[i].slope_scale)
            for i, e in enumerate(entries)
            if e.residual.value == "ready" and e.gradients[2] is not None
        ]

    def __call__(
        self, stream: int, slots: Sequence[Slots], factors: Sequence[float], partials: Tensor
    ) -> None:
        mine = tuple([slots[i] for i in self._indices])
        weights = tuple([factors[i] for i in self._indices])
        workspaces = tuple(
            [None if shape is None else partials.new_empty(shape) for shape in self._workspaces]
        )
        self._residual(stream, (mine, workspaces, partials), weights)
        if self._combined:
            chosen = tuple([workspaces[i] for i in self._combined])
            self._combine(stream, (chosen, partials), tuple([weights[i] for i in self._combined]))
        if self._products:
            pointers = tuple(
                [
                    (mine[i][own], mine[i][4 + own], mine[i][partner_of(own)], workspaces[i])
                    for i, own, _ in self._products
                ]
            )
            scales = tuple([scale * weights[i] for i, _, scale in self._products])
            self._gradients(stream, (pointers,), scales)
        for i, start, samples, scale in self._matrices:
            out, slope = mine[i][6], workspaces[i]
            assert out is not None
            assert slope is not None
            out[start : start + samples].copy_(slope[:samples].mul_(-scale * weights[i]))


def _tiles(entry: Entry) -> int:
    rows = triton.cdiv(entry.m.value, entry.block_m.value)
    return rows * triton.cdiv(entry.n.value, entry.block_n.value)


def _gradient_tiles(entry: GradientEntry) -> int:
    rows = triton.cdiv(entry.own_channels.value, entry.block_own.value)
    return entry.samples * rows * triton.cdiv(entry.positions, entry.block_k.value)
