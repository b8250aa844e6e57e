"""The tensors of a planned loss: which belong to each pair, and pooling before the kernels."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from fsp_kernels.loss_plan import LossPlan, MapPlan
from fsp_kernels.pooling import pool, unpool

# Of one pair: the indices of the tensors a, b, c, d and of their gradients; None if missing.
Slots = tuple[int | None, ...]


class PooledMap:
    """A map that PyTorch pools before the kernels read it."""

    def __init__(self, x: Tensor, gradient: Tensor | None, plan: MapPlan):
        assert plan.pooled_size is not None
        self._target, self._size, self._mode = gradient, plan.pooled_size, plan.pool
        x = x.to(plan.pooled_copy.dtype)
        pooled, self._indices = pool(x, self._size, self._mode, indexed=gradient is not None)
        self.map = pooled.contiguous().view(plan.pooled_copy.shape)
        self.gradient = None
        if gradient is not None:
            dtype = plan.pooled_copy.gradient_dtype
            self.gradient = torch.empty(plan.pooled_copy.shape, dtype=dtype, device=x.device)

    def unpool(self) -> None:
        """Write the map's gradient from that of the pooled map."""
        if self._target is not None and self.gradient is not None:
            flat = self.gradient.flatten(2)
            unpool(flat, self._target, self._size, self._mode, self._indices)


def pool_maps(tensors: list[Tensor], plan: LossPlan, places: Iterable[int]) -> list[PooledMap]:
    """Pool the maps at ``places``; replaces them and their gradients in ``tensors``."""
    found = []
    gradients = _gradient_places(plan)
    for i in places:
        place = gradients.get(i)
        x = PooledMap(tensors[i], None if place is None else tensors[place], plan.maps[i])
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


def mask_slots_of(plan: LossPlan) -> list[Slots]:
    """For each pair, the indices of its masks and then of their counts, student before teacher.

    In the list of a call, the masks follow the wanted gradients, in the dtype of the backend, and
    their :func:`counts` the masks. ``None`` stands for no mask.
    """
    first = len(plan.maps) + len(plan.wanted)
    count = len({i for pair in plan.pairs for i in pair.masks if i is not None})
    return [
        tuple(
            None if i is None else start + i for start in (first, first + count) for i in pair.masks
        )
        for pair in plan.pairs
    ]


def counts(mask: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """How many positions of a mask count in each sample, at least 1: ``(B, K)`` to ``(B,)``.

    At least 1, because the sum over no positions is zero, whatever it is divided by.
    """
    return mask.sum(1, dtype=dtype).clamp(min=1)


def tensors_at(slots: Slots, tensors: Sequence[Tensor]) -> list[Tensor | None]:
    return [None if x is None else tensors[x] for x in slots]


def empty_gradients(maps: Sequence[Tensor], plan: LossPlan) -> list[Tensor]:
    """The wanted gradients, to be filled, with the strides of ``torch.empty_like``."""
    planned = plan.maps
    return [torch.empty_like(maps[i], dtype=planned[i].gradient_dtype) for i in plan.wanted]


def in_memory(maps: Sequence[Tensor]) -> Sequence[Tensor]:
    """Maps whose memory holds their values, with the same strides.

    A negative view, e.g. ``z.conj().imag``, is copied: its memory holds the values with the other
    sign.
    """
    return [_copied(x) if x.is_neg() else x for x in maps] if any(map(_is_neg, maps)) else maps


_is_neg = Tensor.is_neg


def _copied(x: Tensor) -> Tensor:
    distinct = x[tuple(slice(0, None if stride else 1) for stride in x.stride())]
    copy = torch.empty_strided(distinct.shape, x.stride(), dtype=x.dtype, device=x.device)
    return copy.copy_(distinct).expand(x.shape)


def elements_of(x: Tensor) -> Sequence[Tensor]:
    """The elements of a vector, or the scalar itself."""
    return x.unbind() if x.dim() else (x,)


def partner_of(own: int) -> int:
    """The number of the other map of the same network; a, b, c, d are 0, 1, 2, 3."""
    return own ^ 1
