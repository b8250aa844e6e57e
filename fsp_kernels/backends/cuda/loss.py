"""Prepare and run the launches of a planned loss.

A call has a few launches, each for as many pairs as possible: one pass in either form; or tiles
(residual, gradients). A last launch adds the partial losses.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor

from fsp_kernels.backends.cuda.entries import SLOTS, PlannedPair
from fsp_kernels.backends.cuda.extension import index_of, module, scalar_of
from fsp_kernels.backends.devices import raw_stream
from fsp_kernels.backends.tensors import mask_slots_of, slots_of, tensors_at
from fsp_kernels.loss_plan import LaunchGroup, LossPlan
from fsp_kernels.plan import FP32_BYTES

_ALIGNMENT = 16  # bytes: each workspace begins at a multiple of it


class PreparedLoss:
    """The launches of a plan."""

    def __init__(self, plan: LossPlan, tensors: Sequence[Tensor]):
        all_slots = slots_of(plan)
        # Masks and counts, which pairs share, follow the addresses of all pairs.
        first_mask, after_pairs = len(plan.maps) + len(plan.wanted), SLOTS * len(plan.pairs)
        mask_slots = [
            [None if x is None else x - first_mask + after_pairs for x in slots]
            for slots in mask_slots_of(plan)
        ]
        pairs = [
            PlannedPair(i, p, tensors_at(slots, tensors), masks, plan.precision)
            for i, (p, slots, masks) in enumerate(
                zip(plan.pairs, all_slots, mask_slots, strict=True)
            )
        ]
        self._launches = module().LaunchSequence(
            index_of(tensors[0]), _description(plan), by_pair=plan.by_pair
        )
        self._result_shape = (len(pairs),) if plan.by_pair else ()
        # One tensor holds the workspaces of a group and, behind them, the partial losses. The next
        # group reuses the memory of the workspaces. For each pair: the offsets, in bytes, of its
        # workspace and of its slopes.
        workspaces = [(0, p.slopes_offset) for p in pairs]
        partials = 0
        for group in plan.launch_groups:
            self._add(group, [pairs[i] for i in group.pairs])
            stop = 0
            for i in group.pairs if group.chunk == 0 else ():
                workspaces[i] = stop, stop + pairs[i].slopes_offset
                stop += math.ceil(plan.pairs[i].scratch_bytes / _ALIGNMENT) * _ALIGNMENT
            partials = max(partials, stop)
        self._scratch = partials // FP32_BYTES + self._launches.partials
        # Arranges the addresses of a call for the launches. The last one, 0, stands for a missing
        # tensor.
        count = len(tensors)
        places = [
            -1 if x is None else x
            for i, slots in enumerate(all_slots)
            for x in (*slots, count + 2 * i, count + 2 * i + 1)
        ]
        places += range(first_mask, count)
        count += 2 * len(pairs)
        self._arrange = itemgetter(*places, count, count + 1)
        self._offsets = [*chain.from_iterable(workspaces), partials]

    def __call__(self, tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
        scratch = tensors[0].new_empty(self._scratch, dtype=torch.float32)
        result = tensors[0].new_empty(self._result_shape, dtype=torch.float32)
        start = scratch.data_ptr()
        unordered = list(map(Tensor.data_ptr, tensors))
        unordered += [start + offset for offset in self._offsets]
        addresses = self._arrange([*unordered, result.data_ptr(), 0])
        self._launches(raw_stream(tensors[0].device), addresses, weights)
        return result

    def _add(self, group: LaunchGroup, pairs: Sequence[PlannedPair]) -> None:
        scalar, launches = scalar_of(pairs[0].operand), self._launches
        if group.evaluation == "tiles":
            self._add_tiles(scalar, pairs, group.chunk)
        elif group.form == "gram":
            launches.add_gram([p.one_pass_entry() for p in pairs])
        else:
            launches.add_one_pass(scalar, [p.one_pass_entry() for p in pairs])

    def _add_tiles(self, scalar: Any, pairs: Sequence[PlannedPair], chunk: int) -> None:
        self._launches.add_residual(scalar, [p.residual_entry(chunk) for p in pairs])
        combined = [p.combine_entry(chunk) for p in pairs if not p.plan.finishes]
        if combined:
            self._launches.add_combine(combined)
        for entries in _entries_by_launch(pairs, chunk, PlannedPair.gradient_entries):
            self._launches.add_gradients(scalar, entries)
        for entries in _entries_by_launch(pairs, chunk, PlannedPair.matrix_gradient_entries):
            self._launches.add_matrix_gradients(entries)


def _entries_by_launch(
    pairs: Sequence[PlannedPair], chunk: int, entries_of: Callable[[PlannedPair, int], list[Any]]
) -> Iterator[Sequence[Any]]:
    entries = [entry for p in pairs for entry in entries_of(p, chunk)]
    return _at_a_time(entries, module().most_products)


def _at_a_time(entries: Sequence[Any], most: int) -> Iterator[Sequence[Any]]:
    return (entries[start : start + most] for start in range(0, len(entries), most))


def _description(plan: LossPlan) -> str:
    """A description of the call for error messages."""
    pairs = ("(B={}, {} x {}, K={})".format(p.batch, *p.channels, p.positions) for p in plan.pairs)
    return f"fsp_loss of {', '.join(pairs)}"
