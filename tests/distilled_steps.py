"""One step of distillation as the naive ops compute it, which no tool around it may change."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fsp_kernels.distill.models import CifarResNet

PAIRS = [(f"stage{i}.0.relu1", f"stage{i}") for i in (1, 2, 3)]
PATHS = [path for pair in PAIRS for path in pair]
WEIGHT = 1e-2  # of the FSP loss, beside the cross-entropy

# Single precision rounds at 6e-8. Gradients of half of a batch, or of one loss of the two, differ
# by more than 0.01.
BOUND = 1e-5
REASON = "fp32 sums of several layers"


class GroupNormResNet(CifarResNet):
    """A smooth network without batch statistics: equal gradients however a batch is divided.

    ReLU's gradient would jump where rounding decides on which side of 0 its input is.
    """

    def __init__(self, in_channels: int, classes: int, width: int = 1) -> None:
        super().__init__(8, width, in_channels, classes)
        for module in [*self.modules()]:
            for name, child in module.named_children():
                if isinstance(child, nn.BatchNorm2d):
                    setattr(module, name, nn.GroupNorm(4, child.num_features))
                elif isinstance(child, nn.ReLU):
                    setattr(module, name, nn.Softplus())


def networks() -> tuple[nn.Module, nn.Module]:
    """The same student and teacher in every process."""
    torch.manual_seed(0)
    return GroupNormResNet(3, 10), GroupNormResNet(3, 10)


def batch(size: int = 8) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    images = torch.rand(size, 3, 16, 16, generator=generator)
    return images, torch.randint(10, (size,), generator=generator)


def naive_matrix(x: Tensor, y: Tensor) -> Tensor:
    return torch.einsum("bmhw,bnhw->bmn", x, y) / (x.shape[2] * x.shape[3])


def naive_fsp_loss(
    student: Sequence[tuple[Tensor, Tensor]], teacher: Sequence[tuple[Tensor, Tensor]]
) -> Tensor:
    residuals = [naive_matrix(*s) - naive_matrix(*t) for s, t in zip(student, teacher, strict=True)]
    return torch.stack([x.square().sum() / len(x) for x in residuals]).sum()


def recorded(network: nn.Module, images: Tensor) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    """The output and the pairs of maps, by plain hooks."""
    maps: dict[str, Tensor] = {}
    hooks = [
        network.get_submodule(path).register_forward_hook(
            lambda _module, _inputs, output, path=path: maps.update({path: output})
        )
        for path in PATHS
    ]
    output = network(images)
    for hook in hooks:
        hook.remove()
    return output, [(maps[first], maps[second]) for first, second in PAIRS]


def naive_gradients(
    student: nn.Module, teacher: nn.Module, images: Tensor, labels: Tensor, task: bool = True
) -> dict[str, Tensor]:
    """Of the FSP loss by einsum in float64, with or without the task's loss, on the whole batch."""
    student, teacher = (copy.deepcopy(x).double() for x in (student, teacher))
    images = images.double()
    output, ours = recorded(student, images)
    with torch.no_grad():
        _, theirs = recorded(teacher, images)
    loss = naive_fsp_loss(ours, theirs)
    if task:
        loss = F.cross_entropy(output, labels) + WEIGHT * loss
    loss.backward()
    return {name: x.grad for name, x in student.named_parameters() if x.grad is not None}
