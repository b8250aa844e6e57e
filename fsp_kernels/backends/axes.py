"""Strides and sizes of a map's spatial axes, with pooling by windows of equal size."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple


class Axes(NamedTuple):
    """The spatial axes of a map ``(B, C, *spatial)``; strides in elements.

    There are always three. If the map has fewer, the leading ones have size 1.
    """

    strides: tuple[int, int, int]
    sizes: tuple[int, int, int]  # after pooling
    windows: tuple[int, int, int]  # elements pooled along each axis
    flat: bool  # one stride, the last, leads from each position to the next across all axes


def axes_of(shape: Sequence[int], strides: Sequence[int], size: Sequence[int] | None) -> Axes:
    """The axes of a map that is pooled to ``size``, which divides the map's size axis by axis."""
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
    """Whether one stride leads from each position to the next across all axes."""
    axes = [(s, t) for s, t in zip(sizes, strides, strict=True) if s > 1]
    return all(outer == inner_size * inner for (_, outer), (inner_size, inner) in pairwise(axes))
