"""The order of batches depends on seed and step alone, however it is divided or resumed."""

from __future__ import annotations

import multiprocessing
from collections.abc import Sequence
from itertools import chain
from pathlib import Path

import pytest
import torch

from fsp_kernels.distill.config import Data
from fsp_kernels.distill.data import (
    Batch,
    EvaluationBatches,
    Split,
    load_splits,
    training_batches,
)
from fsp_kernels.errors import DistillError


@pytest.fixture(scope="module")
def split() -> Split:
    """50 images: two batches of 24 an epoch."""
    return load_splits(Data(train_images=50)).train


@pytest.fixture
def unreadable(folder: Path) -> Split:
    """36 images, of which one can no longer be read."""
    split = load_splits(Data(dataset="imagefolder", root=str(folder), image_size=16)).train
    (folder / "train" / "one" / "0.png").write_bytes(b"what?")
    return split


def train(split: Split, seed: int = 1, steps: int = 6, **settings: int) -> list[Batch]:
    return list(training_batches(split, batch_size=24, seed=seed, steps=steps, **settings))


def assert_same(first: list[Batch], second: list[Batch]) -> None:
    assert len(first) == len(second) > 0
    for one, other in zip(first, second, strict=True):
        assert all(map(torch.equal, one, other))


def workers() -> set[int]:
    """The processes that load images now."""
    return {process.pid for process in multiprocessing.active_children()}


def joined(batches: Sequence[Batch]) -> Batch:
    return Batch(*map(torch.cat, zip(*batches, strict=True)))


def test_a_batch_holds_the_images_and_labels_of_its_indices() -> None:
    split = load_splits(Data(train_images=50, augment=False)).train
    batch = train(split, steps=1)[0]
    assert batch.images.shape == (24, 1, 8, 8)
    assert [tensor.dtype for tensor in batch] == [torch.float32, torch.int64, torch.int64]
    for image, label, index in zip(*batch, strict=True):
        assert torch.equal(image, split[int(index)].image)
        assert label == split[int(index)].label


def test_the_seed_alone_decides_order_and_augmentation(split: Split) -> None:
    torch.manual_seed(3)
    first = train(split)
    torch.manual_seed(4)
    assert_same(first, train(split))
    assert_same(first, train(split, workers=2))
    assert not torch.equal(first[0].indices, train(split, seed=2)[0].indices)
    # The same in every process and version.
    assert first[0].indices[:6].tolist() == [14, 2, 27, 6, 20, 13]


def test_each_epoch_shows_every_image_once_in_another_order_and_augmented_anew(
    split: Split,
) -> None:
    batches = train(split)
    assert {len(batch.labels) for batch in batches} == {24}
    epochs = [joined(batches[i : i + 2]) for i in (0, 2, 4)]
    assert all(len(epoch.indices.unique()) == 48 for epoch in epochs)
    assert not torch.equal(epochs[0].indices, epochs[1].indices)
    assert not torch.equal(epochs[1].indices, epochs[2].indices)
    images = dict(zip(epochs[0].indices.tolist(), epochs[0].images, strict=True))
    again = zip(epochs[1].indices.tolist(), epochs[1].images, strict=True)
    changed = [not torch.equal(images[i], image) for i, image in again if i in images]
    assert sum(changed) > len(changed) / 2


def test_a_resumed_run_gets_the_batches_that_were_left(split: Split) -> None:
    for first_step in (1, 2, 5):
        assert_same(train(split, first_step=first_step), train(split)[first_step:])
    assert train(split, first_step=6) == []


def test_accumulation_divides_each_step(split: Split) -> None:
    parts = train(split, accumulation=3)
    assert {len(part.labels) for part in parts} == {8}
    assert_same([joined(parts[i : i + 3]) for i in range(0, len(parts), 3)], train(split))


