"""The data sets that are kept in a folder: CIFAR, and any folder of images laid out as ImageNet."""

from __future__ import annotations

import os
import tarfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from torchvision.datasets import CIFAR10, CIFAR100
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.datasets.utils import check_integrity

from fsp_kernels.distill.config import Data
from fsp_kernels.distill.data.augmentation import (
    centred,
    shifted_and_flipped,
    zoomed_and_flipped,
)
from fsp_kernels.distill.data.collection import IMAGENET_MOMENTS, Collection, Labelled
from fsp_kernels.distill.data.draws import shuffled
from fsp_kernels.distill.data.images import ImageFiles, resized
from fsp_kernels.distill.data.survey import Say, survey
from fsp_kernels.distill.errors import DistillError

_CIFAR = {"cifar10": CIFAR10, "cifar100": CIFAR100}

# Mean and deviation of red, green and blue, as published, of pixels in 0..1.
_MOMENTS = {
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
}
_CIFAR_PADDING = 4 / 32  # of the random crop, in image sizes
_IMAGENET_SIZE = 224


def cifar(data: Data, where: str, _say: Say) -> Collection:
    """CIFAR-10 or CIFAR-100 from the files that torchvision keeps or fetches.

    Raises:
        DistillError: they are not there, damaged, or cannot be fetched.
    """
    kind, root = _CIFAR[data.dataset], _root(data)
    if not data.download:
        _require_folder(root, where)
    try:
        with PartialState().local_main_process_first():  # what is downloaded, is so once
            parts = [kind(root, train=train, download=data.download) for train in (True, False)]
    except (OSError, RuntimeError, EOFError, tarfile.TarError) as error:
        raise DistillError(_why_no_cifar(data, where, error)) from error
    pool, test = (
        Labelled(
            resized(torch.from_numpy(part.data.transpose(0, 3, 1, 2)), data.image_size, where),
            np.array(part.targets, dtype=np.int64),
        )
        for part in parts
    )
    size = data.image_size or 32
    return Collection(
        pool=pool,
        test=test,
        image_shape=(3, size, size),
        classes=len(parts[0].classes),
        validation_images=0,
        pixel_range=(0.0, 1.0),
        moments=_MOMENTS[data.dataset],
        augmentation=shifted_and_flipped(size, max(1, round(size * _CIFAR_PADDING))),
    )


def image_folder(data: Data, where: str, say: Say) -> Collection:
    """``root/train/CLASS/*`` to train on and ``root/val/CLASS/*`` to test with, of any image size.

    Classes are numbered in the order of their names.

    Raises:
        DistillError: the folders are not so, a class has no image, or one is corrupt.
    """
    root = _root(data)
    _require_folder(root, where)
    classes = _classes(root, where)
    folders = [root / part for part in ("train", "val")]
    files, labels = zip(*(_files(folder, classes, where) for folder in folders), strict=True)
    if data.corrupt != "unchecked":
        kept = [np.array([*found]) for found in survey(files, data, where, say)]
        files = [images.take(numbers) for images, numbers in zip(files, kept, strict=True)]
        labels = [of_part[numbers] for of_part, numbers in zip(labels, kept, strict=True)]
        for folder, of_part in zip(folders, labels, strict=True):
            _require_all(classes, of_part, folder, where)
    pool, test = map(Labelled, files, labels)
    size = data.image_size or _IMAGENET_SIZE
    return Collection(
        pool=pool,
        test=test,
        image_shape=(3, size, size),
        classes=len(classes),
        validation_images=0,
        pixel_range=(0.0, 1.0),
        moments=IMAGENET_MOMENTS,
        augmentation=zoomed_and_flipped(size),
        evaluation=centred(size),
    )


def _root(data: Data) -> Path:
    assert data.root is not None  # the recipe has been checked
    return Path(data.root).expanduser()


def _require_folder(folder: Path, where: str) -> None:
    if not folder.is_dir():
        raise DistillError(f"{where}.root: {folder} is not there, or is no folder")


