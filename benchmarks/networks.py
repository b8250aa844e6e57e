"""The networks that distillation steps are measured on, in one literal table.

Every contender gets copies of the same two networks and the same images, so that only the loss
differs.
"""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from benchmarks import contenders
from benchmarks.checks import Prepared, Step, require_small
from benchmarks.contenders import Contender
from benchmarks.measure import NotRun
from benchmarks.training_step import Distillation, TappedNetwork, errors, split_facts
from benchmarks.workloads import Loss
from fsp_kernels.distill.models import CifarResNet


class Practice(NamedTuple):
    """How people train in a dtype: the dtype that autocast casts to, if any, and the layout."""

    autocast: torch.dtype | None
    layout: torch.memory_format


PRACTICE = {
    "fp32": Practice(None, torch.contiguous_format),
    "bf16": Practice(torch.bfloat16, torch.channels_last),
}
# Steps take long, so of the peers only what people write and its compilation are measured.
PEERS = ("einsum", "torch.compile")


@dataclass(frozen=True)
class Networks:
    """A teacher and a student; ``batch`` is the GPU's, see ``batch_on``.

    ``taps`` are the module paths of the FSP pairs, the same in both networks. ``needs`` names the
    package that the networks come from, if it is another one.
    """

    name: str
    batch: int
    cpu_batch: int
    image_size: int
    teacher: Callable[[], nn.Module]
    student: Callable[[], nn.Module]
    taps: tuple[tuple[str, str], ...]
    needs: str | None = None

    def batch_on(self, device: str) -> int:
        """The batch that is measured on a device."""
        return self.cpu_batch if device == "cpu" else self.batch

    @property
    def paths(self) -> list[str]:
        """All taps, in order."""
        return [path for pair in self.taps for path in pair]


def torchvision_resnet(depth: int) -> nn.Module:
    """An untrained ResNet; torchvision is imported only where one is made."""
    from torchvision.models import get_model

    return get_model(f"resnet{depth}", weights=None)


NETWORKS = (
    # The pairs of configs/network-minimisation-digits.yaml: the first and the last map of each
    # stage. In a ResNet-8, whose stages are one block each, the first is between two convolutions.
    Networks(
        "cifar-resnet26-8",
        batch=256,
        cpu_batch=32,
        image_size=32,
        teacher=partial(CifarResNet, 26),
        student=partial(CifarResNet, 8),
        taps=(
            ("stage1.0.relu1", "stage1"),
            ("stage2.0.relu1", "stage2"),
            ("stage3.0.relu1", "stage3"),
        ),
    ),
    # The pairs of torchdistill's configuration of FSP for these networks.
    Networks(
        "imagenet-resnet34-18",
        batch=64,
        cpu_batch=8,
        image_size=224,
        teacher=partial(torchvision_resnet, 34),
        student=partial(torchvision_resnet, 18),
        taps=(
            ("layer1:input", "layer1"),
            ("layer2.1:input", "layer2"),
            ("layer3.1:input", "layer3"),
            ("layer4.1:input", "layer4"),
        ),
        needs="torchvision",
    ),
)
BY_NAME = {networks.name: networks for networks in NETWORKS}
QUICK = ("cifar-resnet26-8",)


def settle(model: nn.Module, images: Tensor) -> None:
    """Give every BatchNorm the statistics of these images, as training would.

    A fresh network's are 0 and 1 and normalise nothing, so maps grow from block to block.
    """
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # the mean over all batches seen, of which there is one
    model.train()
    with torch.no_grad():
        model(images)


class StepProblem:
    """Networks and images that every contender gets copies of, made when the first one asks.

    ``dtype`` is a name in ``workloads.DTYPES``.
    """

    def __init__(self, networks: Networks, device: str, dtype: str):
        self.networks, self.device, self._dtype_name = networks, device, dtype

    def distillation(self, loss: Loss) -> Distillation:
        """Stage 1 with this loss."""
        teacher, student, images = self._made
        paths = self.networks.paths
        return Distillation(
            TappedNetwork(copy.deepcopy(teacher), paths),
            TappedNetwork(copy.deepcopy(student), paths),
            images,
            loss,
            PRACTICE[self._dtype_name].autocast,
        )

    def prepare(self, contender: Contender) -> Prepared:
        """Check a contender, time the pieces of its step, and take a whole step to warm up.

        Raises NotRun where these networks cannot be measured, AssertionError where the contender's
        loss is wrong.
        """
        reason = self._why_not_run()
        if reason is not None:
            raise NotRun(reason)
        distillation = self.distillation(contender.build())
        found = errors(distillation)
        dtype = PRACTICE[self._dtype_name].autocast or torch.float32
        require_small(contender, found, dtype, self.networks.name)
        split = split_facts(distillation, self.device)
        distillation.step()
        facts = {"batch": self.networks.batch_on(self.device)}
        return Prepared([distillation.step], facts | found | split)

    def _why_not_run(self) -> str | None:
        needs = self.networks.needs
        if self._dtype_name not in PRACTICE:
            return f"not run: networks are trained in {' and '.join(PRACTICE)}"
        if needs is not None and importlib.util.find_spec(needs) is None:
            return f"needs {needs}"
        return None

    @cached_property
    def _made(self) -> tuple[nn.Module, nn.Module, Tensor]:
        """``(teacher, student, images)``: random, and the same numbers on every device."""
        side, device = self.networks.image_size, self.device
        layout = PRACTICE[self._dtype_name].layout
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            teacher, student = self.networks.teacher(), self.networks.student()
            images = torch.randn(self.networks.batch_on(device), 3, side, side)
        images = images.to(device, memory_format=layout)
        for model in (teacher, student):
            model.to(device).to(memory_format=layout)
        settle(teacher, images)
        return teacher, student, images


def lone_step(networks_name: str, contender_name: str, dtype: str = "fp32") -> Step:
    """A contender's step on a CPU, unchecked, to measure its peak memory."""
    loss = contenders.BY_NAME[contender_name].build()
    return StepProblem(BY_NAME[networks_name], "cpu", dtype).distillation(loss).step
