"""Random crops: real ones, and decided by seed and index alone."""

from __future__ import annotations

from itertools import product

import pytest
import torch
import torch.nn.functional as F

from fsp_kernels.distill.config import Data
from fsp_kernels.distill.data import Split, load_splits

PADDINGS = [("digits", None, 1), ("digits", 16, 2), ("mnist5k", None, 2), ("mnist5k", 8, 1)]


@pytest.fixture(scope="module")
def split() -> Split:
    return load_splits(Data()).train


def shifts(split: Split, index: int, seed: int, padding: int) -> set[tuple[int, int]]:
    """By how much the augmented image may have been shifted: black margins leave it open."""
    side = split.image_shape[1]
    black = -split.mean[0] / split.std[0]
    padded = F.pad(split[index].image, [padding] * 4, value=black)
    image = split[index, seed].image
    return {
        (top, left)
        for top, left in product(range(2 * padding + 1), repeat=2)
        if torch.allclose(image, padded[:, top : top + side, left : left + side], atol=1e-5)
    }


@pytest.mark.parametrize(("dataset", "size", "padding"), PADDINGS)
def test_an_augmented_digit_is_a_crop_of_the_one_padded_with_black(
    dataset: str, size: int | None, padding: int
) -> None:
    split = load_splits(Data(dataset=dataset, image_size=size)).train
    found = [shifts(split, 5, seed, padding) for seed in range(40 * padding**2)]
    assert all(found)
    assert len(set.union(*found)) == (2 * padding + 1) ** 2


def test_seed_and_index_alone_decide(split: Split) -> None:
    torch.manual_seed(1)
    alone = split[3, 7].image
    torch.manual_seed(2)
    among_others = split.__getitems__([(9, 7), (4, 8), (3, 7)]).images[2]
    assert torch.equal(alone, among_others)


def test_another_seed_decides_otherwise(split: Split) -> None:
    assert not set.intersection(*(shifts(split, 0, seed, 1) for seed in range(30)))


def test_another_index_decides_otherwise(split: Split) -> None:
    assert not set.intersection(*(shifts(split, index, 1, 1) for index in range(30)))


def test_the_global_random_numbers_are_left_alone(split: Split) -> None:
    before = torch.get_rng_state()
    split[0, 1]
    assert torch.equal(torch.get_rng_state(), before)


def test_without_a_seed_the_image_is_as_for_evaluation(split: Split) -> None:
    plain = load_splits(Data(augment=False)).train
    assert all(torch.equal(split[index].image, plain[index].image) for index in range(20))


def test_student_and_teacher_splits_augment_if_the_recipe_says_so() -> None:
    for augment in (True, False):
        splits = load_splits(Data(augment=augment))
        for split in (splits.train, splits.teacher_train):
            changed = [not torch.equal(split[0, seed].image, split[0].image) for seed in range(9)]
            assert any(changed) == augment


def test_validation_and_test_never_augment() -> None:
    splits = load_splits(Data(augment=True))
    for split in (splits.validation, splits.test):
        assert all(torch.equal(split[0, seed].image, split[0].image) for seed in range(9))
