"""Splits and their batches, whose images, order and augmentation depend on seed and step alone."""

from __future__ import annotations

import hashlib
import multiprocessing
import signal
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_convert

from fsp_kernels.distill.data.images import augment
from fsp_kernels.distill.data.sources import Collection, Labelled, Moments
from fsp_kernels.distill.seeds import mixed
from fsp_kernels.errors import DistillError

Key = int | tuple[int, int]  # an index, or an index and the seed of the image's augmentation


class Sample(NamedTuple):
    """``image`` (C, H, W) float32, its ``label``, and its position in the split."""

    image: Tensor
    label: int
    index: int  # type: ignore[assignment]  # hides tuple.index


class Batch(NamedTuple):
    """``images`` (B, C, H, W) float32, ``labels`` (B,) and positions in the split (B,), int64."""

    images: Tensor
    labels: Tensor
    indices: Tensor


class Split(Dataset[Sample]):
    """Standardised images of a data set, for training or evaluation.

    ``split[index]`` is a sample for evaluation. ``split[index, seed]`` is augmented, if the split
    augments, by random numbers that depend on (seed, index) alone.

    Attributes:
        labels: (N,) int64.
        image_shape: (C, H, W).
        classes: labels are ``0..classes - 1``.
        mean, std: of each channel, of pixels in ``pixel_range``; images are
            ``(pixels - mean) / std``.
        pixel_range: least and largest pixel.
    """

    def __init__(
        self, labelled: Labelled, collection: Collection, moments: Moments, augments: bool = False
    ) -> None:
        self.labels = torch.from_numpy(labelled.labels)
        self.image_shape, self.classes = collection.image_shape, collection.classes
        self.mean, self.std = moments
        self.pixel_range = collection.pixel_range
        self._source, self._numbers = labelled.source, torch.from_numpy(labelled.numbers)
        self._evaluation = collection.evaluation
        self._augmentation = collection.augmentation if augments else None

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, key: Key) -> Sample:
        batch = self.__getitems__([key])
        return Sample(batch.images[0], int(batch.labels[0]), int(batch.indices[0]))

    def __getitems__(self, keys: Sequence[Key]) -> Batch:
        """The samples as one batch; this is what a DataLoader calls."""
        numbers = range(len(self))  # makes negative indices positive, and refuses others
        indices = [numbers[key[0] if isinstance(key, tuple) else key] for key in keys]
        seeds = [key[1] if isinstance(key, tuple) else None for key in keys]
        augments = self._augmentation is not None and any(seed is not None for seed in seeds)
        if isinstance(self._source, Tensor) and not augments:
            # Faster than indexing, which wakes other threads for a few kilobytes.
            pixels = self._source.index_select(0, self._numbers[indices])
        else:
            pixels = torch.stack(list(map(self._pixels, indices, seeds)))
        if not pixels.is_floating_point():
            pixels = pixels / 255
        mean, std = (pixels.new_tensor(values)[:, None, None] for values in (self.mean, self.std))
        images = ((pixels - mean) / std).float()
        return Batch(images, self.labels[indices], torch.tensor(indices))

    @cached_property
    def fingerprint(self) -> str:
        """A digest of images, labels, order and transforms; of files, path and size count."""
        digest = hashlib.blake2b(digest_size=16)
        about = (self.image_shape, self.classes, self.mean, self.std, self.pixel_range)
        digest.update(repr((about, self._evaluation, self._augmentation)).encode())
        digest.update(self.labels.numpy().tobytes())
        source = self._source
        for number in self._numbers.tolist():
            if isinstance(source, Tensor):
                digest.update(source[number].numpy().tobytes())
            else:
                digest.update(source.identity(number))
        return digest.hexdigest()

    def _pixels(self, index: int, seed: int | None) -> Tensor:
        pixels = self._source[int(self._numbers[index])]
        if seed is not None and self._augmentation is not None:
            return augment(self._augmentation, pixels, seed, index)
        return pixels if self._evaluation is None else self._evaluation(pixels)


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


