"""A data set of one's own: what a callable returns that the recipe names.

``data.dataset=package.module:callable`` is imported, also from the current directory, and called
with ``data.arguments``. It returns ``(train, validation, test)``, each with a length and indexed by
numbers from 0, as a ``torch.utils.data.Dataset`` or a Hugging Face ``datasets.Dataset``; for
``validation`` also ``None``, and ``data.validation_images`` are drawn from ``train``.

An item is ``(image, label)``, or a dict with the keys ``image`` and ``label``. An image is

* a PIL image of any mode but ``I`` and ``F``: three channels, read as those of an ``imagefolder``;
* a tensor (C, H, W);
* a NumPy array (H, W) or (H, W, C);

the latter two of uint8 from 0 to 255, or of floats from 0 to 1. All have the same number of
channels, and no more channels than rows or columns. A label is a whole number from 0; there are as
many classes as ``train.features["label"]`` has names, or else as the largest label says.

Without ``data.image_size`` all images have one size, and are shifted and mirrored in training. With
it they are scaled, cropped and mirrored as those of an ``imagefolder``. Three channels are
standardised by ImageNet's moments, others by the mean of these.
"""

from __future__ import annotations

import hashlib
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate import PartialState
from PIL import Image
from torch import Tensor
from torch.utils.data import IterableDataset
from torchvision.transforms.v2.functional import pil_to_tensor

from fsp_kernels.distill.config import Data
from fsp_kernels.distill.data.augmentation import (
    centred,
    shifted_and_flipped,
    zoomed_and_flipped,
)
from fsp_kernels.distill.data.collection import IMAGENET_MOMENTS, Collection, Labelled
from fsp_kernels.distill.data.draws import shuffled
from fsp_kernels.distill.data.images import CorruptImageError, rgb
from fsp_kernels.distill.data.survey import Say, survey
from fsp_kernels.distill.errors import DistillError, explain
from fsp_kernels.distill.imports import find_callable

_KEYS = ("image", "label")
_PADDING = 1 / 8  # of the random crop, in image sizes
_GREY_MOMENTS = ((0.449,), (0.226,))  # the mean of ImageNet's


class _Item(NamedTuple):
    """``shape`` of the image, unless it was not looked at; ``identity`` tells it from others."""

    label: int
    shape: tuple[int, ...] | None
    identity: bytes


def own(data: Data, where: str, say: Say) -> Collection:
    """The data set that the recipe's callable returns.

    Raises:
        DistillError: it can't be imported, fails, or returns anything but what is described above.
    """
    key = f"{where}.dataset"
    with PartialState().local_main_process_first():  # what is downloaded, is so once
        datasets = _called(data, key)
    named = _named_classes(datasets["train"])
    parts = [_Part(dataset, name, named, data, key) for name, dataset in datasets.items()]
    found = survey(parts, data, where, say)
    like = _shape(parts[0], found[0])
    channels, height, width = like
    if data.image_size is not None:
        height = width = data.image_size
        like = like[:1]
    labelled = {
        part.name: _labelled(part, items, like) for part, items in zip(parts, found, strict=True)
    }
    classes = named or 1 + max(int(images.labels.max()) for images in labelled.values())
    if classes < 2:
        raise DistillError(f"{key}: {data.dataset} must have 2 classes or more, has {classes}")
    padding = max(1, round(min(height, width) * _PADDING))
    resizes = data.image_size is not None
    return Collection(
        pool=labelled["train"],
        validation=labelled.get("validation"),
        test=labelled["test"],
        image_shape=(channels, height, width),
        classes=classes,
        validation_images=0,
        pixel_range=(0.0, 1.0),
        moments=IMAGENET_MOMENTS if channels == 3 else _GREY_MOMENTS,
        augmentation=(
            zoomed_and_flipped(height) if resizes else shifted_and_flipped((height, width), padding)
        ),
        evaluation=centred(height) if resizes else None,
    )


