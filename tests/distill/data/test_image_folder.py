"""A folder of images laid out as ImageNet."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from distill.data.conftest import CLASSES, TRAIN_IMAGES, VAL_IMAGES
from distill.data.views import all_images, pixels
from fsp_kernels.distill.config import Data
from fsp_kernels.distill.data import EvaluationBatches, Splits, load_splits
from fsp_kernels.distill.errors import DistillError


def load(root: Path, **settings: object) -> Splits:
    options = {"image_size": 16} | settings
    return load_splits(Data(dataset="imagefolder", root=str(root), **options))


def same_image(first: torch.Tensor, second: torch.Tensor) -> bool:
    return torch.allclose(first, second, atol=1e-5)


def as_for_evaluation(path: Path, size: int) -> torch.Tensor:
    """What torchvision's documentation has one do with an image of ImageNet."""
    transform = v2.Compose(
        [
            v2.RGB(),
            v2.PILToTensor(),
            v2.Resize(round(size * 256 / 224)),
            v2.CenterCrop(size),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
        ]
    )
    return transform(Image.open(path))


def test_train_and_val_are_the_splits(folder: Path) -> None:
    splits = load(folder)
    assert len(splits.train) == len(splits.teacher_train) == len(CLASSES) * TRAIN_IMAGES
    assert len(splits.test) == len(CLASSES) * VAL_IMAGES
    assert splits.validation is None
    assert splits.classes == len(CLASSES)


def test_labels_follow_the_order_of_the_class_names(folder: Path) -> None:
    test = load(folder).test
    for label, name in enumerate(sorted(CLASSES)):
        files = [as_for_evaluation(path, 16) for path in (folder / "val" / name).iterdir()]
        images = all_images(test)[test.labels == label]
        assert len(images) == len(files) == VAL_IMAGES
        assert all(any(same_image(image, file) for file in files) for image in images)


def test_the_size_is_imagenets_unless_one_is_given(folder: Path) -> None:
    splits = load(folder, image_size=None)
    assert splits.image_shape == splits.test[0].image.shape == (3, 224, 224)
    assert splits.train[0, 1].image.shape == (3, 224, 224)


def test_the_first_images_are_of_several_classes(folder: Path) -> None:
    # So that measuring some of the images measures all classes.
    for split in (load(folder).train, load(folder).test):
        assert len(split.labels[:6].unique()) > 1


def test_validation_images_are_drawn_from_train_stratified(folder: Path) -> None:
    splits = load(folder, validation_images=9)
    assert torch.bincount(splits.validation.labels).tolist() == [3, 3, 3]
    assert len(splits.train) == len(CLASSES) * TRAIN_IMAGES - 9
    held_out, trained = all_images(splits.validation), all_images(splits.train)
    assert not any(same_image(a, b) for a in held_out for b in trained)


def test_an_augmented_image_is_another_part_each_time(folder: Path) -> None:
    split = load(folder).train
    images = [split[0, seed].image for seed in range(4)]
    assert all(image.shape == (3, 16, 16) for image in images)
    assert len({image.numpy().tobytes() for image in images}) == 4
    mean, std = (torch.tensor(values)[:, None, None] for values in (split.mean, split.std))
    for image in images:
        assert -1e-6 < (image * std + mean).min() < (image * std + mean).max() < 1 + 1e-6


def test_without_a_seed_an_image_is_as_for_evaluation(folder: Path) -> None:
    assert torch.equal(load(folder).train[0].image, load(folder, augment=False).train[0].image)


def test_without_augmentation_every_split_is_as_for_evaluation(folder: Path) -> None:
    split = load(folder, augment=False).train
    assert torch.equal(split[0, 1].image, split[0].image)


def test_pixels_are_of_red_green_and_blue_between_0_and_1(folder: Path) -> None:
    split = load(folder).test
    assert split.pixel_range == (0, 1)
    assert len(split.mean) == len(split.std) == 3
    assert pixels(split).min() == pytest.approx(0, abs=1e-6)
    assert 0.8 < pixels(split).max() < 1.001


def test_the_fingerprint_moves_with_the_folder_and_changes_with_a_file(folder: Path) -> None:
    before = load(folder).test.fingerprint
    moved = folder.rename(folder.parent / "elsewhere")
    assert load(moved).test.fingerprint == before
    file = next((moved / "val" / "one").iterdir())
    Image.open(file).convert("RGB").resize((90, 90)).save(file)
    assert load(moved).test.fingerprint != before


def test_a_missing_root_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DistillError, match=r"^data\.root: .*nowhere is not there"):
        load(tmp_path / "nowhere")


@pytest.mark.parametrize("part", ["train", "val"])
def test_a_missing_part_is_an_error_that_says_the_layout(folder: Path, part: str) -> None:
    shutil.rmtree(folder / part)
    message = rf"^data\.root: .* has no folder {part}; it must hold train/CLASS/\* and val/CLASS/\*"
    with pytest.raises(DistillError, match=message):
        load(folder)


@pytest.mark.parametrize(("part", "other"), [("train", "val"), ("val", "train")])
def test_a_class_of_one_part_only_is_an_error_that_names_it(
    folder: Path, part: str, other: str
) -> None:
    shutil.rmtree(folder / other / "four")
    message = rf"^data\.root: .* must have the same classes; only {part} has four$"
    with pytest.raises(DistillError, match=message):
        load(folder)


@pytest.mark.parametrize("part", ["train", "val"])
def test_a_class_without_images_is_an_error_that_names_it(folder: Path, part: str) -> None:
    for path in (folder / part / "four").iterdir():
        path.rename(path.with_suffix(".txt"))
    with pytest.raises(DistillError, match=rf"^data\.root: .*{part}/four holds no image \(\.jpg"):
        load(folder)


