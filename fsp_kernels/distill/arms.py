"""The ways to train a student that a study can compare, each a sequence of stages."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from fsp_kernels.distill.config import Config, SoftTargets, Training


@dataclass(frozen=True)
class Stage:
    """One run of an optimiser, and what it minimises: the sum of what is asked for.

    Attributes:
        name: for people, "stage 1".
        section: the recipe's that ``training`` is.
        training: the optimiser, its schedule and stopping rule.
        steps: how many; ``training.epochs`` are worked out.
        task: whether the cross-entropy with the labels is in it.
        fsp: the weight of the FSP loss.
        kd: soft targets, which share the task's weight.
    """

    name: str
    section: str
    training: Training
    steps: int
    task: bool = True
    fsp: float = 0.0
    kd: SoftTargets | None = None

    @property
    def needs_teacher(self) -> bool:
        return self.fsp > 0 or self.kd is not None

    @property
    def losses(self) -> list[str]:
        """What is minimised, in words."""
        parts = {
            "cross-entropy": self.task,
            "soft targets": self.kd is not None,
            "FSP loss": self.fsp > 0,
        }
        return [name for name, there in parts.items() if there]


Count = Callable[[Training], int]
"""How many steps a training takes."""

MakeStages = Callable[[Config, Count], tuple[Stage, ...]]


class Arm(NamedTuple):
    """A way to train the student; ``stages`` makes its stages from the recipe and a ``Count``."""

    title: str
    stages: MakeStages


def _single(*, long: bool = False, fsp: bool = False, kd: bool = False) -> MakeStages:
    """Stage 2's settings over its own steps, or over those of both stages.

    Milestones are shares of the steps, so they stretch along.
    """

    def stages(config: Config, count: Count) -> tuple[Stage, ...]:
        steps = count(config.stage2) + (count(config.stage1) if long else 0)
        return (_task(config, "task", steps, config.fsp.beta if fsp else 0.0, kd),)

    return stages


def _two(*, kd: bool = False) -> MakeStages:
    """The paper's two stages (section 3.4)."""

    def stages(config: Config, count: Count) -> tuple[Stage, ...]:
        steps = count(config.stage1)
        first = Stage("stage 1", "stage1", config.stage1, steps, task=False, fsp=1.0)
        return first, _task(config, "stage 2", count(config.stage2), 0.0, kd)

    return stages


def _task(config: Config, name: str, steps: int, fsp: float, kd: bool) -> Stage:
    return Stage(name, "stage2", config.stage2, steps, fsp=fsp, kd=config.kd if kd else None)


ARMS = {
    "baseline": Arm("baseline, stage 2's steps", _single()),
    "baseline-long": Arm("baseline, same total steps", _single(long=True)),
    "two-stage": Arm("FSP in two stages", _two()),
    "one-stage": Arm("task + FSP in one stage", _single(long=True, fsp=True)),
    "kd": Arm("soft targets", _single(long=True, kd=True)),
    "two-stage-kd": Arm("FSP in two stages, soft targets in the second", _two(kd=True)),
    "one-stage-kd": Arm(
        "task + FSP + soft targets in one stage", _single(long=True, fsp=True, kd=True)
    ),
}
