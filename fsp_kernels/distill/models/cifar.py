"""Residual networks for small images: ``CifarResNet`` is narrow and deep, ``WideResNet`` is wide.

They know nothing of distillation: ``taps.py`` takes feature maps from outside, by module path.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

_DEEPEST = 1202  # of the ResNets of He et al.
_LARGEST = 1 << 15  # depth x width^2: of about 16,000 weights each, half a billion in all


class SubsampleShortcut(nn.Module):
    """The paper's parameter-free option A: every second position, new channels zero."""

    def __init__(self, stride: int, extra_channels: int) -> None:
        super().__init__()
        self.stride, self.extra_channels = stride, extra_channels

    def forward(self, x: Tensor) -> Tensor:
        """``(B, C, H, W)`` to ``(B, C + extra, ceil(H / stride), ceil(W / stride))``."""
        x = x[:, :, :: self.stride, :: self.stride]
        before = self.extra_channels // 2
        return F.pad(x, (0, 0, 0, 0, before, self.extra_channels - before))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut; each ReLU is a module of its own, so it can be tapped.

    ``(B, in_channels, H, W)`` becomes ``(B, channels, ceil(H / stride), ceil(W / stride))``.
    """

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1 or in_channels != channels:
            self.shortcut = SubsampleShortcut(stride, channels - in_channels)
        self.relu2 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu1(self.bn1(self.conv1(x)))
        return self.relu2(self.bn2(self.conv2(y)) + self.shortcut(x))


class PreActivationBlock(nn.Module):
    """Normalisation and ReLU before each of two 3x3 convolutions; the sum is not activated.

    ``(B, in_channels, H, W)`` becomes ``(B, channels, ceil(H / stride), ceil(W / stride))``.
    """

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.relu1 = nn.ReLU()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.relu2 = nn.ReLU()
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.shortcut: nn.Module | None = None
        if stride > 1 or in_channels != channels:
            self.shortcut = nn.Conv2d(in_channels, channels, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        activated = self.relu1(self.bn1(x))
        y = self.conv2(self.relu2(self.bn2(self.conv1(activated))))
        return y + (x if self.shortcut is None else self.shortcut(activated))


class CifarResNet(nn.Module):
    """He, Zhang, Ren, Sun, CVPR 2016, section 4.2: a stem, three stages of blocks, a linear layer.

    ``(B, in_channels, H, W)``, of any height and width, becomes logits ``(B, classes)``.

    Args:
        depth: ``6n + 2`` for n blocks a stage: 8, 14, 20, 26, 32, 56, ...
        width: multiplies the channels 16, 32, 64 of the stages.
        in_channels: of the images.
        classes: number of logits.

    Raises:
        ValueError: ``depth`` is not ``6n + 2`` with n at least 1, ``width`` is less than 1, or
            both make a network larger than any machine trains.
    """

    def __init__(self, depth: int, width: int = 1, in_channels: int = 3, classes: int = 10) -> None:
        super().__init__()
        blocks = _blocks_per_stage(depth, 2, width)
        self.conv = nn.Conv2d(in_channels, 16 * width, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(16 * width)
        self.relu = nn.ReLU()
        self.stage1, self.stage2, self.stage3 = _stages(BasicBlock, blocks, 16 * width, width)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(64 * width, classes)
        _initialise(self)

    def forward(self, images: Tensor) -> Tensor:
        x = self.relu(self.bn(self.conv(images)))
        x = self.stage3(self.stage2(self.stage1(x)))
        return self.fc(self.pool(x).flatten(1))


class WideResNet(nn.Module):
    """Zagoruyko and Komodakis, BMVC 2016: as ``CifarResNet``, of pre-activation blocks.

    Args:
        depth: ``6n + 4`` for n blocks a stage: 10, 16, 22, 28, 40, ...
        width: multiplies the channels 16, 32, 64 of the stages; the stem has 16.
        in_channels: of the images.
        classes: number of logits.

    Raises:
        ValueError: as ``CifarResNet``, with ``6n + 4``.
    """

    def __init__(
        self, depth: int = 16, width: int = 2, in_channels: int = 3, classes: int = 10
    ) -> None:
        super().__init__()
        blocks = _blocks_per_stage(depth, 4, width)
        self.conv = nn.Conv2d(in_channels, 16, 3, padding=1, bias=False)
        self.stage1, self.stage2, self.stage3 = _stages(PreActivationBlock, blocks, 16, width)
        self.bn = nn.BatchNorm2d(64 * width)
        self.relu = nn.ReLU()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(64 * width, classes)
        _initialise(self)

    def forward(self, images: Tensor) -> Tensor:
        x = self.stage3(self.stage2(self.stage1(self.conv(images))))
        return self.fc(self.pool(self.relu(self.bn(x))).flatten(1))


def _blocks_per_stage(depth: int, rest: int, width: int) -> int:
    """How many make the depth ``6n + rest``; a ``ValueError`` if none do or the size is absurd."""
    if not 6 < depth <= _DEEPEST or depth % 6 != rest:
        first = ", ".join(str(6 * n + rest) for n in (1, 2, 3))
        raise ValueError(
            f"depth is {depth}, must be 6n + {rest} ({first}, ...) and at most {_DEEPEST}"
        )
    widest = math.isqrt(_LARGEST // depth)
    if not 1 <= width <= widest:
        raise ValueError(f"width is {width}, must be 1 to {widest} at depth {depth}")
    return depth // 6


def _stages(
    block: Callable[[int, int, int], nn.Module], blocks: int, in_channels: int, width: int
) -> list[nn.Sequential]:
    stages = []
    for channels, stride in ((16 * width, 1), (32 * width, 2), (64 * width, 2)):
        first = block(in_channels, channels, stride)
        others = (block(channels, channels, 1) for _ in range(blocks - 1))
        stages.append(nn.Sequential(first, *others))
        in_channels = channels
    return stages


def _initialise(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
