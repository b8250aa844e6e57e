"""The images: scikit-learn's bundled handwritten digits, split once and for all."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from fsp_kernels.distill.config import Data
from fsp_kernels.distill.errors import DistillError

TEST_IMAGES, VALIDATION_IMAGES = 600, 400
_CLASSES = 10
_SPLIT_SEED = 0  # part of the data set's definition: results quoted anywhere are about this split


class Split(NamedTuple):
    """``images`` (N, channels, height, width) float32, ``labels`` (N,) int64."""

    images: Tensor
    labels: Tensor


class Splits(NamedTuple):
    """``train`` is the student's, part of ``teacher_train``; otherwise disjoint sets of images."""

    train: Split
    teacher_train: Split
    validation: Split
    test: Split
    classes: int


def split_indices(labels: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Indices of the training pool, the validation and the test images, stratified by label."""
    rest, test = _draw(np.arange(len(labels)), len(labels) - TEST_IMAGES, labels)
    pool, validation = _draw(rest, len(rest) - VALIDATION_IMAGES, labels)
    return pool, validation, test


def load_splits(data: Data) -> Splits:
    """Scikit-learn's digits: 1797 grey images of 8 x 8 pixels, 10 classes.

    600 are for testing, 400 for validation. Of the other 797, ``data.teacher_images`` are drawn for
    the teacher and ``data.train_images`` of those for the student; always the same, stratified.
    Pixels are standardised by the mean and deviation of the student's images.

    Raises:
        DistillError: more training images are asked for than there are.
    """
    digits = load_digits()
    labels = digits.target
    pool, validation, test = split_indices(labels)
    if data.teacher_images > len(pool):
        raise DistillError(
            f"data.teacher_images: is {data.teacher_images}, must be at most {len(pool)}"
        )
    teacher, _ = _draw(pool, data.teacher_images, labels)
    train, _ = _draw(teacher, data.train_images, labels)
    pixels = digits.images[:, None]  # (N, 1, 8, 8)
    images = (pixels - pixels[train].mean()) / pixels[train].std()

    def take(indices: np.ndarray) -> Split:
        return Split(torch.from_numpy(images[indices]).float(), torch.from_numpy(labels[indices]))

    return Splits(take(train), take(teacher), take(validation), take(test), _CLASSES)


def _draw(indices: np.ndarray, count: int, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """``count`` of ``indices``, stratified by label, and the others."""
    if count > len(indices) - _CLASSES:  # too few others to stratify
        return indices[:count], indices[count:]
    drawn, others = train_test_split(
        indices, train_size=count, stratify=labels[indices], random_state=_SPLIT_SEED
    )
    return drawn, others


def shuffled_batches(split: Split, batch_size: int, seed: int) -> DataLoader:
    """Whole batches in an order that ``seed`` alone decides, a new one each epoch."""
    return DataLoader(
        TensorDataset(*split),
        batch_size=batch_size,
        shuffle=True,
        drop_last=True,  # every step averages over the same number of images
        generator=torch.Generator().manual_seed(seed),
    )


def endless(loader: DataLoader) -> Iterator[tuple[Tensor, Tensor]]:
    """Epoch after epoch, without end."""
    while True:
        yield from loader
