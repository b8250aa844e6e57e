"""Batches in an order that the seed and the step decide: resumed or divided, it is the same."""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from fsp_kernels.distill.data.split import Batch, Key, Split
from fsp_kernels.distill.errors import DistillError
from fsp_kernels.distill.seeds import mixed


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

    Each epoch shows every image once, in an order and augmented as ``seed`` and the epoch decide,
    but for those that make no whole batch: every step averages over the same number of images.

    Args:
        split: the images.
        batch_size: images of one step, over all processes and passes.
        seed: of orders and augmentations.
        first_step: where a resumed run goes on.
        steps: where it ends.
        accumulation: batches that each step is given in, one after the other.
        process: whose share this is, of ``processes`` equal ones.
        processes: that train together.
        workers: processes that load images.

    Raises:
        DistillError: ``batch_size`` cannot be divided so, or is more than there are images. While
            iterating: an image cannot be read.
    """
    check_batch_size(len(split), batch_size, accumulation, processes)
    order = _TrainingOrder(
        images=len(split),
        batch_size=batch_size,
        seed=seed,
        first_step=first_step,
        steps=steps,
        accumulation=accumulation,
        process=process,
        processes=processes,
    )
    return _read(_loader(split, order, workers))


def check_batch_size(
    images: int, batch_size: int, accumulation: int, processes: int, where: str = "data"
) -> None:
    """A batch can be filled from ``images``, and divided.

    Raises:
        DistillError: it can't; ``where`` names the section of the recipe.
    """
    parts = accumulation * processes
    if batch_size % parts:
        raise DistillError(
            f"{where}.batch_size: is {batch_size}, must be a multiple of {parts} "
            f"(execution.accumulation {accumulation} times {processes} processes)"
        )
    if batch_size > images:
        raise DistillError(
            f"{where}.batch_size: is {batch_size}, must be at most {images}, the images there are"
        )


class EvaluationBatches:
    """One process's share of the images in their order, as for evaluation, each time anew.

    Each image is in one process's share, the shares are equal up to one image and may be empty.
    Workers are started by the first iteration and wait for the next one, until ``close``.

    Args:
        split: the images.
        batch_size: images of one batch of this process, or fewer in its last.
        process: whose share this is, of ``processes``.
        processes: that evaluate together.
        workers: processes that load images.
        limit: only so many, the first ones.

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
        order = [share[i : i + batch_size] for i in range(0, len(share), batch_size)]
        self._loader = _loader(split, order, workers, persistent_workers=workers > 0)

    def __iter__(self) -> Iterator[Batch]:
        return _read(self._loader)

    def close(self) -> None:
        """End the workers; another iteration starts new ones."""
        # PyTorch ends them once nothing refers to its iterator, as the traceback of an error may.
        if self._loader._iterator is not None:
            self._loader._iterator._shutdown_workers()  # type: ignore[attr-defined]
            self._loader._iterator = None


@dataclass(frozen=True, kw_only=True)
class _TrainingOrder:
    """Sampler of the keys of each batch; the arguments are those of ``training_batches``."""

    images: int
    batch_size: int
    seed: int
    first_step: int
    steps: int
    accumulation: int
    process: int
    processes: int

    def __iter__(self) -> Iterator[list[Key]]:
        steps_per_epoch = self.images // self.batch_size
        shown = None  # the epoch that ``batches`` are of
        for step in range(self.first_step, self.steps):
            epoch, place = divmod(step, steps_per_epoch)
            if epoch != shown:
                seed = mixed(self.seed, epoch)
                generator = torch.Generator().manual_seed(seed)
                batches = torch.randperm(self.images, generator=generator).split(self.batch_size)
                shown = epoch
            for part in batches[place].chunk(self.accumulation):
                share = part.chunk(self.processes)[self.process]
                yield [(index, seed) for index in share.tolist()]


class _Fetched(Dataset):
    """The split, with an unreadable image's error as a value.

    Raised in a worker, it would reach the reader as the text of a traceback.
    """

    def __init__(self, split: Split) -> None:
        self._split = split

    def __getitems__(self, keys: Sequence[Key]) -> Batch | DistillError:
        try:
            return self._split.__getitems__(keys)
        except DistillError as error:
            return error


def _as_it_is(fetched: Any) -> Any:
    return fetched


def _loader(
    split: Split, order: Iterable[list[Key]], workers: int, persistent_workers: bool = False
) -> DataLoader[Batch]:
    if workers:
        # Where workers come from a server they find there what they would else import one by one.
        # It has no effect once the server runs.
        multiprocessing.set_forkserver_preload(["__main__", __name__])
    return DataLoader(
        _Fetched(split),
        batch_sampler=order,
        num_workers=workers,
        collate_fn=_as_it_is,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),  # else each loader would draw a number of the global one
        persistent_workers=persistent_workers,
        worker_init_fn=_leave_signals_to_the_trainer,
    )


def _leave_signals_to_the_trainer(_worker: int) -> None:
    """One that a whole group of processes gets, as by Ctrl-C, ends no worker before its trainer.

    The second one does, so that a worker that hangs can be ended.
    """
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, _frame: signal.signal(number, signal.SIG_DFL))


def _read(loader: DataLoader[Batch]) -> Iterator[Batch]:
    for fetched in loader:
        if isinstance(fetched, DistillError):
            raise fetched
        yield fetched
