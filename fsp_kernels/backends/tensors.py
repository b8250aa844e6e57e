"""The tensors of a planned loss: where those of each pair are, and pooling ahead of the kernels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fsp_kernels.loss_plan import LossPlan, MapPlan
from fsp_kernels.pooling import pool, unpool

# Of one pair: the positions of a, b, c, d and of their gradients; None where there is none.
Slots = tuple[int | None, ...]


class PooledMap:
    """A map whose windows no kernel takes, pooled by PyTorch before the kernels see it."""

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
        if self._target is not None and self.gradient is not None:
            flat = self.gradient.flatten(2)
            unpool(flat, self._target, self._size, self._mode, self._indices)


def pool_maps(tensors: list[Tensor], plan: LossPlan) -> list[PooledMap]:
    """Let pooled maps and their gradients take the places of those that no kernel can pool."""
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
    """Among all maps and all wanted gradients, where the gradient of a map is."""
    return {i: len(plan.maps) + k for k, i in enumerate(plan.wanted)}


def slots_of(plan: LossPlan) -> list[Slots]:
    """Where each pair's tensors are among all maps and all wanted gradients."""
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


def partner_of(own: int) -> int:
    """The other map of the same network."""
    return own ^ 1
