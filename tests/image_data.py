"""The images of a split as tests compare them, and what the small image folders hold."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from fsp_kernels.distill.data import Split

CLASSES = ("eight", "four", "one")
TRAIN_IMAGES, VAL_IMAGES = 12, 4  # of each class

WriteCifar = Callable[..., Path]


def all_images(split: Split) -> Tensor:
    return split.__getitems__(range(len(split))).images


def pixels(split: Split) -> Tensor:
    """The images as they were before standardisation, float64."""
    mean, std = (torch.tensor(values)[:, None, None] for values in (split.mean, split.std))
    return all_images(split).double() * std + mean


def keys(images: Tensor) -> list[bytes]:
    """One value for each image, equal for equal images up to rounding."""
    return [image.round().int().numpy().tobytes() for image in images]