def test_a_single_class_is_an_error(folder: Path) -> None:
    for part in ("train", "val"):
        for name in CLASSES[1:]:
            shutil.rmtree(folder / part / name)
    with pytest.raises(DistillError, match=r"train must have 2 classes or more, has 1$"):
        load(folder)


def test_a_folder_without_classes_is_an_error(folder: Path) -> None:
    for part in ("train", "val"):
        shutil.rmtree(folder / part)
        (folder / part).mkdir()
    with pytest.raises(DistillError, match=r"train must have 2 classes or more, has 0$"):
        load(folder)


def test_hidden_files_and_folders_are_left_out(folder: Path) -> None:
    # macOS leaves ._NAME beside NAME on foreign disks and in archives.
    for part in ("train", "val"):
        (folder / part / "one" / "._0.png").write_bytes(b"what?")
        shutil.copytree(folder / part / "four", folder / part / "one" / ".trash")
    shutil.copytree(folder / "train" / "four", folder / "train" / ".cache")
    splits = load(folder)
    assert splits.classes == len(CLASSES)
    assert len(splits.train) == len(CLASSES) * TRAIN_IMAGES
    assert len(splits.test) == len(CLASSES) * VAL_IMAGES


@pytest.mark.parametrize("target", [".", "..", "../..", "../four", "../../../folder"])
def test_a_link_that_leads_back_adds_no_image(folder: Path, target: str) -> None:
    (folder / "train" / "one" / "again").symlink_to(target)
    assert len(load(folder).train) == len(CLASSES) * TRAIN_IMAGES


def test_two_links_to_one_folder_add_its_images_once(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "train" / "one", tmp_path / "more")
    for name in ("first", "second"):
        (folder / "train" / "one" / name).symlink_to(tmp_path / "more")
    assert len(load(folder).train) == (len(CLASSES) + 1) * TRAIN_IMAGES


def test_links_may_stand_for_classes_and_for_images(folder: Path, tmp_path: Path) -> None:
    before = load(folder)
    (folder / "train" / "one").rename(tmp_path / "elsewhere")
    (folder / "train" / "one").symlink_to(tmp_path / "elsewhere")
    image = folder / "val" / "one" / "13.JPEG"
    image.rename(tmp_path / "13.JPEG")
    image.symlink_to(tmp_path / "13.JPEG")
    splits = load(folder)
    assert splits.train.fingerprint == before.train.fingerprint
    assert torch.equal(all_images(splits.test), all_images(before.test))


@pytest.mark.parametrize("link", ["train/one/more", "val/five", "train/one/itself"])
def test_a_link_to_nowhere_is_an_error_that_names_it(folder: Path, link: str) -> None:
    target = "itself" if link.endswith("itself") else "/not/mounted"
    (folder / link).symlink_to(target)
    message = rf"^data\.root: .*/{link} is a link to {target}, which is not there$"
    with pytest.raises(DistillError, match=message):
        load(folder)


def test_a_folder_that_may_not_be_listed_is_an_error(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def scandir(path: Path) -> object:
        if Path(path).name == "four":
            raise PermissionError(13, "Permission denied")
        return listed(path)

    listed = os.scandir
    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(DistillError, match=r"^data\.root: .*/four cannot be listed: Permission"):
        load(folder)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("damage", ["cut", "no image", "gone"])
def test_an_unreadable_image_is_an_error_that_names_the_file(
    folder: Path, workers: int, damage: str
) -> None:
    path = folder / "val" / "four" / "13.JPEG"
    content = path.read_bytes()
    split = load(folder).test
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(content[:300] if damage == "cut" else b"what?")
    with pytest.raises(DistillError, match=r"^/\S*four/13\.JPEG: cannot be read as an image: "):
        list(EvaluationBatches(split, workers=workers))


@pytest.fixture
def damaged(folder: Path) -> Path:
    """Five files that cannot be read."""
    cut = folder / "val" / "four" / "13.JPEG"
    cut.write_bytes(cut.read_bytes()[:-20])
    for path in sorted((folder / "train" / "one").iterdir())[:3]:
        path.write_bytes(b"what?")
    (folder / "train" / "eight" / "link.png").symlink_to("/not/mounted.png")
    return folder


def test_corrupt_images_are_refused_before_training(damaged: Path) -> None:
    message = (
        r"^data: 5 of 49 images cannot be read:\n(/\S*: cannot be read as an image: .*\n){3}"
        r"\.\.\.\ndata\.corrupt=skip leaves them out$"
    )
    with pytest.raises(DistillError, match=message):
        load(damaged)


def test_corrupt_images_are_left_out_on_demand_and_that_is_said(damaged: Path) -> None:
    said: list[str] = []
    data = Data(dataset="imagefolder", root=str(damaged), image_size=16, corrupt="skip")
    splits = load_splits(data, say=said.append)
    assert len(splits.train) == len(CLASSES) * TRAIN_IMAGES - 3
    assert len(splits.test) == len(CLASSES) * VAL_IMAGES - 1
    assert "5 of 49 images cannot be read and are left out" in said[-1]
    for split in (splits.train, splits.test):
        assert len(all_images(split)) == len(split)


def test_a_class_with_no_image_that_can_be_read_is_an_error(folder: Path) -> None:
    for path in (folder / "val" / "four").iterdir():
        path.write_bytes(b"what?")
    with pytest.raises(DistillError, match=r"^data\.root: .*val/four holds no image"):
        load(folder, corrupt="skip")


def test_unchecked_images_are_not_read_before_a_step_draws_them(damaged: Path) -> None:
    splits = load(damaged, corrupt="unchecked")
    assert len(splits.train) == len(CLASSES) * TRAIN_IMAGES + 1
    with pytest.raises(DistillError, match="cannot be read as an image: "):
        all_images(splits.train)
