"""The study of a recipe of a second or two: opened, stopped, gone on with, and its results."""

from __future__ import annotations

import io
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from distilled_steps import GroupNormResNet
from rich.console import Console
from torch import Tensor

from fsp_kernels.distill import checkpoint, records
from fsp_kernels.distill.config import load_config
from fsp_kernels.distill.interruption import InterruptedRunError, Interruption
from fsp_kernels.distill.monitor import Monitor
from fsp_kernels.distill.study import Study
from fsp_kernels.errors import DistillError

TINY_RECIPE = """\
seeds: [0, 1]
data: {dataset: digits, train_images: 40, teacher_images: 60, augment: false, batch_size: 20}
teacher: {model: cifar/resnet14}
teacher_training: {steps: 6, learning_rate: 0.05}
student: {model: cifar/resnet8}
pairs:
  - {student: [stage1.0.relu1, stage1], teacher: [stage1.0.relu1, stage1]}
  - {student: ["stage3.0.conv2:input", stage3], teacher: ["stage3.0.conv2:input", stage3]}
fsp: {beta: 1e-5}
stage1: {steps: 8, learning_rate: 1e-4}
stage2: {steps: 6, learning_rate: 0.05}
execution: {threads: 1}
evaluation: {split: validation, every: 4, targets: [0.05, 1.0]}
checkpoints: {every: 3}
"""
TEACHER, STAGE_1, STAGE_2 = 6, 8, 6  # steps of the tiny recipe
STEPS = TEACHER + STAGE_1 + STAGE_2


GROUP_NORM_NET = f"{GroupNormResNet.__module__}:GroupNormResNet"


def open_study(
    recipe: Path,
    folder: Path,
    *overrides: str,
    resume: bool | None = None,
    heard: io.StringIO | None = None,
) -> Study:
    """The study of a recipe in a folder; what it says goes to ``heard``."""
    monitor = Monitor(Console(file=heard or io.StringIO(), width=1000))
    return Study(load_config(recipe, overrides), folder, monitor, Interruption(), resume)


def is_whole(path: Path) -> bool:
    """Whether a file is a checkpoint that can be read."""
    try:
        return bool(checkpoint.load(path))
    except DistillError:
        return False


class AfterSteps(Interruption):
    """Asks to stop in the given one of the steps that are taken from now on."""

    def __init__(self, steps: int, number: int = signal.SIGTERM) -> None:
        self._left, self._number = steps, number

    @property
    def requested(self) -> int:  # is asked for once a step
        self._left -= 1
        return self._number if self._left <= 0 else 0

    def check(self) -> None:
        """Evaluations are not counted."""


def interrupted(study: Study, steps: int, arm: str = "two-stage") -> InterruptedRunError:
    """Train until a signal in the given step."""
    study.runtime.interruption = AfterSteps(steps)
    with pytest.raises(InterruptedRunError) as caught:
        study.student(arm, 0)
    return caught.value


def trained(
    recipe: Path,
    folder: Path,
    *overrides: str,
    arm: str = "two-stage",
    stops: Sequence[int] = (),
    resume: bool | None = None,
) -> Path:
    """The folder of a student; ``stops`` are the steps that each process before the last lives."""
    for steps in stops:
        interrupted(open_study(recipe, folder, *overrides, resume=resume), steps, arm)
        resume = True
    study = open_study(recipe, folder, *overrides, resume=resume)
    study.student(arm, 0)
    return study.folder_of(arm, 0)


def results(folder: Path) -> dict[str, Any]:
    """All that is kept of a run but how long it took."""
    run = records.read(folder)
    found: dict[str, Any] = {
        f"{phase.name} {what}": getattr(phase, what)
        for phase in run.phases
        for what in ("losses", "history", "stopped")
    }
    for name in (records.MODEL, records.MATRICES):
        if (folder / name).exists():
            found |= {
                f"{name}: {key}": bits(x)
                for key, x in checkpoint.load(folder / name).tensors.items()
            }
    return found | {"settings": run.settings}


def bits(tensor: Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def leftovers(folder: Path) -> list[Path]:
    """What only an unfinished run has."""
    return [path for pattern in (".unfinished-*", "checkpoints") for path in folder.rglob(pattern)]


def files_under(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def checkpoints(folder: Path) -> list[Path]:
    return sorted((folder / "two-stage" / "seed-0" / "checkpoints").iterdir())
