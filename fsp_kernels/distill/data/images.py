"""Reading images from files and arrays, checking them before training, resizing and augmenting."""

from __future__ import annotations

import hashlib
import math
import operator
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import PartialState
from accelerate.utils import gather_object
from PIL import Image, ImageOps
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.v2.functional import pil_to_tensor

from fsp_kernels.distill.config import Data
from fsp_kernels.distill.seeds import mixed
from fsp_kernels.errors import DistillError, explain
from fsp_kernels.features.paths import describe

Say = Callable[[str], None]
Transform = Callable[[Tensor], Tensor]  # of pixels (C, H, W)

_FORMATS_OF_16_BITS = ("PNG", "PPM")  # Pillow may give them 32 bits
_LARGEST_SET = 16 << 30  # bytes of images in memory
_CHUNK = 1000  # images that are resized at once, as floats need four times the memory of bytes
_SHOWN = 3  # images named in one message
_KINDS = (
    "must be a PIL image, a tensor (C, H, W), or a NumPy array (H, W) or (H, W, C), of uint8 or of "
    "floats from 0 to 1, with no more channels than rows or columns"
)


class CorruptImageError(DistillError):
    """An image that cannot be read; ``data.corrupt`` says what is done with it."""


class ImageFiles:
    """Image files by number, each decoded to (3, H, W) uint8 of its own size."""

    threads = True  # Pillow decodes without Python's global lock

    def __init__(self, folder: Path, paths: Sequence[str]) -> None:
        """``paths`` are relative to ``folder``."""
        self._folder = folder
        # An array, because workers would copy a list of strings: Python writes a reference count
        # into each string that it reads.
        self._paths = np.array([os.fsencode(path) for path in paths])

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, number: int) -> Tensor:
        return pil_to_tensor(self._read(number))

    def check(self, number: int) -> None:
        """Read the whole file, but decode a JPEG at an eighth of its size, which is faster."""
        self._read(number, draft=True)

    def identity(self, number: int) -> bytes:
        """The path in the folder and the size of the file, which need no reading."""
        return b"%s %d\n" % (self._paths[number], self._path(number).stat().st_size)

    def _read(self, number: int, draft: bool = False) -> Image.Image:
        path = self._path(number)
        try:
            with Image.open(path) as image:
                if draft:
                    image.draft(None, (1, 1))
                return to_rgb(image)
        except Exception as error:  # Pillow's decoders raise errors of many types
            raise CorruptImageError(f"{path}: cannot be read as an image: {error}") from error

    def _path(self, number: int) -> Path:
        return self._folder / os.fsdecode(self._paths[number])


def to_rgb(image: Image.Image) -> Image.Image:
    """``image`` in 8 bits of red, green and blue, turned as its EXIF data say.

    Of several frames or pages it is the first. Transparent pixels keep their colour. Grey values
    of 16 bits are scaled down.

    Raises:
        ValueError: the range of its values is not known.
    """
    has_16_bits = image.mode == "I" and image.format in _FORMATS_OF_16_BITS
    image = ImageOps.exif_transpose(image)
    if has_16_bits or image.mode.startswith("I;16"):
        grey = (np.asarray(image) / 257).round().astype(np.uint8)
        return Image.fromarray(grey).convert("RGB")
    if image.mode in ("I", "F"):
        raise ValueError(
            f"its mode is {image.mode}, whose range is not known; save it with 8 or 16 bits"
        )
    if image.mode == "P":  # Pillow warns if a palette with transparency becomes RGB at once
        image = image.convert("RGBA")
    return image.convert("RGB")


class Fact(NamedTuple):
    """What is known of one of a user's images; ``shape`` is ``None`` if it has not been read."""

    label: int
    shape: tuple[int, ...] | None
    identity: bytes


