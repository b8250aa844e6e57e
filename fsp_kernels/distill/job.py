"""What is to become of one network, and what there is to do it with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from accelerate import Accelerator

from fsp_kernels.distill.arms import Stage
from fsp_kernels.distill.config import Config, Data, Network, Pair
from fsp_kernels.distill.data import Split
from fsp_kernels.distill.interruption import Interruption
from fsp_kernels.distill.monitor import Monitor
from fsp_kernels.distill.pairs import PairShapes


class Setup(NamedTuple):
    """What all that trains or measures in a process shares."""

    config: Config
    accelerator: Accelerator
    monitor: Monitor
    interruption: Interruption


@dataclass(frozen=True)
class Job:
    """One network to be trained.

    Attributes:
        arm: a key of ``ARMS``, or what else the network is for: "teacher", "source".
        label: for people, "two-stage seed 0".
        network: what it is, by name.
        seed: of weights, order of images, augmentation and whatever else is random.
        stages: in order.
        data, images: what to train on: how it is read, and the split.
        folder: the run's.
        settings: all that the result depends on, and how fast it comes about: the recipe's
            sections, and digests of the images and weights that it starts from.
        pairs, shapes: of the FSP loss, where a stage has it.
    """

    arm: str
    label: str
    network: Network
    seed: int
    stages: tuple[Stage, ...]
    data: Data
    images: Split
    folder: Path
    settings: dict[str, Any]
    pairs: Sequence[Pair] = ()
    shapes: Sequence[PairShapes] = ()