class OwnImages:
    """Some images of one of the three data sets, in an order that mixes the classes."""

    def __init__(
        self, part: _Part, numbers: np.ndarray, identities: list[bytes], like: tuple[int, ...]
    ) -> None:
        """The images at ``numbers``, whose shapes begin as ``like``."""
        self._part, self._numbers, self._like = part, numbers, like
        self._identities = identities

    def __getitem__(self, number: int) -> Tensor:
        """(C, H, W) float32 from 0 to 1."""
        number = int(self._numbers[number])
        pixels = self._part.pixels(number)
        self._part.require_like(number, tuple(pixels.shape), self._like)
        return pixels

    def identity(self, number: int) -> bytes:
        """A digest of its pixels; where they are unchecked, the data set and its number there."""
        return self._identities[number]


class _Part:
    """One of the three data sets as it was returned; each error names the image."""

    def __init__(self, dataset: Any, name: str, named: int | None, data: Data, key: str) -> None:
        self.name, self._dataset, self._data, self._key = name, dataset, data, key
        self._named = named

    def __len__(self) -> int:
        return len(self._dataset)

    def survey(self, numbers: Sequence[int]) -> list[_Item | DistillError]:
        """One after the other, for the user's code need not bear several threads."""
        look = self._look if self._data.corrupt != "unchecked" else self._look_at_label
        return [_or_error(look, number) for number in numbers]

    def pixels(self, number: int) -> Tensor:
        """(C, H, W) float32 from 0 to 1."""
        return self._pixels(self._item(self._dataset, number), number)

    def require_like(self, number: int, shape: tuple[int, ...], like: tuple[int, ...]) -> None:
        """``shape`` begins as ``like``."""
        if shape[: len(like)] != like:
            needs = f"{like[0]} channels" if len(like) == 1 else f"{_times(like)} as the first"
            raise DistillError(
                f"{self._place(number)} is {_times(shape)} (channels, height, width), must be of "
                f"{needs}; sizes may differ where image_size is given"
            )

    def _look(self, number: int) -> _Item:
        item = self._item(self._dataset, number)
        pixels = self._pixels(item, number)
        digest = hashlib.blake2b(pixels.numpy().tobytes(), digest_size=16).digest()
        return _Item(self._label(item, number), tuple(pixels.shape), digest)

    def _look_at_label(self, number: int) -> _Item:
        dataset = self._dataset
        if hasattr(dataset, "select_columns"):  # Hugging Face's, which decodes no image then
            dataset = dataset.select_columns(_KEYS[1])
        label = self._label(self._item(dataset, number), number)
        source = (self._data.dataset, self._data.arguments, self.name, number)
        return _Item(label, None, repr(source).encode())

    def _place(self, number: int) -> str:
        return f"{self._key}: image {number} of {self.name}"

    def _item(self, dataset: Any, number: int) -> Any:
        try:
            return dataset[number]
        except Exception as error:  # of the user's code
            raise CorruptImageError(f"{self._place(number)}: {explain(error)}") from error

    def _field(self, item: Any, name: str, number: int) -> Any:
        if isinstance(item, Mapping) and name in item:
            return item[name]
        if isinstance(item, (tuple, list)) and len(item) == 2:
            return item[_KEYS.index(name)]
        keys = f" with the keys {', '.join(map(str, item))}" if isinstance(item, Mapping) else ""
        raise DistillError(
            f"{self._place(number)}: the item is {_type(item)}{keys}, must be (image, label), or a "
            "dict with the keys image and label"
        )

    def _label(self, item: Any, number: int) -> int:
        value = self._field(item, "label", number)
        limit = "" if self._named is None else f" and less than {self._named}"
        try:
            label = -1 if isinstance(value, bool) else operator.index(value)
        except TypeError:
            label = -1
        if label < 0 or (self._named is not None and label >= self._named):
            raise DistillError(
                f"{self._place(number)} has the label {value!r}, must be a whole number, at least "
                f"0{limit}"
            )
        return label

    def _pixels(self, item: Any, number: int) -> Tensor:
        image = self._field(item, "image", number)
        if isinstance(image, Image.Image):
            try:
                pixels = pil_to_tensor(rgb(image))
            except Exception as error:  # Pillow's decoders raise whatever they trip over
                raise CorruptImageError(
                    f"{self._place(number)}: cannot be read as an image: {error}"
                ) from error
        elif isinstance(image, Tensor):
            pixels = image.detach().cpu()
        elif isinstance(image, np.ndarray) and image.dtype.kind in "uf":
            pixels = torch.from_numpy(np.array(image if image.ndim != 2 else image[..., None]))
            pixels = pixels.permute(2, 0, 1) if pixels.dim() == 3 else pixels
        else:
            kind = f"an array of {image.dtype}" if isinstance(image, np.ndarray) else _type(image)
            raise DistillError(
                f"{self._place(number)} is {kind}, must be a PIL image, a tensor, or a NumPy array "
                "of uint8 or floats"
            )
        shape = tuple(pixels.shape)
        if len(shape) != 3 or not 0 < shape[0] <= min(shape[1:]):
            layout = "(C, H, W)" if isinstance(image, Tensor) else "(H, W) or (H, W, C)"
            raise DistillError(
                f"{self._place(number)} has the shape {_times(image.shape)}, must be {layout}, of "
                "no more channels than rows or columns"
            )
        if pixels.dtype == torch.uint8:
            return pixels / 255
        low, high = (end.item() for end in pixels.double().aminmax())
        if not (pixels.is_floating_point() and low >= 0 and high <= 1):
            raise DistillError(
                f"{self._place(number)} has {pixels.dtype} from {low:.4g} to {high:.4g}, must be "
                "uint8, or floats from 0 to 1"
            )
        return pixels.float()


