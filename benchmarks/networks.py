"""The networks that distillation steps are measured on, one literal table, and who races there.

What an FSP loss costs a user is its share of a whole step. Every contender gets copies of the same
two networks and the same images, so that only the loss differs.
"""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from benchmarks import contenders
from benchmarks.contenders import Contender
from benchmarks.measure import hold
from benchmarks.peers import Loss
from benchmarks.race import Entrant, NotRun, Prepared, Step
from benchmarks.training_step import Distillation, Tapped, errors, split_facts
from fsp_kernels.distill.models import CifarResNet


class Practice(NamedTuple):
    """How people train in a dtype: what autocast casts to, if anything, and the memory format."""

    autocast: torch.dtype | None
    layout: torch.memory_format


PRACTICE = {
    "fp32": Practice(None, torch.contiguous_format),
    "bf16": Practice(torch.bfloat16, torch.channels_last),
}
# Who says the most for their time: ours, what people write, and what a compiler makes of that.
PEERS = ("einsum", "torch.compile")


@dataclass(frozen=True)
class Networks:
    """A teacher and a student; ``batch`` is the GPU's, see ``batch_on``.

    ``taps`` are the module paths of the FSP pairs, the same in both networks; ``needs`` names the
    package that the networks come from, where it is one of its own.
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
    """Untrained; torchvision is imported only where its networks are made."""
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
    # The pairs that torchdistill's configuration of FSP for these networks has.
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
    """Give every BatchNorm the statistics of these images, as training would have.

    A fresh network's are 0 and 1, by which nothing is normalised: maps grow from block to block.
    """
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # the mean over all batches seen, of which there is one
    model.train()
    with torch.no_grad():
        model(images)


class Start:
    """Networks and images that every contender gets copies of, made when the first one asks."""

    def __init__(self, networks: Networks, device: str, dtype: str):
        self.networks, self.device, self._practice = networks, device, PRACTICE[dtype]

    def with_loss(self, loss: Loss) -> Distillation:
        """Stage 1 by this loss."""
        teacher, student, images = self._made
        paths = self.networks.paths
        return Distillation(
            Tapped(copy.deepcopy(teacher), paths),
            Tapped(copy.deepcopy(student), paths),
            images,
            loss,
            self._practice.autocast,
        )

    @property
    def dtype(self) -> torch.dtype:
        """Of the maps."""
        return self._practice.autocast or torch.float32

    @cached_property
    def _made(self) -> tuple[nn.Module, nn.Module, Tensor]:
        """``(teacher, student, images)``: random, and the same numbers on every device."""
        side, device, layout = self.networks.image_size, self.device, self._practice.layout
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            teacher, student = self.networks.teacher(), self.networks.student()
            images = torch.randn(self.networks.batch_on(device), 3, side, side)
        images = images.to(device, memory_format=layout)
        for model in (teacher, student):
            model.to(device=device, memory_format=layout)
        settle(teacher, images)
        return teacher, student, images


def why_not(networks: Networks, dtype: str) -> str | None:
    """Why nobody races there; ``None`` if they do."""
    if dtype not in PRACTICE:
        return f"not run: networks are trained in {' and '.join(PRACTICE)}"
    if networks.needs is not None and importlib.util.find_spec(networks.needs) is None:
        return f"needs {networks.needs}"
    return None


def competing(chosen: Sequence[Contender]) -> list[Contender]:
    """Those of the contenders who race with whole networks."""
    return [c for c in chosen if c.ours or c.name in PEERS]


def entrants(
    networks: Networks, chosen: Sequence[Contender], device: str, dtype: str
) -> list[Entrant]:
    """The contenders, ready to be raced; ``dtype`` is a name in ``workloads.DTYPES``."""
    reason = why_not(networks, dtype)
    if reason is not None:
        return [Entrant(c.name, partial(_decline, reason)) for c in chosen]
    start = Start(networks, device, dtype)
    return [Entrant(c.name, partial(_prepare, c, start), c.max_rounds) for c in chosen]


def _decline(reason: str) -> Prepared:
    raise NotRun(reason)


def _prepare(contender: Contender, start: Start) -> Prepared:
    """Check, split, and take one whole step to warm up."""
    distillation = start.with_loss(contender.build())
    found = errors(distillation)
    hold(contender, found, start.dtype, start.networks.name)
    split = split_facts(distillation, start.device)
    distillation.step()
    facts = {
        "ours": contender.ours,
        "device": start.device,
        "batch": start.networks.batch_on(start.device),
    }
    return Prepared([distillation.step], facts | found | split)


def peak_step(networks_name: str, contender_name: str, dtype: str = "fp32") -> Step:
    """One contender's step on a CPU, unchecked: for its peak memory."""
    loss = contenders.BY_NAME[contender_name].build()
    return Start(BY_NAME[networks_name], "cpu", dtype).with_loss(loss).step
