"""The digits: fixed, disjoint, stratified."""

from __future__ import annotations

import hashlib
from itertools import islice

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from fsp_kernels.distill.config import Data
from fsp_kernels.distill.data import endless, load_splits, shuffled_batches, split_indices
from fsp_kernels.distill.errors import DistillError

SPLITS_DIGEST = "f142a2ec7a95062d"


def keys(images: torch.Tensor) -> set[bytes]:
    return {image.numpy().tobytes() for image in images}


def test_the_split_is_this_one_for_good() -> None:
    # Numbers quoted in a report are about these images; a new scikit-learn must not move them.
    digest = hashlib.sha256()
    for indices in split_indices(load_digits().target):
        digest.update(np.sort(indices).astype("<i8").tobytes())
    assert digest.hexdigest()[:16] == SPLITS_DIGEST


def test_pool_validation_and_test_share_no_image_and_leave_none_out() -> None:
    pool, validation, test = split_indices(load_digits().target)
    assert [len(pool), len(validation), len(test)] == [797, 400, 600]
    assert sorted([*pool, *validation, *test]) == list(range(1797))


def test_the_students_images_are_among_the_teachers_and_in_no_other_split() -> None:
    splits = load_splits(Data(train_images=100, teacher_images=300))
    train, teacher = keys(splits.train.images), keys(splits.teacher_train.images)
    assert len(train) == 100
    assert len(teacher) == 300
    assert train < teacher
    assert not teacher & (keys(splits.validation.images) | keys(splits.test.images))


def test_equal_counts_give_student_and_teacher_the_same_images() -> None:
    splits = load_splits(Data(train_images=100, teacher_images=100))
    assert keys(splits.train.images) == keys(splits.teacher_train.images)


def test_every_split_has_each_class_in_proportion() -> None:
    splits = load_splits(Data(train_images=100, teacher_images=300))
    for split in (splits.train, splits.teacher_train, splits.validation, splits.test):
        share = torch.bincount(split.labels, minlength=10) / len(split.labels)
        assert (share - 0.1).abs().max() < 0.015


def test_the_students_pixels_are_standardised() -> None:
    images = load_splits(Data(train_images=100, teacher_images=300)).train.images
    assert images.shape == (100, 1, 8, 8)
    assert images.dtype == torch.float32
    assert images.mean().item() == pytest.approx(0, abs=1e-5)
    assert images.std(correction=0).item() == pytest.approx(1, abs=1e-5)


def test_the_whole_pool_can_be_used_and_not_more() -> None:
    splits = load_splits(Data(train_images=797, teacher_images=797))
    assert len(splits.train.labels) == 797
    with pytest.raises(DistillError, match=r"data\.teacher_images: is 798, must be at most 797"):
        load_splits(Data(train_images=100, teacher_images=798))


def test_the_seed_alone_decides_the_order_of_batches() -> None:
    split = load_splits(Data(train_images=50, teacher_images=50)).train

    def labels(seed: int) -> list[torch.Tensor]:
        return [y for _, y in islice(endless(shuffled_batches(split, 20, seed)), 6)]

    first, again, other = labels(1), labels(1), labels(2)
    assert all(map(torch.equal, first, again))
    assert not all(map(torch.equal, first, other))
    assert {len(y) for y in first} == {20}
    assert not torch.equal(first[0], first[2])  # two batches an epoch, each epoch a new order
