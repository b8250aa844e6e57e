"""Data sets that a user's function returns: used as documented, or refused."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from image_data import all_images, pixels
from PIL import Image
from processes import run_group
from torch.utils.data import IterableDataset

from fsp_kernels.distill.config import Data
from fsp_kernels.distill.data import EvaluationBatches, Splits, load_splits
from fsp_kernels.distill.data.images import CorruptImageError, check_images
from fsp_kernels.errors import DistillError

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


def test_the_three_sets_are_the_splits_and_mix_the_classes() -> None:
    splits = load((some(12), some(5), some(4)))
    assert [len(split) for split in splits] == [12, 12, 5, 4]
    assert splits.classes == 3
    assert splits.image_shape == (3, 8, 8)
    for name in ("train", "validation", "test"):
        split = getattr(splits, name)
        assert sorted(levels(splits, name)) == list(range(len(split)))
        assert [level % 3 for level in levels(splits, name)] == split.labels.tolist()
    by_class = some(30, lambda n: (grey(n), n // 10))
    assert len(load((by_class, None, some())).train.labels[:8].unique()) > 1


def test_validation_images_have_their_own_set_or_are_drawn_from_train() -> None:
    splits = load((some(12), None, some()), validation_images=3)
    assert sorted(levels(splits) + levels(splits, "validation")) == list(range(12))
    assert load((some(12), None, some())).validation is None
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
    assert splits.image_shape == splits.train[0, 1].image.shape == shape
    assert torch.allclose(pixels(splits.test), torch.tensor(0.2, dtype=torch.float64), atol=1e-6)
    moments = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  # ImageNet's, or their mean
    expected = moments if shape[0] == 3 else ((0.449,), (0.226,))
    assert (splits.train.mean, splits.train.std) == expected


@pytest.mark.parametrize("label", [1, np.int64(1), np.uint8(1), torch.tensor(1)])
def test_labels_are_whole_numbers_of_any_kind(label: Any) -> None:
    train = [(grey(), label)] * 4
    assert load((train, None, some())).train.labels.tolist() == [1] * 4


def test_images_of_several_sizes_are_treated_as_an_image_folders() -> None:
    sets = some(6, lambda n: (Image.fromarray(grey(n, (20 + n, 30))), n % 3))
    splits = load((sets, None, sets), image_size=16)
    assert splits.image_shape == splits.train[0, 1].image.shape == (3, 16, 16)
    assert sorted(levels(splits, "test")) == list(range(6))


@pytest.mark.parametrize(
    ("sets", "message"),
    [
        (5, r"returned an int, must return \(train, validation, test\)$"),
        ({"train": 1, "validation": 2, "test": 3}, "returned a dict of 3, must return"),
        ((some(), some()), "returned a tuple of 2, must return"),
        ((None, None, some()), "train is a NoneType, must have a length and numbered items$"),
        ((some(), None, iter(some())), "test is a list_iterator, must have a length"),
        ((Endless(), None, some()), "train is an Endless, must have a length"),
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
        (grey(), r"the item is a ndarray, must be \(image, label\), or a dict with"),
        ({"img": grey(), "label": 1}, "the item is a dict of 2 with the keys img, label, must"),
        ((grey(), 1, 2), "the item is a tuple of 3, must be"),
        ((grey(), -1), "has the label -1, must be a whole number, at least 0$"),
        ((grey(), 0.5), r"has the label 0\.5, must be a whole number"),
        ((grey(), True), "has the label True, must be"),
        ((grey(), "cat"), "has the label 'cat', must be"),
        (("cat.png", 0), "is a str, must be a PIL image, a tensor .* or a NumPy array"),
        ((grey().tolist(), 0), "is a list of 8, must be"),
        ((grey().astype(np.int64), 0), "is an array of int64, must be"),
        ((grey().astype(np.uint16), 0), r"has torch\.uint16 from 0 to 0, must be .* of uint8"),
        ((torch.zeros(3, 8, 8).long(), 0), r"has torch\.int64 from 0 to 0, must be"),
        ((np.full((8, 8), 1.5), 0), r"has torch\.float64 from 1\.5 to 1\.5, must be"),
        ((np.full((8, 8), np.nan), 0), r"has torch\.float64 from nan to nan, must be"),
        ((torch.zeros(8, 8, 3), 0), r"has the shape \(8, 8, 3\), must be .* tensor \(C, H, W\)"),
        ((torch.zeros(8, 8), 0), r"has the shape \(8, 8\), must be"),
        ((grey(0, (3, 8, 8)), 0), r"has the shape \(3, 8, 8\), must be .* \(H, W\) or \(H, W, C\)"),
        ((grey(0, (0, 8)), 0), r"has the shape \(0, 8\), must be"),
        ((grey(0, (9, 8, 3)), 0), r"has the shape \(3, 9, 8\), must begin with \(3, 8, 8\)"),
        (
            (grey(0, (8, 8)), 0),
            r"has the shape \(1, 8, 8\), must begin with \(3, 8, 8\) as the first",
        ),
    ],
)
def test_an_item_of_another_kind_is_refused_by_its_number(item: Any, message: str) -> None:
    sets = some(5)
    sets[3] = item
    with pytest.raises(DistillError, match=rf"(?s)data\.dataset: image 3 of test: {message}"):
        load((some(), None, sets), corrupt="skip")


def test_an_error_of_the_callable_shows_where_it_was_raised() -> None:
    def fails() -> Sets:
        raise KeyError("no such column")

    message = (
        r"(?s)^data\.dataset: .*:returned: KeyError: 'no such column'\n.*test_own\.py.* in fails: "
    )
    with pytest.raises(DistillError, match=message):
        load(fails)


def test_an_image_that_cannot_be_read_shows_why_or_is_skipped(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "x.png")
    content = (tmp_path / "x.png").read_bytes()
    (tmp_path / "x.png").write_bytes(content[: len(content) // 2])
    cut = some()
    cut[1] = (Image.open(tmp_path / "x.png"), 0)
    for train, message in (
        (Raises(), r"the disk is on fire\n.*in __getitem__: "),
        (cut, "cannot be read as an image: "),
    ):
        sets = (train, None, some())
        with pytest.raises(DistillError, match=rf"(?s)^data: 1 of .*image 1 of train: {message}"):
            load(sets)
        assert len(load(sets, corrupt="skip").train) == len(train) - 1
        if train is cut:
            cut[1] = (Image.open(tmp_path / "x.png"), 0)


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_that_changed_or_was_not_checked_is_named_when_it_is_read(workers: int) -> None:
    sets = some(5)
    changed = load((some(), None, sets)).test
    sets[3] = (grey(0, (9, 9, 3)), 0)
    unchecked = load((some(), None, sets), corrupt="unchecked").test
    resized = load((some(), None, sets), image_size=8, corrupt="unchecked").test
    assert len(all_images(resized)) == 5
    for split in (changed, unchecked):
        with pytest.raises(DistillError, match=r"^data\.dataset: image 3 of test: .*\(3, 9, 9\)"):
            list(EvaluationBatches(split, workers=workers))
    sets[3] = (grey(0, (8, 8)), 0)
    with pytest.raises(DistillError, match=r"image 3 of test: has .*\(1, 8, 8\), .* with \(3,\)"):
        all_images(resized)


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


class Kinds:
    """Images of the given kinds, which note who is asked for which."""

    threads = False

    def __init__(self, kinds: str) -> None:
        """``.`` a sound image, ``c`` a corrupt one, ``u`` one that cannot be used."""
        self.kinds, self.asked = kinds, []

    def __len__(self) -> int:
        return len(self.kinds)

    def check(self, number: int) -> int:
        self.asked.append(number)
        if self.kinds[number] != ".":
            error = CorruptImageError if self.kinds[number] == "c" else DistillError
            raise error(f"image {number}")
        return number * number


def check(kinds: Sequence[Kinds], corrupt: str = "refuse") -> list[dict[int, int]]:
    return check_images(kinds, Data(dataset="a:b", corrupt=corrupt), "here", lambda _: None)


def test_facts_come_by_source_and_number_without_corrupt_images() -> None:
    assert check([Kinds("..."), Kinds("..")]) == [{0: 0, 1: 1, 2: 4}, {0: 0, 1: 1}]
    assert check([Kinds(".c."), Kinds("..")], "skip") == [{0: 0, 2: 4}, {0: 0, 1: 1}]


@pytest.mark.parametrize(
    ("kinds", "corrupt", "message"),
    [
        (
            [".c.", ".."],
            "refuse",
            r"1 of 5 images cannot be read:\nimage 1\nhere\.corrupt=skip lea",
        ),
        (
            ["cc", "..."],
            "skip",
            r"2 of 5 images cannot be read:\nimage 0\nimage 1$",
        ),  # none is left
        ([".cu"], "skip", r"1 of 3 images cannot be used:\nimage 2$"),
    ],
)
def test_corrupt_images_that_cannot_be_skipped_are_refused(
    kinds: list[str], corrupt: str, message: str
) -> None:
    with pytest.raises(DistillError, match=rf"^here: {message}"):
        check([*map(Kinds, kinds)], corrupt)


def _in_a_group(rank: int, folder: Path) -> None:
    Accelerator(cpu=True)  # by which the processes of a group know of one another
    kinds = [Kinds(".c..c"), Kinds(".")]
    found = check(kinds, "skip")
    try:
        check([Kinds(".c")])
    except DistillError as error:
        message = str(error)
    note = {"found": [[*part] for part in found], "asked": [part.asked for part in kinds]}
    (folder / f"{rank}.json").write_text(json.dumps(note | {"message": message}))


def test_the_processes_of_a_group_divide_the_images_and_agree(tmp_path: Path) -> None:
    run_group(2, _in_a_group, tmp_path)
    notes = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    assert [note["asked"] for note in notes] == [[[0, 1], []], [[2, 3, 4], [0]]]
    for note in notes:
        assert note["found"] == [[0, 2, 3], [0]]
        assert note["message"].startswith("here: 1 of 2 images cannot be read:\nimage 1\n")
