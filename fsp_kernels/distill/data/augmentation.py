"""Random crops and flips. Beyond its edge an image is black: padded before it is standardised."""

from __future__ import annotations

import torch
from torch import Tensor
from torchvision.transforms import v2

from fsp_kernels.distill.data.collection import Transform
from fsp_kernels.distill.seeds import mixed

_MARGIN = 256 / 224  # ImageNet's custom: the centre of an image of 256


def shifted(size: int, padding: int) -> Transform:
    """A crop of ``size`` out of the image with ``padding`` black pixels on each side."""
    return v2.RandomCrop(size, padding=padding)


def shifted_and_flipped(size: int | tuple[int, int], padding: int) -> Transform:
    """``shifted``, every other image mirrored."""
    return v2.Compose([v2.RandomCrop(size, padding=padding), v2.RandomHorizontalFlip()])


def zoomed_and_flipped(size: int) -> Transform:
    """A part of the image, 8 % or more of its area, as ``size`` x ``size``; half are mirrored."""
    return v2.Compose([v2.RandomResizedCrop(size), v2.RandomHorizontalFlip()])


def centred(size: int) -> Transform:
    """What ``zoomed_and_flipped`` is for training, for evaluation: the centre of the image."""
    return v2.Compose([v2.Resize(round(size * _MARGIN)), v2.CenterCrop(size)])


def augmented(transform: Transform, pixels: Tensor, seed: int, index: int) -> Tensor:
    """``transform(pixels)`` by randomness of (``seed``, ``index``) alone; others' is untouched."""
    with torch.random.fork_rng(devices=[]):
        # Not torch.manual_seed, which would seed the GPU's generator as well.
        torch.default_generator.manual_seed(mixed(seed, index))
        return transform(pixels)
