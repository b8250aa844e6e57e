"""A data set of one's own: whatever a user may return is taken as documented, or refused."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import IterableDataset

from distill.data.views import all_images, pixels
from fsp_kernels.distill.config import Data
from fsp_kernels.distill.data import EvaluationBatches, Splits, load_splits
from fsp_kernels.distill.errors import DistillError

THIS = f"{__name__}:returned"
Sets = tuple[Any, Any, Any]


def returned(make: Callable[[], Sets], **_: object) -> Sets:
    """What ``data.dataset`` names; the recipe's arguments say what it returns."""
    return make()


def load(sets: object, arguments: dict[str, object] | None = None, **settings: Any) -> Splits:
    make = sets if callable(sets) else lambda: sets
    data = Data(dataset=THIS, arguments={"make": make} | (arguments or {}), **settings)
    return load_splits(data)


def grey(level: int = 0, shape: tuple[int, ...] = (8, 8, 3)) -> np.ndarray:
    return np.full(shape, level, dtype=np.uint8)


def some(count: int = 12, item: Callable[[int], Any] | None = None) -> list[Any]:
    """Images that are as bright as their number, of three classes."""
    return [(grey(n), n % 3) if item is None else item(n) for n in range(count)]


def levels(splits: Splits, name: str = "train") -> list[int]:
    """Each image's brightness, in the order of the split."""
    return [round(255 * image.mean().item()) for image in pixels(getattr(splits, name))]


class Raises:
    def __len__(self) -> int:
        return 3

    def __getitem__(self, number: int) -> tuple[np.ndarray, int]:
        if number == 1:
            raise RuntimeError("the disk is on fire")
        return grey(), number


class Endless(IterableDataset):
    def __iter__(self) -> Iterator[tuple[np.ndarray, int]]:
        yield grey(), 0

    def __len__(self) -> int:
        return 3


def test_the_three_sets_are_the_splits() -> None:
    splits = load((some(12), some(5), some(4)))
    assert [len(split) for split in splits] == [12, 12, 5, 4]
    assert splits.classes == 3
    assert splits.image_shape == (3, 8, 8)
    for name in ("train", "validation", "test"):
        split = getattr(splits, name)
        assert sorted(levels(splits, name)) == list(range(len(split)))
        assert [level % 3 for level in levels(splits, name)] == split.labels.tolist()


