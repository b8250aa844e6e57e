"""A folder of images laid out as ImageNet, of every kind of file that Pillow reads."""

from __future__ import annotations

import os
import re
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from image_data import CLASSES, TRAIN_IMAGES, VAL_IMAGES, all_images, pixels
from PIL import ExifTags, Image
from torch import Tensor
from torchvision.transforms import v2

from fsp_kernels.distill.config import Data
from fsp_kernels.distill.data import EvaluationBatches, Splits, load_splits
from fsp_kernels.distill.data.images import ImageFiles
from fsp_kernels.errors import DistillError

RAMP = np.arange(0, 256, 16).repeat(2).reshape(4, 8).astype(np.uint8)


def load(root: Path, **settings: object) -> Splits:
    options = {"image_size": 16} | settings
    return load_splits(Data(dataset="imagefolder", root=str(root), **options))


def same_image(first: Tensor, second: Tensor) -> bool:
    return torch.allclose(first, second, atol=1e-5)


def as_for_evaluation(path: Path, size: int) -> Tensor:
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


def test_train_and_val_are_the_splits_and_mix_the_classes(folder: Path) -> None:
    splits = load(folder)
    assert len(splits.train) == len(splits.teacher_train) == len(CLASSES) * TRAIN_IMAGES
    assert len(splits.test) == len(CLASSES) * VAL_IMAGES
    assert splits.validation is None
    assert splits.classes == len(CLASSES)
    for split in (splits.train, splits.test):
        assert len(split.labels[:6].unique()) > 1


def test_labels_follow_the_order_of_the_class_names(folder: Path) -> None:
    test = load(folder).test
    for label, name in enumerate(sorted(CLASSES)):
        files = [as_for_evaluation(path, 16) for path in (folder / "val" / name).iterdir()]
        images = all_images(test)[test.labels == label]
        assert len(images) == len(files) == VAL_IMAGES
        assert all(any(same_image(image, file) for file in files) for image in images)


def test_images_are_of_imagenets_size_and_range(folder: Path) -> None:
    splits = load(folder, image_size=None)
    assert splits.image_shape == splits.train[0, 1].image.shape == (3, 224, 224)
    found = pixels(splits.test)
    assert splits.test.pixel_range == (0, 1)
    assert found.min() == pytest.approx(0, abs=1e-6)
    assert 0.8 < found.max() < 1.001


def test_validation_images_are_drawn_from_train_stratified(folder: Path) -> None:
    splits = load(folder, validation_images=9)
    assert torch.bincount(splits.validation.labels).tolist() == [3, 3, 3]
    assert len(splits.train) == len(CLASSES) * TRAIN_IMAGES - 9
    held_out, trained = all_images(splits.validation), all_images(splits.train)
    assert not any(same_image(a, b) for a in held_out for b in trained)


def test_an_augmented_image_is_another_part_for_each_seed(folder: Path) -> None:
    split, plain = load(folder).train, load(folder, augment=False).train
    images = [split[0, seed].image for seed in range(4)]
    assert len({image.numpy().tobytes() for image in images}) == 4
    mean, std = (torch.tensor(values)[:, None, None] for values in (split.mean, split.std))
    for image in images:
        assert image.shape == (3, 16, 16)
        assert -1e-6 < (image * std + mean).min() < (image * std + mean).max() < 1 + 1e-6
    assert torch.equal(plain[0, 1].image, split[0].image)


def test_the_fingerprint_moves_with_the_folder_and_changes_with_a_file(folder: Path) -> None:
    before = load(folder).test.fingerprint
    moved = folder.rename(folder.parent / "elsewhere")
    assert load(moved).test.fingerprint == before
    file = next((moved / "val" / "one").iterdir())
    Image.open(file).convert("RGB").resize((90, 90)).save(file)
    assert load(moved).test.fingerprint != before


def _rename_images(folder: Path) -> None:
    for path in folder.iterdir():
        path.rename(path.with_suffix(".txt"))


def _damage_images(folder: Path) -> None:
    for path in folder.iterdir():
        path.write_bytes(b"what?")


