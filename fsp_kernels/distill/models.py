"""CIFAR-style residual networks (He, Zhang, Ren, Sun, CVPR 2016, section 4.2).

They know nothing of distillation: ``taps.py`` takes feature maps from outside, by module path.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


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
    """Two 3x3 convolutions and a shortcut; each ReLU is a module of its own, to be tapped."""

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
        """``(B, in_channels, H, W)`` to ``(B, channels, ceil(H / stride), ceil(W / stride))``."""
        y = self.relu1(self.bn1(self.conv1(x)))
        return self.relu2(self.bn2(self.conv2(y)) + self.shortcut(x))


class CifarResNet(nn.Module):
    """A 3x3 stem, three stages of ``(depth - 2) / 6`` blocks, average pooling, a linear layer.

    Args:
        depth: ``6n + 2`` for n blocks a stage: 8, 14, 20, 26, 32, 56, ...
        width: multiplies the channels 16, 32, 64 of the stages.
        in_channels: of the images; any height and width from 1 up will do.
        classes: number of logits.

    Raises:
        ValueError: ``depth`` is not ``6n + 2`` with n at least 1, or ``width`` is less than 1.
    """

    def __init__(self, depth: int, width: int = 1, in_channels: int = 3, classes: int = 10) -> None:
        super().__init__()
        if depth < 8 or depth % 6 != 2:
            raise ValueError(f"depth is {depth}, must be 6n + 2 (8, 14, 20, ...)")
        if width < 1:
            raise ValueError(f"width is {width}, must be at least 1")
        blocks = (depth - 2) // 6
        self.conv = nn.Conv2d(in_channels, 16 * width, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(16 * width)
        self.relu = nn.ReLU()
        self.stage1 = _stage(blocks, 16 * width, 16 * width, stride=1)
        self.stage2 = _stage(blocks, 16 * width, 32 * width, stride=2)
        self.stage3 = _stage(blocks, 32 * width, 64 * width, stride=2)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(64 * width, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> Tensor:
        """``(B, in_channels, H, W)`` to logits ``(B, classes)``."""
        x = self.relu(self.bn(self.conv(images)))
        x = self.stage3(self.stage2(self.stage1(x)))
        return self.fc(self.pool(x).flatten(1))


def parameter_count(model: nn.Module) -> int:
    """Number of trainable scalars."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def _stage(blocks: int, in_channels: int, channels: int, stride: int) -> nn.Sequential:
    first = BasicBlock(in_channels, channels, stride)
    return nn.Sequential(first, *(BasicBlock(channels, channels, 1) for _ in range(blocks - 1)))
