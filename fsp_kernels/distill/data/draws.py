"""Drawing images for one purpose or another: always the same ones, each class in proportion."""

from __future__ import annotations

import numpy as np
from sklearn.model_selection import train_test_split

_SEED = 0  # part of each data set's definition: results quoted anywhere are about these draws


def draw(indices: np.ndarray, count: int, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """``count`` of ``indices``, stratified by their labels, and the others.

    The first ``count``, where either part is too small to hold every class.
    """
    class_sizes = np.unique(labels[indices], return_counts=True)[1]
    if min(count, len(indices) - count) < len(class_sizes) or class_sizes.min() < 2:
        return indices[:count], indices[count:]
    drawn, others = train_test_split(
        indices, train_size=count, stratify=labels[indices], random_state=_SEED
    )
    return drawn, others


def shuffled(count: int) -> np.ndarray:
    """The numbers below ``count`` in an order of no meaning, the same each time."""
    return np.random.default_rng(_SEED).permutation(count)