@pytest.mark.parametrize(
    ("change", "place", "message"),
    [
        (shutil.rmtree, ".", "train cannot be listed .*; the root must hold train/CLASS"),
        (shutil.rmtree, "train", "train cannot be listed .*; the root must hold train/CLASS"),
        (shutil.rmtree, "val", "val cannot be listed .*; the root must hold train/CLASS"),
        (shutil.rmtree, "val/four", "folder must have the same classes; only train has four$"),
        (shutil.rmtree, "train/four", "folder must have the same classes; only val has four$"),
        (_rename_images, "train/four", r"train/four holds no image \(\.jpg"),
        (_rename_images, "val/four", r"val/four holds no image \(\.jpg"),
        (_damage_images, "val/four", r"val/four holds no image \(\.jpg"),
    ],
)
def test_another_layout_is_an_error_that_names_the_place(
    folder: Path, change: Callable[[Path], None], place: str, message: str
) -> None:
    change(folder / place)
    with pytest.raises(DistillError, match=rf"^data\.root: .*{message}"):
        load(folder, corrupt="skip")


@pytest.mark.parametrize("count", [0, 1])
def test_fewer_than_two_classes_are_an_error(folder: Path, count: int) -> None:
    for part in ("train", "val"):
        for name in CLASSES[count:]:
            shutil.rmtree(folder / part / name)
    with pytest.raises(DistillError, match=rf"train must have 2 classes or more, has {count}$"):
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
    splits = load(folder)
    assert len(splits.train) == len(CLASSES) * TRAIN_IMAGES
    assert torch.bincount(splits.train.labels).tolist() == [TRAIN_IMAGES] * 3


def test_links_may_stand_for_folders_classes_and_images(folder: Path, tmp_path: Path) -> None:
    before = load(folder)
    (folder / "train" / "one").rename(tmp_path / "elsewhere")
    (folder / "train" / "one").symlink_to(tmp_path / "elsewhere")
    image = folder / "val" / "one" / "13.JPEG"
    image.rename(tmp_path / "13.JPEG")
    image.symlink_to(tmp_path / "13.JPEG")
    splits = load(folder)
    assert splits.train.fingerprint == before.train.fingerprint
    assert torch.equal(all_images(splits.test), all_images(before.test))
    shutil.copytree(folder / "train" / "one", tmp_path / "more")
    for name in ("first", "second"):
        (folder / "train" / "one" / name).symlink_to(tmp_path / "more")
    assert len(load(folder).train) == (len(CLASSES) + 1) * TRAIN_IMAGES


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
    def scandir(path: str) -> object:
        if Path(path).name == "four":
            raise PermissionError(13, "Permission denied", path)
        return listed(path)

    listed = os.scandir
    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(DistillError, match=r"^data\.root: .*/four cannot be listed \(Permission"):
        load(folder)


@pytest.mark.parametrize("damage", ["cut", "no image", "gone"])
def test_an_image_that_became_unreadable_is_an_error_that_names_the_file(
    folder: Path, damage: str
) -> None:
    path = folder / "val" / "four" / "13.JPEG"
    content = path.read_bytes()
    split = load(folder).test
    path.unlink()
    if damage != "gone":
        path.write_bytes(content[:300] if damage == "cut" else b"what?")
    with pytest.raises(DistillError, match=r"^/\S*four/13\.JPEG: cannot be read as an image: "):
        list(EvaluationBatches(split, workers=1))


def test_corrupt_images_are_refused_left_out_or_read_when_needed(folder: Path) -> None:
    cut = folder / "val" / "four" / "13.JPEG"
    cut.write_bytes(cut.read_bytes()[:-20])
    for path in sorted((folder / "train" / "one").iterdir())[:3]:
        path.write_bytes(b"what?")
    (folder / "train" / "eight" / "link.png").symlink_to("/not/mounted.png")
    message = (
        r"^data: 5 of 49 images cannot be read:\n(/\S*: cannot be read as an image: .*\n){3}"
        r"\.\.\.\ndata\.corrupt=skip leaves them out$"
    )
    with pytest.raises(DistillError, match=message):
        load(folder)
    said: list[str] = []
    data = Data(dataset="imagefolder", root=str(folder), image_size=16, corrupt="skip")
    splits = load_splits(data, say=said.append)
    assert len(all_images(splits.train)) == len(CLASSES) * TRAIN_IMAGES - 3
    assert len(all_images(splits.test)) == len(CLASSES) * VAL_IMAGES - 1
    assert said[-1].startswith("data: 5 of 49 images cannot be read:\n")
    assert said[-1].endswith("\nThey are left out.")
    unchecked = load(folder, corrupt="unchecked").train
    assert len(unchecked) == len(CLASSES) * TRAIN_IMAGES + 1
    with pytest.raises(DistillError, match="cannot be read as an image: "):
        all_images(unchecked)


def read(path: Path) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return ImageFiles(path.parent, [path.name])[0]


def saved(image: Image.Image, path: Path, **options: object) -> Path:
    image.save(path, **options)
    return path


def grey(values: np.ndarray = RAMP) -> Tensor:
    return torch.from_numpy(values).expand(3, -1, -1)


