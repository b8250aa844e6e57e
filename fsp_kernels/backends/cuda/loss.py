"""The loss: what is launched for a plan, prepared once and then only launched.

A call is a few launches at most, each over all pairs it serves: one pass in either form, tiles
recomputed, tiles stored (residual, gradients); and the sum of what the blocks left.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from fsp_kernels.backends.cuda.entries import Pair
from fsp_kernels.backends.cuda.extension import index_of, module, scalar_of
from fsp_kernels.backends.fused import Programs, raw_stream, slots_of
from fsp_kernels.loss_plan import LossPlan

_NUMBER = torch.float32.itemsize
_ALIGNMENT = 4  # numbers, 16 bytes: where each workspace begins


class Program:
    """The launches of a plan."""

    def __init__(self, plan: LossPlan, maps: Sequence[Tensor], gradients: Sequence[Tensor | None]):
        self._sizes = [len(p.maps) for p in plan.pairs]
        slots = slots_of(self._sizes, maps, gradients)
        pairs = [
            Pair(i, p, plan, s) for i, (p, s) in enumerate(zip(plan.pairs, slots, strict=True))
        ]
        self._launches = module().Program(index_of(maps[0]), _description(plan))
        for operand in dict.fromkeys(p.operand for p in pairs):
            self._add(operand, [p for p in pairs if p.operand == operand])
        # One tensor holds all workspaces and, after them, the partial losses.
        self._workspaces, stop = [], 0
        for p in pairs:
            self._workspaces.append(stop)
            if p.plan.evaluation == "tiles" and p.stores:
                stop += math.ceil(p.stored_elements / _ALIGNMENT) * _ALIGNMENT
        self._partials = stop
        self._scratch = stop + self._launches.partials

    def __call__(
        self,
        maps: Sequence[Tensor],
        gradients: Sequence[Tensor | None],
        weights: Sequence[float],
    ) -> Tensor:
        scratch = maps[0].new_empty(self._scratch, dtype=torch.float32)
        result = maps[0].new_empty((), dtype=torch.float32)
        start = scratch.data_ptr()
        addresses = []
        for slots, workspace in zip(
            slots_of(self._sizes, maps, gradients), self._workspaces, strict=True
        ):
            addresses += [0 if x is None else x.data_ptr() for x in slots]
            addresses.append(start + _NUMBER * workspace)
        addresses += [start + _NUMBER * self._partials, result.data_ptr()]
        self._launches(raw_stream(maps[0].device), addresses, weights)
        return result

    def _add(self, operand: torch.dtype, pairs: Sequence[Pair]) -> None:
        """The launches of pairs that are multiplied as ``operand``."""
        scalar, launches = scalar_of(operand), self._launches
        # The largest samples first: the small ones fill the device while the last of them end.
        pairs = sorted(pairs, key=lambda p: -p.plan.flops / p.plan.batch)
        one_pass = [p for p in pairs if p.plan.evaluation == "one pass"]
        matrix = [p.one_pass_entry() for p in one_pass if p.plan.form == "matrix"]
        gram = [p.one_pass_entry() for p in one_pass if p.plan.form == "gram"]
        recomputed = [p for p in pairs if p.plan.evaluation == "recomputed tiles"]
        entries = [entry for p in recomputed for entry in p.recompute_entries()]
        for some in _pairs(matrix):
            launches.add_one_pass(scalar, some)
        for some in _pairs(gram):
            launches.add_gram(some)
        for some in _pairs(entries):
            launches.add_recompute(scalar, some)
        self._add_tiles(scalar, [p for p in pairs if p.plan.evaluation == "tiles"])

    def _add_tiles(self, scalar: Any, pairs: Sequence[Pair]) -> None:
        """Chunk after chunk of samples: these share a workspace."""
        chunks = max((math.ceil(p.plan.batch / p.plan.samples) for p in pairs), default=0)
        for chunk in range(chunks):
            chosen = [p for p in pairs if chunk * p.plan.samples < p.plan.batch]
            for some in _pairs([p.residual_entry(chunk) for p in chosen]):
                self._launches.add_residual(scalar, some)
            combined = [p.combine_entry(chunk) for p in chosen if not p.finishes]
            for some in _pairs(combined):
                self._launches.add_combine(some)
            for some in _products(chosen, chunk, Pair.gradient_entries):
                self._launches.add_gradients(scalar, some)
            for some in _products(chosen, chunk, Pair.matrix_gradient_entries):
                self._launches.add_matrix_gradients(some)


def _pairs(entries: Sequence[Any]) -> Iterator[Sequence[Any]]:
    """As many at a time as one launch takes."""
    return _at_a_time(entries, module().most_pairs)


def _products(
    pairs: Sequence[Pair], chunk: int, entries_of: Callable[[Pair, int], list[Any]]
) -> Iterator[Sequence[Any]]:
    entries = [entry for p in pairs for entry in entries_of(p, chunk)]
    return _at_a_time(entries, module().most_products)


def _at_a_time(entries: Sequence[Any], most: int) -> Iterator[Sequence[Any]]:
    return (entries[start : start + most] for start in range(0, len(entries), most))


def _description(plan: LossPlan) -> str:
    """The call, for error messages."""
    pairs = ("(B={}, {} x {}, K={})".format(p.batch, *p.channels, p.positions) for p in plan.pairs)
    return f"fsp_loss of {', '.join(pairs)}"


PROGRAMS = Programs(Program)