def test_the_first_images_are_of_several_classes() -> None:
    splits = load((some(30, lambda n: (grey(n), n // 10)), None, some()))
    assert len(splits.train.labels[:8].unique()) > 1


def test_without_validation_images_they_are_drawn_from_train() -> None:
    splits = load((some(12), None, some()), validation_images=3)
    assert sorted(levels(splits) + levels(splits, "validation")) == list(range(12))
    assert load((some(12), None, some())).validation is None


def test_a_number_of_validation_images_beside_their_own_set_is_refused() -> None:
    message = r"^data\.validation_images: is 3, must be left out: .* has 5 of its own$"
    with pytest.raises(DistillError, match=message):
        load((some(), some(5), some()), validation_images=3)


@pytest.mark.parametrize(
    ("image", "shape"),
    [
        (Image.fromarray(grey(51)), (3, 8, 8)),
        (Image.fromarray(grey(51, (8, 6))), (3, 8, 6)),
        (Image.fromarray(np.full((8, 8), 51 * 257, np.uint16)), (3, 8, 8)),
        (grey(51, (8, 6)), (1, 8, 6)),
        (grey(51, (8, 6, 4)), (4, 8, 6)),
        (grey(51)[::-1], (3, 8, 8)),
        (np.full((8, 8), 0.2), (1, 8, 8)),
        (torch.full((3, 8, 6), 51, dtype=torch.uint8), (3, 8, 6)),
        (torch.full((1, 8, 8), 0.2, dtype=torch.float64, requires_grad=True), (1, 8, 8)),
    ],
)
def test_images_come_in_many_kinds(image: Any, shape: tuple[int, ...]) -> None:
    sets = some(4, lambda n: {"image": image, "label": n % 2})
    splits = load((sets, None, sets))
    assert splits.image_shape == shape
    assert torch.allclose(pixels(splits.test), torch.tensor(0.2, dtype=torch.float64), atol=1e-6)
    assert splits.train[0, 1].image.shape == shape


@pytest.mark.parametrize("label", [1, np.int64(1), np.uint8(1), torch.tensor(1)])
def test_labels_are_whole_numbers_of_any_kind(label: Any) -> None:
    train = [(grey(), label)] * 4
    assert load((train, None, some())).train.labels.tolist() == [1] * 4


@pytest.mark.parametrize(
    ("channels", "mean", "std"),
    [
        (1, (0.449,), (0.226,)),
        (3, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        (4, (0.449,), (0.226,)),
    ],
)
def test_images_are_standardised_by_imagenets_moments_or_their_mean(
    channels: int, mean: tuple[float, ...], std: tuple[float, ...]
) -> None:
    train = load(
        [
            some(12, lambda n: (grey(n, (8, 8, channels)), n % 3)),
            None,
            some(3, lambda n: (grey(n, (8, 8, channels)), n)),
        ]
    ).train
    assert (train.mean, train.std) == (mean, std)


def test_images_of_several_sizes_are_treated_as_an_image_folders() -> None:
    sets = some(6, lambda n: (Image.fromarray(grey(n, (20 + n, 30))), n % 3))
    splits = load((sets, None, sets), image_size=16)
    assert splits.image_shape == splits.train[0, 1].image.shape == (3, 16, 16)
    assert sorted(levels(splits, "test")) == list(range(6))


@pytest.mark.parametrize(
    ("sets", "message"),
    [
        (5, r"returned of type int, must return \(train, validation, test\)$"),
        ({"train": 1, "validation": 2, "test": 3}, "returned of type dict, must return"),
        ((some(), some()), "returned of type tuple of 2, must return"),
        ((None, None, some()), "train is of type NoneType, must have a length and be indexed"),
        ((some(), None, iter(some())), "test is of type list_iterator, must have a length"),
        ((Endless(), None, some()), "train is of type Endless, must have a length"),
        ((some(), [], some()), "validation is empty$"),
        ((some(1), None, some(1)), "must have 2 classes or more, has 1$"),
    ],
)
def test_anything_but_three_sets_is_refused(sets: object, message: str) -> None:
    with pytest.raises(DistillError, match=rf"^data\.dataset: .*{message}"):
        load(sets)


@pytest.mark.parametrize(
    ("item", "message"),
    [
        (grey(), r"the item is of type ndarray, must be \(image, label\), or a dict with"),
        ({"img": grey(), "label": 1}, "the item is of type dict with the keys img, label, must"),
        ((grey(), 1, 2), "the item is of type tuple, must be"),
        ((grey(), -1), "has the label -1, must be a whole number, at least 0$"),
        ((grey(), 0.5), r"has the label 0\.5, must be a whole number"),
        ((grey(), True), "has the label True, must be"),
        ((grey(), "cat"), "has the label 'cat', must be"),
        (("cat.png", 0), "is of type str, must be a PIL image, a tensor, or a NumPy array"),
        ((grey().tolist(), 0), "is of type list, must be"),
        ((grey().astype(np.int64), 0), "is an array of int64, must be"),
        ((grey().astype(np.uint16), 0), r"has torch\.uint16 from 0 to 0, must be uint8, or floats"),
        ((torch.zeros(3, 8, 8).long(), 0), r"has torch\.int64 from 0 to 0, must be uint8"),
        ((np.full((8, 8), 1.5), 0), r"has torch\.float64 from 1\.5 to 1\.5, must be"),
        ((np.full((8, 8), np.nan), 0), r"has torch\.float64 from nan to nan, must be"),
        ((torch.zeros(8, 8, 3), 0), r"has the shape 8 x 8 x 3, must be \(C, H, W\)"),
        ((torch.zeros(8, 8), 0), r"has the shape 8 x 8, must be \(C, H, W\)"),
        ((grey(0, (3, 8, 8)), 0), r"has the shape 3 x 8 x 8, must be \(H, W\) or \(H, W, C\)"),
        ((grey(0, (0, 8)), 0), "has the shape 0 x 8, must be"),
        (
            (grey(0, (9, 8, 3)), 0),
            r"is 3 x 9 x 8 \(channels, height, width\), must be of 3 x 8",
        ),
        ((grey(0, (8, 8)), 0), "is 1 x 8 x 8 .*, must be of 3 x 8 x 8 as the first"),
    ],
)
def test_an_item_of_another_kind_is_refused_by_its_number(item: Any, message: str) -> None:
    sets = some(5)
    sets[3] = item
    with pytest.raises(DistillError, match=rf"(?s)data\.dataset: image 3 of test:? {message}"):
        load((some(), None, sets), corrupt="skip")


def test_with_an_image_size_there_is_still_one_number_of_channels() -> None:
    sets = some(5)
    sets[3] = (grey(0, (8, 8)), 0)
    with pytest.raises(DistillError, match=r"image 3 of test is 1 x 8 x 8 .* of 3 channels"):
        load((some(), None, sets), image_size=8)


def test_an_error_of_the_callable_shows_where_it_was_raised() -> None:
    def fails() -> Sets:
        raise KeyError("no such column")

    message = (
        r"(?s)^data\.dataset: .*:returned: KeyError: 'no such column'\n.*test_own\.py.* in fails: "
    )
    with pytest.raises(DistillError, match=message):
        load(fails)


def test_an_error_of_an_item_shows_where_it_was_raised_or_is_skipped() -> None:
    message = r"(?s)^data: 1 of 15 .*image 1 of train: the disk is on fire\n.*in __getitem__: "
    with pytest.raises(DistillError, match=message):
        load((Raises(), None, some()))
    assert len(load((Raises(), None, some()), corrupt="skip").train) == 2


@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_in_the_midst_of_training_names_the_image(workers: int) -> None:
    sets = some(5)
    split = load((some(), None, sets)).test
    sets[3] = (grey(0, (9, 9, 3)), 0)
    with pytest.raises(DistillError, match=r"^data\.dataset: image 3 of test is 3 x 9 x 9 "):
        list(EvaluationBatches(split, workers=workers))


def test_a_truncated_file_of_a_set_counts_as_corrupt(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "x.png")
    content = (tmp_path / "x.png").read_bytes()
    (tmp_path / "x.png").write_bytes(content[: len(content) // 2])

    class Files(list):
        def __getitem__(self, number: int) -> Any:
            return (
                (Image.open(tmp_path / "x.png"), 0) if number == 1 else super().__getitem__(number)
            )

    with pytest.raises(DistillError, match="image 1 of test: cannot be read as an image: "):
        load((some(), None, Files(some())))
    assert len(load((some(), None, Files(some())), corrupt="skip").test) == 11


def test_unchecked_images_are_read_when_they_are_drawn() -> None:
    sets = some(5)
    sets[3] = (grey(0, (9, 9, 3)), 0)
    splits = load((some(), None, sets), corrupt="unchecked")
    assert len(splits.test) == 5
    with pytest.raises(DistillError, match=r"image 3 of test is 3 x 9 x 9 "):
        all_images(splits.test)


def test_the_fingerprint_tells_images_and_labels_apart() -> None:
    def of(sets: Sequence[Any]) -> str:
        return load((sets, None, some())).train.fingerprint

    assert of(some()) == of(some())
    assert of(some()) != of(some(12, lambda n: (grey(n + 1), n % 3)))
    assert of(some()) != of(some(12, lambda n: (grey(n), (n + 1) % 3)))


def test_the_callable_is_imported_from_the_current_directory_and_given_the_arguments(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("my_digits.py").write_text(
        "import torch\n"
        "def splits(count):\n"
        "    items = [(torch.zeros(1, 8, 8), n % 2) for n in range(count)]\n"
        "    return items, None, items\n"
    )
    data = Data(dataset="my_digits:splits", arguments={"count": 6})
    assert len(load_splits(data).train) == 6
    message = r"(?s)^source\.data\.dataset: my_digits:splits: .*unexpected .*'wrong'"
    with pytest.raises(DistillError, match=message):
        load_splits(Data(dataset="my_digits:splits", arguments={"wrong": 6}), "source.data")
    with pytest.raises(DistillError, match=r"^data\.dataset: 'my_digits' has no 'split'; did you"):
        load_splits(Data(dataset="my_digits:split"))
