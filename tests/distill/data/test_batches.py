"""The order of batches: by seed and step alone, however it is divided or resumed."""

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
from fsp_kernels.distill.errors import DistillError


@pytest.fixture(scope="module")
def split() -> Split:
    """50 images: two batches of 24 an epoch."""
    return load_splits(Data(train_images=50)).train


def train(split: Split, seed: int = 1, steps: int = 6, **settings: int) -> list[Batch]:
    return list(training_batches(split, batch_size=24, seed=seed, steps=steps, **settings))


def assert_same(first: list[Batch], second: list[Batch]) -> None:
    assert len(first) == len(second) > 0
    for one, other in zip(first, second, strict=True):
        assert all(map(torch.equal, one, other))


def workers() -> set[int]:
    """The processes that load images now."""
    return {process.pid for process in multiprocessing.active_children()}


def joined(batches: list[Batch]) -> Batch:
    return Batch(*map(torch.cat, zip(*batches, strict=True)))


def test_a_batch_holds_the_images_and_labels_of_its_indices() -> None:
    split = load_splits(Data(train_images=50, augment=False)).train
    batch = train(split, steps=1)[0]
    assert batch.images.shape == (24, 1, 8, 8)
    assert [tensor.dtype for tensor in batch] == [torch.float32, torch.int64, torch.int64]
    for image, label, index in zip(*batch, strict=True):
        assert torch.equal(image, split[int(index)].image)
        assert label == split[int(index)].label


def test_the_seed_decides_order_and_augmentation(split: Split) -> None:
    torch.manual_seed(3)
    first = train(split)
    torch.manual_seed(4)
    assert_same(first, train(split))
    assert not torch.equal(first[0].indices, train(split, seed=2)[0].indices)


def test_the_order_is_this_one_in_every_process(split: Split) -> None:
    # A seed made by ``hash`` would be another in each.
    assert train(split)[0].indices[:6].tolist() == [14, 2, 27, 6, 20, 13]


def test_an_epoch_shows_no_image_twice_and_only_whole_batches(split: Split) -> None:
    batches = train(split)
    assert {len(batch.labels) for batch in batches} == {24}
    for epoch in range(3):
        assert len(joined(batches[2 * epoch : 2 * epoch + 2]).indices.unique()) == 48


def test_each_epoch_has_an_order_of_its_own(split: Split) -> None:
    batches = train(split)
    assert not torch.equal(batches[0].indices, batches[2].indices)
    assert not torch.equal(batches[2].indices, batches[4].indices)


def test_each_epoch_augments_anew(split: Split) -> None:
    batches = train(split)
    first, second = joined(batches[:2]), joined(batches[2:4])
    images = dict(zip(first.indices.tolist(), first.images, strict=True))
    again = zip(second.indices.tolist(), second.images, strict=True)
    changed = [not torch.equal(images[i], image) for i, image in again if i in images]
    assert sum(changed) > len(changed) / 2


def test_a_resumed_run_gets_the_batches_that_were_left(split: Split) -> None:
    for first_step in (1, 2, 5):
        assert_same(train(split, first_step=first_step), train(split)[first_step:])


def test_a_run_that_is_at_its_end_gets_no_batch(split: Split) -> None:
    assert train(split, first_step=6) == []


def test_accumulation_divides_each_step(split: Split) -> None:
    parts = train(split, accumulation=3)
    assert {len(part.labels) for part in parts} == {8}
    assert_same([joined(parts[i : i + 3]) for i in range(0, len(parts), 3)], train(split))


def test_the_shares_of_all_processes_make_the_batches_of_one(split: Split) -> None:
    for accumulation in (1, 2):
        shares = [
            train(split, accumulation=accumulation, processes=2, process=process)
            for process in range(2)
        ]
        whole = [joined(list(parts)) for parts in zip(*shares, strict=True)]
        assert_same(whole, train(split, accumulation=accumulation))


def test_workers_change_nothing(split: Split) -> None:
    assert_same(train(split, workers=2), train(split))


def test_the_global_random_numbers_are_left_alone(split: Split) -> None:
    before = torch.get_rng_state()
    train(split)
    train(split, steps=2, workers=1)
    list(EvaluationBatches(split))
    assert torch.equal(torch.get_rng_state(), before)


