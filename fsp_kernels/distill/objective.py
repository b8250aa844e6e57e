"""The loss of a stage, as one module of the student and its losses that DDP can wrap.

The forward pass computes the losses too: autocast then covers all of it, maps keep the precision
they were computed in, and DDP sees which weights a stage does not use.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fsp_kernels import fsp_loss
from fsp_kernels.distill.arms import TrainingStage
from fsp_kernels.distill.config import Fsp, Pair, SoftTargets
from fsp_kernels.features.pairs import Maps, Projection, channels_first
from fsp_kernels.features.taps import FeatureTaps


class Targets(NamedTuple):
    """The teacher's output for a batch: maps or FSP matrix of each pair, and logits (B, N)."""

    pairs: Sequence[Maps | Tensor] = ()
    logits: Tensor | None = None


class Tapped(nn.Module):
    """A network that also gives the maps of its pairs.

    Args:
        network: takes images (B, C, H, W) and gives logits (B, classes).
        paths: the two module paths of each pair; empty for logits alone.
        channel_dims: the axis of the channels in the maps of each pair, as in a recipe.
        compiled: whether to ``torch.compile`` the network.
    """

    def __init__(
        self,
        network: nn.Module,
        paths: Sequence[tuple[str, str]],
        channel_dims: Sequence[int | None],
        compiled: bool = False,
    ) -> None:
        super().__init__()
        self.network = network
        self.channel_dims = list(channel_dims)
        self.taps = FeatureTaps(network, [path for pair in paths for path in pair]).attach()
        # A function, since a compiled module would be a second submodule with the same weights.
        self._call: Callable[[Tensor], Tensor] = torch.compile(self._run) if compiled else self._run

    def forward(self, images: Tensor) -> tuple[Tensor, list[Maps]]:
        """Logits (B, classes), and the ``(first, second)`` maps (B, C, *spatial) of each pair."""
        return self._call(images), self._maps()

    def uncompiled(self, images: Tensor) -> tuple[Tensor, list[Maps]]:
        """The same without compilation, for evaluations."""
        return self._run(images), self._maps()

    def _run(self, images: Tensor) -> Tensor:
        logits: Tensor = self.network(images)
        return logits

    def _maps(self) -> list[Maps]:
        return channels_first(self.taps.take_pairs(), self.channel_dims)


class Objective(nn.Module):
    """A stage's loss as a function of images, labels and the teacher's targets.

    Args:
        network: the student.
        stage: says which losses to add up, and their weights.
        pairs: of the FSP loss; not used if ``stage.fsp`` is 0.
        fsp: options of the FSP loss.
        projection: from the student's channels to the teacher's, if they differ.
        compiled: whether to ``torch.compile`` the network.
    """

    def __init__(
        self,
        network: nn.Module,
        stage: TrainingStage,
        pairs: Sequence[Pair],
        fsp: Fsp,
        projection: Projection | None,
        compiled: bool = False,
    ) -> None:
        super().__init__()
        self.stage, self.fsp = stage, fsp
        pairs = pairs if stage.fsp else ()
        self.weights = [pair.weight for pair in pairs]
        paths, dims = [pair.student for pair in pairs], [pair.channel_dim for pair in pairs]
        self.student = Tapped(network, paths, dims, compiled)
        self.projection = projection if stage.fsp else None

    def forward(self, images: Tensor, labels: Tensor, targets: Targets) -> Tensor:
        """The loss to minimise, a scalar: the mean over images (B, C, H, W) and labels (B,)."""
        logits, maps = self.student(images)
        terms: list[Tensor] = []
        if self.stage.task:
            terms.append(task_loss(logits, labels, targets.logits, self.stage.kd))
        if self.stage.fsp:
            terms.append(self.stage.fsp * self.fsp_loss(maps, targets))
        return sum(terms[1:], terms[0])

    def fsp_loss(
        self, maps: Sequence[Maps], targets: Targets, reduction: Literal["sum", "none"] = "sum"
    ) -> Tensor:
        """The weighted FSP loss, a scalar; with the reduction "none" that of each pair (pairs,)."""
        if self.projection is not None:
            maps = self.projection(maps)
        return fsp_loss(
            maps,
            targets.pairs,
            weights=self.weights,
            pool=self.fsp.pool,
            norm=self.fsp.norm,
            reduction=reduction,
            channel_dim=1,
        )


def task_loss(
    logits: Tensor, labels: Tensor, soft: Tensor | None, kd: SoftTargets | None
) -> Tensor:
    """Cross-entropy of logits (B, N) and labels (B,), with soft targets (B, N) if ``kd`` is given.

    ``(1 - w) CE + w T^2 KL(teacher || student)``, both networks' logits divided by T (Hinton,
    Vinyals, Dean, 2015, section 2): T^2 keeps the gradient's size as T grows.
    """
    # In fp32 even without autocast, as for a user's own half-precision network.
    logits = logits.float()
    task = F.cross_entropy(logits, labels)
    if kd is None or soft is None:
        return task
    heat = kd.temperature
    student = F.log_softmax(logits / heat, dim=1)
    teacher = F.log_softmax(soft.float() / heat, dim=1)
    divergence = F.kl_div(student, teacher, reduction="batchmean", log_target=True)
    return (1 - kd.weight) * task + kd.weight * heat**2 * divergence
