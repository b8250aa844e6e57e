"""The ways to train a student that a study can compare, each a sequence of stages."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from fsp_kernels.distill.config import Config, SoftTargets, Training


@dataclass(frozen=True)
class TrainingStage:
    """One run of an optimiser; it minimises the sum of the losses that are asked for.

    Attributes:
        name: for people, such as "stage 1".
        section: the section of the recipe that ``training`` is.
        training: the optimiser, its schedule and stopping rule.
        steps: how many; epochs are converted to steps.
        task: whether the loss has the cross-entropy with the labels.
        fsp: the weight of the FSP loss.
        kd: soft targets, which take a share of the task's weight.
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
        """The losses in words."""
        parts = {
            "cross-entropy": self.task,
            "soft targets": self.kd is not None,
            "FSP loss": self.fsp > 0,
        }
        return [name for name, there in parts.items() if there]


class Arm(NamedTuple):
    """A way to train the student.

    Attributes:
        title: for reports.
        two_stages: the FSP loss alone first, as in the paper (section 3.4); then the task.
        all_steps: a single stage takes the steps of both; milestones are shares of the steps, so
            they stretch along.
        fsp: the FSP loss beside the task.
        kd: soft targets in the task.
    """

    title: str
    two_stages: bool = False
    all_steps: bool = True
    fsp: bool = False
    kd: bool = False

    def stages(self, config: Config, count: Callable[[Training], int]) -> tuple[TrainingStage, ...]:
        """The stages, by a recipe and a function that counts the steps of a training."""
        first, second = count(config.stage1), count(config.stage2)
        fsp, kd = config.fsp.beta if self.fsp else 0.0, config.kd if self.kd else None
        if self.two_stages:
            return (
                TrainingStage("stage 1", "stage1", config.stage1, first, task=False, fsp=1.0),
                TrainingStage("stage 2", "stage2", config.stage2, second, kd=kd),
            )
        steps = first + second if self.all_steps else second
        return (TrainingStage("task", "stage2", config.stage2, steps, fsp=fsp, kd=kd),)


ARMS = {
    "baseline": Arm("baseline, stage 2's steps", all_steps=False),
    "baseline-long": Arm("baseline, same total steps"),
    "two-stage": Arm("FSP in two stages", two_stages=True),
    "one-stage": Arm("task + FSP in one stage", fsp=True),
    "kd": Arm("soft targets", kd=True),
    "two-stage-kd": Arm("FSP in two stages, soft targets in the second", two_stages=True, kd=True),
    "one-stage-kd": Arm("task + FSP + soft targets in one stage", fsp=True, kd=True),
}