def _why_no_cifar(data: Data, where: str, error: Exception) -> str:
    if data.download:
        return f"{where}.download: {data.dataset} could not be fetched: {error}"
    kind = _CIFAR[data.dataset]
    folder = _root(data) / kind.base_folder
    if not folder.is_dir():
        return f"{where}.root: {folder} is not there; {where}.download=true fetches it"
    files = [*kind.train_list, *kind.test_list, (kind.meta["filename"], kind.meta["md5"])]
    damaged = [name for name, md5 in files if not check_integrity(str(folder / name), md5)]
    return (
        f"{where}.root: in {folder} {', '.join(damaged) or error} missing or not as published; "
        f"remove the folder and set {where}.download=true to fetch it again"
    )


def _classes(root: Path, where: str) -> dict[str, int]:
    """The label of each class, which must be a folder of both ``train`` and ``val``."""
    names = {}
    for part in ("train", "val"):
        if not (root / part).is_dir():
            raise DistillError(
                f"{where}.root: {root} has no folder {part}; it must hold train/CLASS/* and "
                "val/CLASS/*"
            )
        names[part] = {entry.name for entry in _entries(root / part, where) if _is_folder(entry)}
    for part, other in (("train", "val"), ("val", "train")):
        if only := sorted(names[part] - names[other]):
            shown = ", ".join(only[:5]) + (", ..." if len(only) > 5 else "")
            raise DistillError(
                f"{where}.root: train and val of {root} must have the same classes; "
                f"only {part} has {shown}"
            )
    if len(names["train"]) < 2:
        raise DistillError(
            f"{where}.root: {root / 'train'} must have 2 classes or more, has {len(names['train'])}"
        )
    return {name: label for label, name in enumerate(sorted(names["train"]))}


def _files(folder: Path, classes: dict[str, int], where: str) -> tuple[ImageFiles, np.ndarray]:
    """The image files and their labels, mixed: as listed, the first thousand are of one class."""
    homes = [folder.resolve(), *((folder / name).resolve() for name in classes)]
    # So that no link of a class leads back up, or to another class.
    walked = {str(path) for home in homes for path in (home, *home.parents)}
    paths: list[str] = []
    labels: list[int] = []
    for name, label in classes.items():
        # By folder, then by name: the draws are of this order.
        found = sorted(_images(folder / name, walked, where), key=os.path.split)
        paths += [os.path.relpath(path, folder) for path in found]
        labels += [label] * len(found)
    _require_all(classes, labels, folder, where)
    order = shuffled(len(paths))
    images = ImageFiles(folder, [paths[number] for number in order])
    return images, np.array(labels, dtype=np.int64)[order]


def _require_all(classes: dict[str, int], labels: Iterable[int], folder: Path, where: str) -> None:
    there = set(labels)
    for name, label in classes.items():
        if label not in there:
            raise DistillError(
                f"{where}.root: {folder / name} holds no image ({', '.join(IMG_EXTENSIONS)})"
            )


def _images(folder: str | Path, walked: set[str], where: str) -> Iterator[str]:
    """The image files below ``folder``, each real directory's once: ``walked`` are left out."""
    for entry in _entries(folder, where):
        if not _is_folder(entry):
            if _is_image(entry):
                yield entry.path
        elif (real := os.path.realpath(entry.path)) not in walked:
            walked.add(real)
            yield from _images(entry.path, walked, where)


def _entries(folder: str | Path, where: str) -> list[os.DirEntry[str]]:
    """What ``folder`` holds, by name, without hidden entries such as the ``._NAME`` of macOS.

    A link to nowhere is an error, as it may stand for a whole folder that is not mounted. One with
    the name of an image is left to whoever reads it.
    """
    try:
        with os.scandir(folder) as found:
            entries = sorted((e for e in found if e.name[0] != "."), key=lambda e: e.name)
    except OSError as error:
        raise DistillError(f"{where}.root: {folder} cannot be listed: {error.strerror}") from error
    for entry in entries:
        if entry.is_symlink() and not os.path.exists(entry.path) and not _is_image(entry):
            raise DistillError(
                f"{where}.root: {entry.path} is a link to {os.readlink(entry.path)}, which is not "
                "there"
            )
    return entries


def _is_folder(entry: os.DirEntry[str]) -> bool:
    # Only of a link, as it may take a look at the disk; and ``entry.is_dir`` fails at a link to
    # itself.
    return os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir()


def _is_image(entry: os.DirEntry[str]) -> bool:
    return entry.name.lower().endswith(IMG_EXTENSIONS)
