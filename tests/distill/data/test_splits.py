"""Draws, what is asked for beyond what there is, and a source's likeness to its target."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from distill.data.conftest import WriteCifar
from distill.data.views import all_images, keys, pixels
from fsp_kernels.distill.config import Data
from fsp_kernels.distill.data import Split, load_splits
from fsp_kernels.distill.data.collection import Labelled, Scale
from fsp_kernels.distill.data.draws import draw
from fsp_kernels.distill.errors import DistillError


def test_every_split_has_each_class_in_proportion() -> None:
    splits = load_splits(Data(train_images=100, teacher_images=300))
    for split in (splits.train, splits.teacher_train, splits.validation, splits.test):
        share = torch.bincount(split.labels, minlength=10) / len(split)
        assert (share - 0.1).abs().max() < 0.015


def test_without_numbers_student_and_teacher_have_the_whole_pool() -> None:
    splits = load_splits(Data())
    assert len(splits.train) == len(splits.teacher_train) == 797


def test_without_a_number_of_its_own_the_student_has_the_teachers_images() -> None:
    splits = load_splits(Data(teacher_images=100))
    assert torch.equal(all_images(splits.train), all_images(splits.teacher_train))


def test_equal_numbers_give_student_and_teacher_the_same_images() -> None:
    splits = load_splits(Data(train_images=100, teacher_images=100))
    assert set(keys(pixels(splits.train))) == set(keys(pixels(splits.teacher_train)))


def test_validation_images_come_out_of_the_training_pool() -> None:
    few, many = (load_splits(Data(validation_images=count)) for count in (100, 700))
    assert [len(few.train), len(few.validation)] == [1097, 100]
    assert [len(many.train), len(many.validation)] == [497, 700]
    assert torch.equal(few.test.labels, many.test.labels)


def test_no_validation_images_give_no_validation_split() -> None:
    splits = load_splits(Data(validation_images=0))
    assert splits.validation is None
    assert len(splits.train) == 1197


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (Data(teacher_images=798), r"here\.teacher_images: is 798, must be at most 797"),
        (Data(train_images=798), r"here\.train_images: is 798, must be at most 797"),
        (
            Data(train_images=60, teacher_images=50),
            r"here\.train_images: is 60, must be at most 50",
        ),
        # Of 1197 images, 10 are left to train on: one of each class.
        (Data(validation_images=1188), r"here\.validation_images: is 1188, must be at most 1187"),
    ],
)
def test_more_images_than_there_are_is_an_error(data: Data, message: str) -> None:
    with pytest.raises(DistillError, match=f"^{message}$"):
        load_splits(data, "here")


def test_a_draw_too_small_for_every_class_is_the_first_images() -> None:
    drawn, others = draw(np.array([5, 3, 1, 0]), 1, np.array([0, 1, 0, 1, 0, 1]))
    assert [*drawn] == [5]
    assert [*others] == [3, 1, 0]


def test_a_class_of_one_image_can_be_drawn_from() -> None:
    drawn, others = draw(np.arange(10), 6, np.array([0] * 9 + [1]))
    assert sorted([*drawn, *others]) == list(range(10))
    assert len(drawn) == 6


def test_a_sample_says_its_label_and_position() -> None:
    split = load_splits(Data()).test
    sample = split[7]
    assert sample.index == 7
    assert sample.label == split.labels[7]
    assert split[-1].index == len(split) - 1
    with pytest.raises(IndexError):
        split[len(split)]


def test_a_source_of_the_same_shape_is_accepted_and_may_have_other_classes(folder: Path) -> None:
    splits = load_splits(Data(dataset="imagefolder", root=str(folder), image_size=32))
    like = splits._replace(train=load_splits(Data()).train)
    assert load_splits(Data(dataset="mnist5k", image_size=8), "source.data", like).classes == 10
    assert splits.classes == 3


def test_a_source_of_another_size_is_an_error_that_says_which_size() -> None:
    with pytest.raises(DistillError, match=r"^source\.data\.image_size: is 28, must be 8, as the"):
        load_splits(Data(dataset="mnist5k"), "source.data", like=load_splits(Data()))


def test_a_source_of_other_channels_is_an_error(write_cifar: WriteCifar) -> None:
    root = str(write_cifar())
    message = r"^source\.data\.dataset: is 'cifar10', of 3 channels, must be one of 1, as the"
    with pytest.raises(DistillError, match=message):
        load_splits(
            Data(dataset="cifar10", root=root, image_size=8), "source.data", load_splits(Data())
        )


def test_equal_splits_have_equal_fingerprints() -> None:
    assert load_splits(Data()).test.fingerprint == load_splits(Data()).test.fingerprint


def test_another_split_or_size_or_scale_or_augmentation_has_another_fingerprint() -> None:
    splits = load_splits(Data(train_images=100))
    fingerprints = [
        splits.train.fingerprint,
        splits.teacher_train.fingerprint,
        splits.test.fingerprint,
        load_splits(Data(train_images=200)).test.fingerprint,  # standardised otherwise
        load_splits(Data(train_images=100, image_size=6)).train.fingerprint,
        load_splits(Data(train_images=100, augment=False)).train.fingerprint,
    ]
    assert len(set(fingerprints)) == len(fingerprints)


def test_other_labels_have_another_fingerprint() -> None:
    def fingerprint(*labels: int) -> str:
        source = Labelled(torch.zeros(2, 1, 8, 8), np.array(labels))
        return Split(source, np.arange(2), Scale((0,), (1,), (0, 1)), (1, 8, 8), 2).fingerprint

    assert fingerprint(0, 1) != fingerprint(1, 0)


def test_a_split_survives_the_way_to_another_process(folder: Path) -> None:
    for data in (Data(), Data(dataset="imagefolder", root=str(folder), image_size=16)):
        split = load_splits(data).train
        there = pickle.loads(pickle.dumps(split))
        assert torch.equal(there[3, 5].image, split[3, 5].image)
        assert there.fingerprint == split.fingerprint
