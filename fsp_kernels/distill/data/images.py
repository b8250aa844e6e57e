"""Where a split's pixels are: in memory, or in files that are decoded when they are asked for."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from copy import copy
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor
from torchvision.transforms.v2.functional import pil_to_tensor

from fsp_kernels.distill.errors import DistillError

# Of these, Pillow's 32 bits are the file's 16.
_FORMATS_OF_16_BITS = ("PNG", "PPM")
_LARGEST_SET = 16 << 30  # bytes of images in memory
_CHUNK = 1000  # images turned to floats at once: a whole data set of floats is four times its bytes


class CorruptImageError(DistillError):
    """One image of many cannot be read."""


class ImageFiles:
    """Image files by number, each decoded to (3, H, W) uint8 of its own size."""

    def __init__(self, folder: Path, paths: Sequence[str]) -> None:
        """``paths`` are relative to ``folder``."""
        self._folder = folder
        # One array: of a list of strings, each loading process would come to have its own copy,
        # for Python writes a reference count into every string it looks at.
        self._paths = np.array([os.fsencode(path) for path in paths])

    def __getitem__(self, number: int) -> Tensor:
        return pil_to_tensor(self._read(number))

    def __len__(self) -> int:
        return len(self._paths)

    def take(self, numbers: np.ndarray) -> ImageFiles:
        """The images at ``numbers``, in that order."""
        taken = copy(self)
        taken._paths = self._paths[numbers]
        return taken

    def survey(self, numbers: Sequence[int]) -> list[DistillError | None]:
        """Read the images at ``numbers``; the error of each that cannot be."""
        with ThreadPool() as pool:  # Pillow decodes without Python's lock
            return pool.map(self._fault, numbers)

    def identity(self, number: int) -> bytes:
        """What tells this file from others without reading it: its place in the folder and size."""
        return b"%s %d\n" % (self._paths[number], self._path(number).stat().st_size)

    def _fault(self, number: int) -> DistillError | None:
        try:
            self._read(number, smallest=True)
        except DistillError as error:
            return error
        return None

    def _read(self, number: int, smallest: bool = False) -> Image.Image:
        """``smallest``: at an eighth of its size where its format has that, all of it read."""
        path = self._path(number)
        try:
            with Image.open(path) as image:
                if smallest:
                    image.draft(None, (1, 1))
                return rgb(image)
        except Exception as error:  # Pillow's decoders raise whatever they trip over
            raise CorruptImageError(f"{path}: cannot be read as an image: {error}") from error

    def _path(self, number: int) -> Path:
        return self._folder / os.fsdecode(self._paths[number])


def rgb(image: Image.Image) -> Image.Image:
    """``image`` in 8 bits of red, green and blue, the way up that its EXIF data say.

    Of several frames or pages it is the first. What is transparent keeps its colour. 16 bits of
    grey are scaled down.

    Raises:
        ValueError: its numbers have no known range.
    """
    of_16_bits = image.mode == "I" and image.format in _FORMATS_OF_16_BITS
    image = ImageOps.exif_transpose(image)
    if of_16_bits or image.mode.startswith("I;16"):
        grey = (np.asarray(image) / 257).round().astype(np.uint8)
        return Image.fromarray(grey).convert("RGB")
    if image.mode in ("I", "F"):
        raise ValueError(
            f"its mode is {image.mode}, whose range is not known; save it with 8 or 16 bits"
        )
    if image.mode == "P":  # for Pillow warns of a palette with transparency
        image = image.convert("RGBA")
    return image.convert("RGB")


class Stored(Protocol):
    """Images that are read when they are asked for."""

    def __getitem__(self, number: int) -> Tensor:
        """(C, H, W), uint8 or float32 from 0 to 1."""

    def identity(self, number: int) -> bytes:
        """What tells this image from others."""


Images = Tensor | Stored  # (N, C, H, W) pixels as published, or the like


def resized(pixels: Tensor, size: int | None, where: str) -> Tensor:
    """Square images (N, C, H, H) averaged down, or interpolated up, to ``size``; whole if bytes.

    Raises:
        DistillError: they would take too much memory; ``where`` names the section of the recipe.
    """
    if size is None or size == pixels.shape[-1]:
        return pixels
    each = pixels.shape[0] * pixels.shape[1] * pixels.itemsize  # bytes of a pixel of all images
    if each * size**2 > _LARGEST_SET:
        raise DistillError(
            f"{where}.image_size: is {size}, must be at most {math.isqrt(_LARGEST_SET // each)}: "
            f"these {len(pixels)} images are kept in memory"
        )
    if pixels.is_floating_point():
        return _resized(pixels, size)
    chunks = pixels.split(_CHUNK)
    return torch.cat([_resized(part.float(), size).round().to(part.dtype) for part in chunks])


def _resized(pixels: Tensor, size: int) -> Tensor:
    if size < pixels.shape[-1]:
        return F.adaptive_avg_pool2d(pixels, size)
    return F.interpolate(pixels, size=(size, size), mode="bilinear")