def _called(data: Data, key: str) -> dict[str, Any]:
    """The data sets by name: train and test, and validation if there is one."""
    function = find_callable(data.dataset, key)
    try:
        returned = function(**data.arguments)
    except Exception as error:  # of the user's code
        raise DistillError(f"{key}: {data.dataset}: {explain(error)}") from error
    names = ("train", "validation", "test")
    if not isinstance(returned, (tuple, list)) or len(returned) != len(names):
        what = _type(returned)
        what += f" of {len(returned)}" if isinstance(returned, (tuple, list)) else ""
        raise DistillError(
            f"{key}: {data.dataset} returned {what}, must return ({', '.join(names)})"
        )
    datasets = dict(zip(names, returned, strict=True))
    if datasets["validation"] is None:
        del datasets["validation"]
    for name, dataset in datasets.items():
        indexed = hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")
        if not indexed or isinstance(dataset, IterableDataset):
            raise DistillError(
                f"{key}: {name} is {_type(dataset)}, must have a length and be indexed by number"
            )
        if not len(dataset):
            raise DistillError(f"{key}: {name} is empty")
    return datasets


def _named_classes(dataset: Any) -> int | None:
    """The number of classes that a Hugging Face data set has names for."""
    features = getattr(dataset, "features", None)
    label = features.get("label") if isinstance(features, Mapping) else None
    return len(getattr(label, "names", None) or ()) or None


def _shape(part: _Part, items: dict[int, _Item]) -> tuple[int, ...]:
    """Of the first image."""
    number, item = next(iter(items.items()))
    return item.shape or tuple(part.pixels(number).shape)


def _labelled(part: _Part, items: dict[int, _Item], like: tuple[int, ...]) -> Labelled:
    for number, item in items.items():
        part.require_like(number, item.shape or like, like)
    numbers = np.array([*items])[shuffled(len(items))]
    mixed = [items[number] for number in numbers]
    images = OwnImages(part, numbers, [item.identity for item in mixed], like)
    return Labelled(images, np.array([item.label for item in mixed], dtype=np.int64))


def _or_error(look: Callable[[int], _Item], number: int) -> _Item | DistillError:
    try:
        return look(number)
    except DistillError as error:
        return error


def _type(value: object) -> str:
    return f"of type {type(value).__name__}"


def _times(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape)) or "()"
