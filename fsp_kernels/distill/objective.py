"""What a stage minimises: one module of the student and its losses, fit to be wrapped for DDP.

The losses are computed within its forward pass: autocast then reaches all of it, maps stay in the
precision they were computed in, and DDP sees which weights a stage has no use for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fsp_kernels import fsp_loss
from fsp_kernels.distill.arms import Stage
from fsp_kernels.distill.config import Fsp, Pair, SoftTargets
from fsp_kernels.distill.pairs import Maps, Projection, channels_first
from fsp_kernels.distill.taps import FeatureTaps


class Targets(NamedTuple):
    """What the teacher says of a batch: per pair its maps or its FSP matrix, and logits (B, N)."""

    pairs: Sequence[Maps | Tensor] = ()
    logits: Tensor | None = None


class Tapped(nn.Module):
    """A network that gives its logits and the maps of its pairs.

    Args:
        network: its forward pass takes images (B, C, H, W) and gives logits (B, classes).
        paths: the two module paths of each pair; none for logits alone.
        channel_dims: of each pair, the axis of its maps' channels, as in a recipe.
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
        """Logits (B, classes), and of each pair the ``(first, second)`` maps (B, C, *spatial)."""
        return self._call(images), self._maps()

    def uncompiled(self, images: Tensor) -> tuple[Tensor, list[Maps]]:
        """The same, for what is not done often enough to be compiled for."""
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
        stage: what counts, and how much.
        pairs: the recipe's; used where ``stage.fsp`` is more than 0.
        fsp: how the FSP loss is taken.
        projection: from the student's channels to the teacher's, where they differ.
        compiled: whether to ``torch.compile`` the network.
    """

    def __init__(
        self,
        network: nn.Module,
        stage: Stage,
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
        """The scalar to minimise: the mean over the batch (B, C, H, W)."""
        logits, maps = self.student(images)
        terms: list[Tensor] = []
        if self.stage.task:
            terms.append(task_loss(logits, labels, targets.logits, self.stage.kd))
        if self.stage.fsp:
            terms.append(self.stage.fsp * self.fsp_loss(maps, targets))
        return sum(terms[1:], terms[0])

    def fsp_loss(self, maps: Sequence[Maps], targets: Targets, pair: int | None = None) -> Tensor:
        """The FSP loss of all pairs together, or of one alone, weighted."""
        if self.projection is not None:
            maps = self.projection(maps)
        chosen = slice(None) if pair is None else slice(pair, pair + 1)
        return fsp_loss(
            maps[chosen],
            targets.pairs[chosen],
            weights=self.weights[chosen],
            pool=self.fsp.pool,
            norm=self.fsp.norm,
            channel_dim=1,
        )

    def fsp_losses(self, maps: Sequence[Maps], targets: Targets) -> list[Tensor]:
        """The same, a scalar for each pair."""
        return [self.fsp_loss(maps, targets, pair) for pair in range(len(self.weights))]


def task_loss(
    logits: Tensor, labels: Tensor, soft: Tensor | None, kd: SoftTargets | None
) -> Tensor:
    """Cross-entropy, with a share of soft targets where ``kd`` asks for it.

    ``(1 - w) CE + w T^2 KL(teacher || student)``, both networks' logits divided by T (Hinton,
    Vinyals, Dean, 2015, section 2): T^2 keeps the gradient's size as T grows.
    """
    # In fp32 whatever the network computed in: autocast would do so for these two, but DDP or a
    # user's own half-precision network need not run under it.
    logits = logits.float()
    task = F.cross_entropy(logits, labels)
    if kd is None or soft is None:
        return task
    heat = kd.temperature
    student = F.log_softmax(logits / heat, dim=1)
    teacher = F.log_softmax(soft.float() / heat, dim=1)
    divergence = F.kl_div(student, teacher, reduction="batchmean", log_target=True)
    return (1 - kd.weight) * task + kd.weight * heat**2 * divergence
