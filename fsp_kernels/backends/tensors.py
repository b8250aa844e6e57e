"""The tensors of a planned loss: which belong to each pair, and pooling before the kernels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fsp_kernels.loss_plan import LossPlan, MapPlan
from fsp_kernels.pooling import pool, unpool

# Of one pair: the indices of the tensors a, b, c, d and of their gradients; None if missing.
Slots = tuple[int | None, ...]


class PooledMap:
    """A map that no kernel can pool. PyTorch pools it before the kernels read it."""

    def __init__(self, x: Tensor, gradient: Tensor | None, plan: MapPlan):
        assert plan.pooled_size is not None
        self._target, self._size, self._mode = gradient, plan.pooled_size, plan.pool
        x = x.to(plan.read.dtype)
        pooled, self._indices = pool(x, self._size, self._mode, indexed=gradient is not None)
        self.map = pooled.contiguous().view(plan.read.shape)
        self.gradient = None
        if gradient is not None:
            dtype = plan.read.gradient_dtype
            self.gradient = torch.empty(plan.read.shape, dtype=dtype, device=x.device)

    def unpool(self) -> None:
        """Write the map's gradient from that of the pooled map."""
        if self._target is not None and self.gradient is not None:
            flat = self.gradient.flatten(2)
            unpool(flat, self._target, self._size, self._mode, self._indices)


def pool_maps(tensors: list[Tensor], plan: LossPlan) -> list[PooledMap]:
    """Pool the maps that no kernel can pool; replaces them and their gradients in ``tensors``."""
    found = []
    gradients = _gradient_places(plan)
    for i, m in enumerate(plan.maps):
        if not m.fused_windows:
            place = gradients.get(i)
            x = PooledMap(tensors[i], None if place is None else tensors[place], m)
            tensors[i] = x.map
            if place is not None and x.gradient is not None:
                tensors[place] = x.gradient
            found.append(x)
    return found


def _gradient_places(plan: LossPlan) -> dict[int, int]:
    """By index of a map: the index of its gradient in the list of all maps and wanted gradients."""
    return {i: len(plan.maps) + k for k, i in enumerate(plan.wanted)}


def slots_of(plan: LossPlan) -> list[Slots]:
    """For each pair, the indices of its tensors in the list of all maps and wanted gradients."""
    gradients = _gradient_places(plan)
    slots, start = [], 0
    for pair in plan.pairs:
        maps = range(start, start + len(pair.maps))
        padding = (None,) * (4 - len(maps))
        slots.append((*maps, *padding, *map(gradients.get, maps), *padding))
        start += len(maps)
    return slots


def tensors_at(slots: Slots, tensors: Sequence[Tensor]) -> list[Tensor | None]:
    return [None if x is None else tensors[x] for x in slots]


def elements_of(x: Tensor) -> Sequence[Tensor]:
    """The elements of a vector, or the scalar itself."""
    return x.unbind() if x.dim() else (x,)


def partner_of(own: int) -> int:
    """The number of the other map of the same network; a, b, c, d are 0, 1, 2, 3."""
    return own ^ 1
