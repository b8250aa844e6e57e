"""A data set that one network is trained on or measured with."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from fsp_kernels.distill.data.augmentation import augmented
from fsp_kernels.distill.data.collection import Labelled, Scale, Transform

Key = int | tuple[int, int]  # an index, or an index and the seed of the image's augmentation

_CHUNK = 1000  # images digested at once


class Sample(NamedTuple):
    """``image`` (C, H, W) float32, its ``label``, and its position in the split."""

    image: Tensor
    label: int
    index: int  # type: ignore[assignment]  # hides tuple.index, which nobody misses


class Batch(NamedTuple):
    """``images`` (B, C, H, W) float32, ``labels`` (B,) and positions in the split (B,), int64."""

    images: Tensor
    labels: Tensor
    indices: Tensor


class Split(Dataset[Sample]):
    """Some images of a data set, standardised.

    ``split[index]`` is the sample as for evaluation. ``split[index, seed]`` is augmented, if the
    split augments, by randomness that depends on (seed, index) alone.

    Attributes:
        labels: (N,) int64.
        image_shape: (C, H, W).
        classes: labels are ``0..classes - 1``.
        mean, std: of each channel, of pixels in ``pixel_range``; images are
            ``(pixels - mean) / std``.
        pixel_range: least and largest pixel.
    """

    def __init__(
        self,
        source: Labelled,
        positions: np.ndarray,
        scale: Scale,
        image_shape: tuple[int, int, int],
        classes: int,
        *,
        evaluation: Transform | None = None,
        augmentation: Transform | None = None,
    ) -> None:
        """The images at ``positions`` of ``source``; the transforms as a ``Collection`` has them.

        Without an ``augmentation`` every sample is as for evaluation.
        """
        self.labels = torch.from_numpy(source.labels[positions])
        self.image_shape = image_shape
        self.classes = classes
        self.mean, self.std, self.pixel_range = scale
        self._source = source.images
        self._positions = torch.from_numpy(positions)
        self._evaluation = evaluation
        self._augmentation = augmentation

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, key: Key) -> Sample:
        batch = self.__getitems__([key])
        return Sample(batch.images[0], int(batch.labels[0]), int(batch.indices[0]))

    def __getitems__(self, keys: Sequence[Key]) -> Batch:
        """The samples as one batch; a DataLoader asks for them so."""
        numbers = range(len(self))  # whose items start at 0 also where ``index`` is negative
        indices = [numbers[key[0] if isinstance(key, tuple) else key] for key in keys]
        seeds = [key[1] if isinstance(key, tuple) else None for key in keys]
        augments = self._augmentation is not None and any(seed is not None for seed in seeds)
        if isinstance(self._source, Tensor) and not augments:
            # At once, and not by indexing, which wakes other threads for a few kilobytes.
            pixels = self._source.index_select(0, self._positions[indices])
        else:
            pixels = torch.stack(list(map(self._pixels, indices, seeds)))
        return Batch(self._standardised(pixels), self.labels[indices], torch.tensor(indices))

    @cached_property
    def fingerprint(self) -> str:
        """A digest of images, labels, order and transforms; files count by path and size."""
        digest = hashlib.blake2b(digest_size=16)
        about = (self.image_shape, self.classes, self.mean, self.std, self.pixel_range)
        digest.update(repr((about, self._evaluation, self._augmentation)).encode())
        digest.update(self.labels.numpy().tobytes())
        for content in self._contents():
            digest.update(content)
        return digest.hexdigest()

    def _contents(self) -> Iterator[bytes]:
        if isinstance(self._source, Tensor):
            for positions in self._positions.split(_CHUNK):
                yield self._source[positions].numpy().tobytes()
        else:
            yield from map(self._source.identity, self._positions.tolist())

    def _pixels(self, index: int, seed: int | None) -> Tensor:
        pixels = self._source[int(self._positions[index])]
        if seed is not None and self._augmentation is not None:
            return augmented(self._augmentation, pixels, seed, index)
        return pixels if self._evaluation is None else self._evaluation(pixels)

    def _standardised(self, pixels: Tensor) -> Tensor:
        if not pixels.is_floating_point():
            pixels = pixels / 255
        mean, std = (pixels.new_tensor(values)[:, None, None] for values in (self.mean, self.std))
        return ((pixels - mean) / std).float()


class Splits(NamedTuple):
    """``train`` is the student's, part of ``teacher_train``; otherwise disjoint sets of images."""

    train: Split
    teacher_train: Split
    validation: Split | None
    test: Split

    @property
    def image_shape(self) -> tuple[int, int, int]:
        return self.train.image_shape

    @property
    def classes(self) -> int:
        return self.train.classes