def test_a_batch_that_cannot_be_divided_is_an_error_before_any_is_made(split: Split) -> None:
    message = (
        r"^data\.batch_size: is 24, must be a multiple of 10 "
        r"\(execution\.accumulation 5 times 2 processes\)$"
    )
    with pytest.raises(DistillError, match=message):
        training_batches(split, batch_size=24, seed=0, steps=1, accumulation=5, processes=2)


def test_a_batch_larger_than_the_split_is_an_error_before_any_is_made(split: Split) -> None:
    with pytest.raises(DistillError, match=r"^data\.batch_size: is 51, must be at most 50"):
        training_batches(split, batch_size=51, seed=0, steps=1)


@pytest.mark.parametrize("workers", [0, 1])
def test_an_unreadable_image_ends_training_with_an_error_that_names_it(
    folder: Path, workers: int
) -> None:
    split = load_splits(Data(dataset="imagefolder", root=str(folder), image_size=16)).train
    (folder / "train" / "one" / "0.png").write_bytes(b"what?")
    batches = training_batches(split, batch_size=36, seed=0, steps=1, workers=workers)
    with pytest.raises(DistillError, match=r"^/\S*one/0\.png: cannot be read as an image: "):
        next(batches)


def test_evaluation_goes_through_the_images_in_their_order(split: Split) -> None:
    batches = list(EvaluationBatches(split, batch_size=20))
    assert [len(batch.labels) for batch in batches] == [20, 20, 10]
    assert joined(batches).indices.tolist() == list(range(50))
    assert torch.equal(joined(batches).labels, split.labels)


def test_evaluation_augments_nothing(split: Split) -> None:
    plain = load_splits(Data(train_images=50, augment=False)).train
    assert_same(list(EvaluationBatches(split)), list(EvaluationBatches(plain)))


@pytest.mark.parametrize("limit", [1, 30, 50, 99])
def test_a_limit_takes_the_first_images(split: Split, limit: int) -> None:
    indices = joined(list(EvaluationBatches(split, batch_size=20, limit=limit))).indices
    assert indices.tolist() == list(range(min(limit, 50)))


@pytest.mark.parametrize(("processes", "limit"), [(2, None), (3, None), (4, 3)])
def test_every_image_is_in_one_process_s_share(
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
    assert list(chain(*shares)) == list(range(limit or 50))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_workers_change_nothing_in_evaluation(split: Split) -> None:
    workers = EvaluationBatches(split, batch_size=7, workers=2)
    assert_same(list(workers), list(EvaluationBatches(split, batch_size=7)))


def test_evaluation_starts_its_workers_once_and_ends_them_when_told(split: Split) -> None:
    batches, before = EvaluationBatches(split, batch_size=7, workers=2), workers()
    first = list(batches)
    started = workers() - before
    assert len(started) == 2
    assert_same(list(batches), first)
    next(iter(batches))  # an evaluation that is given up
    assert_same(list(batches), first)
    assert workers() - before == started
    batches.close()
    assert workers() == before
    assert_same(list(batches), first)
    batches.close()


def test_workers_end_though_an_error_is_still_looked_at(folder: Path) -> None:
    split = load_splits(Data(dataset="imagefolder", root=str(folder), image_size=16)).train
    (folder / "train" / "one" / "0.png").write_bytes(b"what?")
    batches, before = EvaluationBatches(split, workers=1), workers()
    with pytest.raises(DistillError, match="cannot be read") as error:
        list(batches)
    batches.close()
    assert workers() == before
    assert error.traceback


def test_workers_end_though_an_evaluation_has_not(split: Split) -> None:
    before = workers()
    batches = EvaluationBatches(split, batch_size=2, workers=1)
    halfway = iter(batches)  # as the traceback of an error holds it
    next(halfway)
    assert workers() > before
    batches.close()
    assert workers() == before


def test_a_server_of_workers_imports_what_they_need_before_they_start(
    split: Split, monkeypatch: pytest.MonkeyPatch
) -> None:
    preloaded: list[Sequence[str]] = []
    monkeypatch.setattr(multiprocessing, "set_forkserver_preload", preloaded.append)
    EvaluationBatches(split)
    assert preloaded == []
    EvaluationBatches(split, workers=1)
    assert preloaded == [["__main__", "fsp_kernels.distill.data.batches"]]