def training_batches(
    split: Split,
    *,
    batch_size: int,
    seed: int,
    first_step: int = 0,
    steps: int,
    accumulation: int = 1,
    process: int = 0,
    processes: int = 1,
    workers: int = 0,
) -> Iterator[Batch]:
    """One process's batches of the optimiser steps ``first_step..steps - 1``.

    Each epoch shows every image once, except those that make no whole batch. ``seed`` and the epoch
    decide their order and augmentation.

    Args:
        split: the images.
        batch_size: images of one step, over all processes and passes.
        seed: of orders and augmentations.
        first_step: where a resumed run goes on.
        steps: where it ends.
        accumulation: batches of each step, one after the other.
        process: number of this process, of ``processes`` that train together.
        workers: processes that load images.

    Raises:
        DistillError: as ``check_batch_size``. While iterating: an image cannot be read.
    """
    check_batch_size(len(split), batch_size, accumulation, processes)

    def keys() -> Iterator[list[Key]]:
        steps_per_epoch = len(split) // batch_size
        shown = None  # the epoch of ``batches``
        for step in range(first_step, steps):
            epoch, place = divmod(step, steps_per_epoch)
            if epoch != shown:
                epoch_seed = mixed(seed, epoch)
                generator = torch.Generator().manual_seed(epoch_seed)
                batches = torch.randperm(len(split), generator=generator).split(batch_size)
                shown = epoch
            for part in batches[place].chunk(accumulation):
                share = part.chunk(processes)[process]
                yield [(index, epoch_seed) for index in share.tolist()]

    return _read(_loader(split, keys(), workers))


def check_batch_size(
    images: int, batch_size: int, accumulation: int, processes: int, where: str = "data"
) -> None:
    """Raise a ``DistillError`` unless ``images`` fill a batch, and it can be divided equally.

    ``where`` names the section of the recipe.
    """
    parts = accumulation * processes
    if batch_size % parts:
        raise DistillError(
            f"{where}.batch_size: is {batch_size}, must be a multiple of {parts} "
            f"(execution.accumulation {accumulation} times {processes} processes)"
        )
    if batch_size > images:
        raise DistillError(
            f"{where}.batch_size: is {batch_size}, must be at most {images}, the number of images"
        )


class EvaluationBatches:
    """One process's share of the images in their order, without augmentation, in each iteration.

    The shares of all processes are disjoint, equal up to one image, and may be empty. The first
    iteration starts the workers, which wait for the next iteration until ``close``.

    Args:
        split: the images.
        batch_size: images of one batch of this process; its last one may have fewer.
        process: number of this process, of ``processes`` that evaluate together.
        workers: processes that load images.
        limit: use so many images only, the first ones.

    Raises:
        DistillError: while iterating, an image cannot be read.
    """

    def __init__(
        self,
        split: Split,
        *,
        batch_size: int = 512,
        process: int = 0,
        processes: int = 1,
        workers: int = 0,
        limit: int | None = None,
    ) -> None:
        count = len(split) if limit is None else min(limit, len(split))
        first, end = (count * share // processes for share in (process, process + 1))
        share: list[Key] = list(range(first, end))
        keys = [share[i : i + batch_size] for i in range(0, len(share), batch_size)]
        self._loader = _loader(split, keys, workers, persistent_workers=workers > 0)

    def __iter__(self) -> Iterator[Batch]:
        return _read(self._loader)

    def close(self) -> None:
        """End the workers; another iteration starts new ones."""
        # PyTorch ends them only when nothing refers to the iterator, as an error's traceback may.
        if self._loader._iterator is not None:
            self._loader._iterator._shutdown_workers()  # type: ignore[attr-defined]
            self._loader._iterator = None


class _ErrorsAsValues(Dataset):
    """The split; an error in a worker is returned, for PyTorch would raise its traceback's text."""

    def __init__(self, split: Split) -> None:
        self._split = split

    def __getitems__(self, keys: Sequence[Key]) -> Batch | DistillError:
        try:
            return self._split.__getitems__(keys)
        except DistillError as error:
            return error


def _loader(
    split: Split, keys: Iterable[list[Key]], workers: int, persistent_workers: bool = False
) -> DataLoader[Batch]:
    if workers:
        # A server that starts workers imports this once, before they would one by one. It has no
        # effect once the server runs.
        multiprocessing.set_forkserver_preload(["__main__", __name__])
    return DataLoader(
        _ErrorsAsValues(split),
        batch_sampler=keys,
        num_workers=workers,
        collate_fn=default_convert,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),  # else each loader would draw from the global generator
        persistent_workers=persistent_workers,
        worker_init_fn=_ignore_first_signals,
    )


def _ignore_first_signals(_worker: int) -> None:
    """Ctrl-C reaches all processes: the trainer ends its workers. A second signal ends a worker."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, _frame: signal.signal(number, signal.SIG_DFL))


def _read(loader: DataLoader[Batch]) -> Iterator[Batch]:
    for fetched in loader:
        if isinstance(fetched, DistillError):
            raise fetched
        yield fetched