@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_shares_of_all_processes_make_the_batches_of_one(
    split: Split, accumulation: int
) -> None:
    shares = [
        train(split, accumulation=accumulation, processes=2, process=process)
        for process in range(2)
    ]
    whole = [joined(parts) for parts in zip(*shares, strict=True)]
    assert_same(whole, train(split, accumulation=accumulation))


def test_the_global_random_numbers_stay_as_they_are(split: Split) -> None:
    before = torch.get_rng_state()
    train(split)
    train(split, steps=2, workers=1)
    list(EvaluationBatches(split))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"batch_size": 24, "accumulation": 5, "processes": 2},
            r"is 24, must be a multiple of 10 \(execution\.accumulation 5 times 2 processes\)$",
        ),
        ({"batch_size": 51}, "is 51, must be at most 50, the number of images$"),
    ],
)
def test_a_batch_that_cannot_be_made_is_an_error_before_any_is_read(
    split: Split, settings: dict[str, int], message: str
) -> None:
    with pytest.raises(DistillError, match=rf"^data\.batch_size: {message}"):
        training_batches(split, seed=0, steps=1, **settings)


@pytest.mark.parametrize("workers", [0, 1])
def test_an_unreadable_image_ends_training_with_an_error_that_names_it(
    unreadable: Split, workers: int
) -> None:
    batches = training_batches(unreadable, batch_size=36, seed=0, steps=1, workers=workers)
    with pytest.raises(DistillError, match=r"^/\S*one/0\.png: cannot be read as an image: "):
        next(batches)


def test_evaluation_goes_through_the_images_in_their_order_without_augmentation(
    split: Split,
) -> None:
    batches = list(EvaluationBatches(split, batch_size=20))
    assert [len(batch.labels) for batch in batches] == [20, 20, 10]
    assert joined(batches).indices.tolist() == list(range(50))
    assert torch.equal(joined(batches).labels, split.labels)
    plain = load_splits(Data(train_images=50, augment=False)).train
    assert_same(batches, list(EvaluationBatches(plain, batch_size=20)))


@pytest.mark.parametrize(
    ("processes", "limit"), [(1, 1), (1, 30), (1, 99), (2, None), (3, None), (4, 3)]
)
def test_every_image_up_to_the_limit_is_in_one_process_s_share(
    split: Split, processes: int, limit: int | None
) -> None:
    shares = [
        [
            int(index)
            for batch in EvaluationBatches(
                split, batch_size=7, process=process, processes=processes, limit=limit
            )
            for index in batch.indices
        ]
        for process in range(processes)
    ]
    assert list(chain(*shares)) == list(range(min(limit or 50, 50)))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_evaluation_starts_its_workers_once_and_ends_them_when_told(split: Split) -> None:
    batches, before = EvaluationBatches(split, batch_size=7, workers=2), workers()
    first = list(batches)
    assert_same(first, list(EvaluationBatches(split, batch_size=7)))
    started = workers() - before
    assert len(started) == 2
    assert_same(list(batches), first)
    halfway = iter(batches)  # an evaluation that is given up, but an error's traceback refers to it
    next(halfway)
    assert_same(list(batches), first)
    assert workers() - before == started
    next(halfway := iter(batches))
    batches.close()
    assert workers() == before
    assert_same(list(batches), first)
    batches.close()


def test_workers_end_while_an_error_still_refers_to_them(unreadable: Split) -> None:
    batches, before = EvaluationBatches(unreadable, workers=1), workers()
    with pytest.raises(DistillError, match="cannot be read") as error:
        list(batches)
    batches.close()
    assert workers() == before
    assert error.traceback


def test_a_server_of_workers_imports_what_they_need_before_they_start(
    split: Split, monkeypatch: pytest.MonkeyPatch
) -> None:
    preloaded: list[Sequence[str]] = []
    monkeypatch.setattr(multiprocessing, "set_forkserver_preload", preloaded.append)
    EvaluationBatches(split)
    assert preloaded == []
    EvaluationBatches(split, workers=1)
    assert preloaded == [["__main__", "fsp_kernels.distill.data.batches"]]