SIXTEEN = Image.fromarray(RAMP.astype(np.uint16) * 257)
OTHER_ORDER = Image.frombytes("I;16B", (8, 4), (RAMP.astype(">u2") * 257).tobytes())


@pytest.mark.parametrize(
    ("image", "name"),
    [(SIXTEEN, "x.png"), (SIXTEEN, "x.tif"), (SIXTEEN, "x.pgm"), (OTHER_ORDER, "x.tif")],
)
def test_16_bits_are_scaled_to_8(tmp_path: Path, image: Image.Image, name: str) -> None:
    assert torch.equal(read(saved(image, tmp_path / name)), grey())


@pytest.mark.parametrize(("mode", "kind"), [("I", np.int32), ("F", np.float32)])
def test_values_of_an_unknown_range_are_refused_by_file_and_mode(
    tmp_path: Path, mode: str, kind: type
) -> None:
    path = saved(Image.fromarray(RAMP.astype(kind)), tmp_path / "depth.tif")
    with pytest.raises(DistillError, match=rf"/depth\.tif: .* its mode is {mode}, whose range"):
        read(path)


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "LAB"])
def test_grey_looks_the_same_in_every_mode(tmp_path: Path, mode: str) -> None:
    image = Image.fromarray(RAMP)
    image = image if mode in ("L", "LA", "P") else image.convert("RGB")
    name = "x.tif" if mode in ("RGBX", "CMYK", "YCbCr", "LAB") else "x.png"
    found = read(saved(image.convert(mode), tmp_path / name))
    assert found.shape == (3, 4, 8)
    # These two colour spaces round.
    assert (found.int() - grey().int()).abs().max() <= (3 if mode in ("LAB", "YCbCr") else 0)


def test_bits_transparent_pixels_and_first_pages_are_read_as_they_look(tmp_path: Path) -> None:
    bits = Image.fromarray(RAMP).point(lambda x: 255 * (x > 99)).convert("1")
    expected = grey(np.where(RAMP > 99, 255, 0).astype(np.uint8))
    assert torch.equal(read(saved(bits, tmp_path / "bits.png")), expected)
    palette = saved(Image.fromarray(RAMP).convert("P"), tmp_path / "p.png", transparency=bytes(256))
    assert torch.equal(read(palette), grey())
    alpha = Image.merge("LA", [Image.fromarray(RAMP), Image.new("L", (8, 4), 0)])
    assert torch.equal(read(saved(alpha, tmp_path / "alpha.png")), grey())
    pages = {"save_all": True, "append_images": [Image.fromarray(255 - RAMP)]}
    for name in ("pages.tif", "pages.png"):
        assert torch.equal(read(saved(Image.fromarray(RAMP), tmp_path / name, **pages)), grey())


@pytest.mark.parametrize("name", ["x.jpg", "x.png", "x.tif", "x.webp"])
def test_an_image_is_turned_as_its_exif_data_say(tmp_path: Path, name: str) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6  # the camera was held upright, turned to the left
    image = Image.fromarray(RAMP).convert("RGB")
    plain = read(saved(image, tmp_path / f"plain-{name}", quality=95))
    turned = read(saved(image, tmp_path / name, quality=95, exif=exif))
    assert torch.equal(turned, plain.rot90(-1, (1, 2)))


@pytest.mark.parametrize(
    ("name", "options"),
    [("x.jpg", {}), ("x.jpg", {"progressive": True}), ("x.png", {}), ("x.tif", {}), ("x.webp", {})],
)
def test_the_check_finds_every_cut_file_that_cannot_be_read(
    tmp_path: Path, name: str, options: dict[str, bool]
) -> None:
    random = np.random.default_rng(0).integers(0, 256, (64, 48, 3), dtype=np.uint8)
    whole = saved(Image.fromarray(random), tmp_path / name, **options).read_bytes()
    shares = (0, 1, 10, 50, 90, 99, 100)
    for share in shares:
        (tmp_path / f"{share}-{name}").write_bytes(whole[: len(whole) * share // 100])
    images = ImageFiles(tmp_path, [f"{share}-{name}" for share in shares])
    errors = {}
    for number in range(len(shares)):
        try:
            images.check(number)
        except DistillError as error:
            errors[number] = str(error)
    assert len(shares) - 2 <= len(errors) < len(shares)
    for number in range(len(shares)):
        if number in errors:
            with pytest.raises(DistillError, match=f"^{re.escape(errors[number])}$"):
                _ = images[number]
        else:
            assert images[number].shape == (3, 64, 48)
