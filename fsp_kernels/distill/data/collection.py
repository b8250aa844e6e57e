"""A data set as its module hands it over, before it is divided among the networks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from torch import Tensor

from fsp_kernels.distill.data.images import Images

# Mean and deviation of ImageNet's red, green and blue, as published, of pixels in 0..1.
IMAGENET_MOMENTS = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

Transform = Callable[[Tensor], Tensor]  # of pixels (C, H, W) as published


class Scale(NamedTuple):
    """How pixels are standardised: ``(pixel - mean) / std`` for each channel.

    ``mean`` and ``std``, of each channel or one for all, are of pixels between the two ends of
    ``pixel_range``.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    pixel_range: tuple[float, float]


class Labelled(NamedTuple):
    """``images`` and their ``labels`` (N,) int64."""

    images: Images
    labels: np.ndarray


@dataclass(frozen=True, kw_only=True)
class Collection:
    """A data set.

    Attributes:
        pool: what may be trained on or validated with, in an order that mixes the classes.
        test: what nothing is trained on.
        image_shape: (channels, height, width) that the networks get.
        classes: labels are ``0..classes - 1``.
        validation_images: as many of the pool are held out, unless the recipe says otherwise.
        pixel_range: least and largest pixel.
        moments: mean and deviation of the channels; ``None`` to measure the student's images.
        augmentation: random, from an image as published to one of ``image_shape``.
        evaluation: the same without chance; ``None`` where images are of that shape.
        validation: images of the set's own to validate with, in place of some of the pool's.
    """

    pool: Labelled
    test: Labelled
    image_shape: tuple[int, int, int]
    classes: int
    validation_images: int
    pixel_range: tuple[float, float]
    moments: tuple[tuple[float, ...], tuple[float, ...]] | None
    augmentation: Transform
    evaluation: Transform | None = None
    validation: Labelled | None = None