class OwnImages:
    """One of a user's data sets; each error names the image."""

    threads = False  # the user's code may not work in several threads

    def __init__(self, dataset: Any, name: str, data: Data, key: str) -> None:
        self._dataset, self._name, self._data, self._key = dataset, name, data, key
        self._shape: tuple[int, ...] = ()
        self._identities: dict[int, bytes] = {}

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, number: int) -> Tensor:
        """(C, H, W) float32 from 0 to 1."""
        with self._naming(number):
            pixels = _to_pixels(_read(self._dataset, number)["image"])
            self._require_shape(tuple(pixels.shape))
        return pixels

    def check(self, number: int) -> Fact:
        """Read the image and its label; if images stay unchecked, the label alone."""
        dataset, data = self._dataset, self._data
        with self._naming(number):
            if data.corrupt == "unchecked":
                source = (data.dataset, data.arguments, self._name, number)
                if hasattr(dataset, "select_columns"):  # Hugging Face then decodes no image
                    dataset = dataset.select_columns("label")
                label = _to_label(_read(dataset, number, ["label"])["label"])
                return Fact(label, None, repr(source).encode())
            item = _read(dataset, number)
            pixels, label = _to_pixels(item["image"]), _to_label(item["label"])
            digest = hashlib.blake2b(pixels.numpy().tobytes(), digest_size=16).digest()
            return Fact(label, tuple(pixels.shape), digest)

    def expect(self, shape: tuple[int, ...], facts: Mapping[int, Fact]) -> None:
        """From now on, the shape of each image must begin with ``shape``; check those known."""
        self._shape = tuple(shape)
        self._identities = {number: fact.identity for number, fact in facts.items()}
        for number, fact in facts.items():
            with self._naming(number):
                self._require_shape(fact.shape or self._shape)

    def identity(self, number: int) -> bytes:
        """A digest of the pixels; if they are unchecked, where they come from."""
        return self._identities[number]

    @contextmanager
    def _naming(self, number: int) -> Iterator[None]:
        try:
            yield
        except DistillError as error:
            place = f"{self._key}: image {number} of {self._name}"
            raise type(error)(f"{place}: {error}") from error

    def _require_shape(self, shape: tuple[int, ...]) -> None:
        if shape[: len(self._shape)] != self._shape:
            raise DistillError(
                f"has the shape {shape}, must begin with {self._shape} as the first image's; with "
                "image_size, only the channels must be equal"
            )


def _read(dataset: Any, number: int, keys: Sequence[str] = ("image", "label")) -> Mapping[str, Any]:
    """An item of a user's data set by ``keys``."""
    try:
        item = dataset[number]
    except Exception as error:  # of the user's code
        raise CorruptImageError(explain(error)) from error
    if isinstance(item, (tuple, list)) and len(item) == 2:
        return {"image": item[0], "label": item[1]}
    if isinstance(item, Mapping) and all(key in item for key in keys):
        return item
    names = f" with the keys {', '.join(map(str, item))}" if isinstance(item, Mapping) else ""
    raise DistillError(
        f"the item is {describe(item)}{names}, must be (image, label), or a dict with the keys "
        "image and label"
    )


def _to_label(value: Any) -> int:
    try:
        label = -1 if isinstance(value, bool) else operator.index(value)
    except TypeError:
        label = -1
    if label < 0:
        raise DistillError(f"has the label {value!r}, must be a whole number, at least 0")
    return label


def _to_pixels(image: object) -> Tensor:
    """(C, H, W) float32 from 0 to 1."""
    if isinstance(image, Image.Image):
        try:
            return pil_to_tensor(to_rgb(image)) / 255
        except Exception as error:  # Pillow's decoders raise errors of many types
            raise CorruptImageError(f"cannot be read as an image: {error}") from error
    if isinstance(image, Tensor):
        pixels = image.detach().cpu()
    elif isinstance(image, np.ndarray) and image.dtype.kind in "uf":
        channels_last = image[..., None] if image.ndim == 2 else image
        # A copy, for PyTorch has no negative strides.
        pixels = torch.from_numpy(channels_last.copy()).movedim(-1, 0)
    else:
        kind = f"an array of {image.dtype}" if isinstance(image, np.ndarray) else describe(image)
        raise DistillError(f"is {kind}, {_KINDS}")
    if pixels.dim() != 3 or not 0 < pixels.shape[0] <= min(pixels.shape[1:]):
        raise DistillError(f"has the shape {tuple(image.shape)}, {_KINDS}")
    if pixels.dtype == torch.uint8:
        return pixels / 255
    low, high = (end.item() for end in pixels.double().aminmax())
    if not (pixels.is_floating_point() and low >= 0 and high <= 1):
        raise DistillError(f"has {pixels.dtype} from {low:.4g} to {high:.4g}, {_KINDS}")
    return pixels.float()


