"""The spatial axes of a feature map in memory, after pooling by whole windows."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple


class Axes(NamedTuple):
    """Where the positions of a map ``(B, C, *spatial)`` lie; strides in elements.

    Three axes always, leading ones of size 1 where there are fewer.
    """

    strides: tuple[int, int, int]
    sizes: tuple[int, int, int]  # after pooling
    windows: tuple[int, int, int]  # elements pooled along each axis
    flat: bool  # positions lie the last stride apart, whatever their axis


def axes_of(shape: Sequence[int], strides: Sequence[int], size: Sequence[int] | None) -> Axes:
    """The axes of a map that is pooled to ``size``, a divisor of its own axis by axis."""
    spatial = [1] * (5 - len(shape)) + list(shape[2:])
    pooled = spatial if size is None else [1] * (5 - len(shape)) + list(size)
    steps = [0] * (5 - len(shape)) + list(strides[2:])
    windows = [full // part for full, part in zip(spatial, pooled, strict=True)]
    flat = windows == [1, 1, 1] and _is_flat(spatial, steps)
    if flat:  # the stride of the innermost axis that has more than one position
        longer = [t for s, t in zip(spatial, steps, strict=True) if s > 1]
        steps = [0, 0, longer[-1] if longer else 1]
    return Axes(_triple(steps), _triple(pooled), _triple(windows), flat)


def _triple(values: Sequence[int]) -> tuple[int, int, int]:
    first, second, third = values
    return first, second, third


def _is_flat(sizes: Sequence[int], strides: Sequence[int]) -> bool:
    """Whether one stride leads from each position to the next, across the axes."""
    axes = [(s, t) for s, t in zip(sizes, strides, strict=True) if s > 1]
    return all(outer == inner_size * inner for (_, outer), (inner_size, inner) in pairwise(axes))