Source = ImageFiles | OwnImages


def check_images(
    sources: Sequence[Source], data: Data, where: str, say: Say
) -> list[dict[int, Any]]:
    """What ``check`` returns for the images of each source, by number; skipped ones are left out.

    The processes of a group divide the images, and all get the same result. All must call this.

    Raises:
        DistillError: an image cannot be used, or is corrupt and the recipe says ``refuse``.
    """
    count = sum(map(len, sources))
    say(f"{where}: reading {count} images once")
    facts = [_check_together(source) for source in sources]
    errors = [fact for part in facts for fact in part if isinstance(fact, DistillError)]
    unusable = [error for error in errors if not isinstance(error, CorruptImageError)]
    problem = "cannot be used" if unusable else "cannot be read"
    shown = unusable or errors
    dots = ["..."] if len(shown) > _SHOWN else []
    head = f"{where}: {len(shown)} of {count} images {problem}:"
    text = "\n".join([head, *map(str, shown[:_SHOWN]), *dots])
    kept = [{n: x for n, x in enumerate(part) if not isinstance(x, DistillError)} for part in facts]
    if unusable or not all(kept):
        raise DistillError(text)
    if errors and data.corrupt != "skip":
        raise DistillError(f"{text}\n{where}.corrupt=skip leaves them out")
    if errors:
        say(f"{text}\nThey are left out.")
    return kept


def _check_together(source: Source) -> list[Any]:
    state, count = PartialState(), len(source)
    first, end = (count * (state.process_index + i) // state.num_processes for i in (0, 1))
    check = partial(_check_or_error, source)
    if not source.threads:
        return gather_object([*map(check, range(first, end))])
    with ThreadPool() as pool:
        return gather_object(pool.map(check, range(first, end)))


def _check_or_error(source: Source, number: int) -> Any:
    try:
        return source.check(number)
    except DistillError as error:
        return error


def resize(pixels: Tensor, size: int | None, where: str) -> Tensor:
    """Square images (N, C, H, H) averaged down, or interpolated up, to ``size``; dtypes stay.

    Raises:
        DistillError: they would take too much memory; ``where`` names the section of the recipe.
    """
    if size is None or size == pixels.shape[-1]:
        return pixels
    each = pixels[..., 0, 0].nbytes  # of one pixel of all images
    if each * size**2 > _LARGEST_SET:
        raise DistillError(
            f"{where}.image_size: is {size}, must be at most {math.isqrt(_LARGEST_SET // each)}: "
            f"these {len(pixels)} images are kept in memory"
        )
    if not pixels.is_floating_point():
        chunks = (resize(chunk.float(), size, where) for chunk in pixels.split(_CHUNK))
        return torch.cat([chunk.round().to(pixels.dtype) for chunk in chunks])
    if size < pixels.shape[-1]:
        return F.adaptive_avg_pool2d(pixels, size)
    return F.interpolate(pixels, size=(size, size), mode="bilinear")


def random_shift(height: int, width: int, share: float) -> v2.RandomCrop:
    """A random crop of the image with a black border, ``share`` of the image's size wide."""
    return v2.RandomCrop((height, width), padding=max(1, round(min(height, width) * share)))


def with_flip(transform: v2.Transform) -> v2.Compose:
    """``transform``, and every second image is mirrored."""
    return v2.Compose([transform, v2.RandomHorizontalFlip()])


def imagenet_transforms(size: int) -> tuple[Transform, Transform]:
    """Random parts of at least 8 % of the area for training, the centre for evaluation."""
    centre = v2.Compose([v2.Resize(round(size * 256 / 224)), v2.CenterCrop(size)])
    return with_flip(v2.RandomResizedCrop(size)), centre


def augment(transform: Transform, pixels: Tensor, seed: int, index: int) -> Tensor:
    """``transform(pixels)`` with random numbers that depend on ``seed`` and ``index`` alone.

    PyTorch's generators are left as they were.
    """
    with torch.random.fork_rng(devices=[]):
        # torch.manual_seed would seed the GPU's generator as well.
        torch.default_generator.manual_seed(mixed(seed, index))
        return transform(pixels)
