"""The experiment: one teacher, and for every seed the same student trained three ways."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fsp_kernels import fsp_matrix
from fsp_kernels.distill import checkpoint
from fsp_kernels.distill.config import Config, dump_config
from fsp_kernels.distill.data import Splits, load_splits
from fsp_kernels.distill.errors import DistillError
from fsp_kernels.distill.models import CifarResNet, parameter_count
from fsp_kernels.distill.monitor import Monitor
from fsp_kernels.distill.settings import to_tree
from fsp_kernels.distill.train import Phase, Trainer, as_in_stage1, tapped_pairs

_RESULTS = ("report.md", "metrics.json", "runs.csv", "curves.csv")
_MARKER = "config.yaml"


Observer = Callable[[str, nn.Module], None]


class Arm(NamedTuple):
    """A way to train the student: with or without stage 1, and how long on the task loss."""

    title: str
    distilled: bool
    task_steps: Callable[[Config], int]


ARMS = {
    "baseline": Arm("baseline, same task steps", False, lambda c: c.stage2.steps),
    "baseline-long": Arm(
        "baseline, same total steps", False, lambda c: c.stage1.steps + c.stage2.steps
    ),
    "distilled": Arm("distilled", True, lambda c: c.stage2.steps),
}


@dataclass(frozen=True)
class Run:
    """One trained network; ``stage1`` is ``None`` where the network had none."""

    arm: str
    seed: int
    parameters: int
    stage1: Phase | None
    task: Phase

    @property
    def accuracy(self) -> float:
        """After the last step, on the evaluation split, 0 to 1."""
        return self.task.history[-1]["accuracy"]

    @property
    def seconds(self) -> float:
        """Spent in optimiser steps: stage 1's teacher included, evaluations not."""
        return self.task.seconds + (self.stage1.seconds if self.stage1 else 0.0)

    def steps_to(self, accuracy: float) -> int | None:
        """Task steps before an evaluation first shows ``accuracy``; ``None`` if none does."""
        reached = (row["step"] for row in self.task.history if row["accuracy"] >= accuracy)
        step = next(reached, None)
        return None if step is None else int(step)


@dataclass(frozen=True)
class Comparison:
    """All that ``report.py`` tells about.

    ``matrices`` holds, for "teacher", "before" and "after" stage 1 of the first seed's student, the
    FSP matrix (m, n) of each pair, averaged over the evaluation split.
    """

    config: Config
    teacher: Run
    teacher_reused: bool
    runs: list[Run]
    matrices: dict[str, list[Tensor]]
    seconds: float

    def of(self, arm: str) -> list[Run]:
        """The runs of one arm, a seed each, in the order of ``config.seeds``."""
        return [run for run in self.runs if run.arm == arm]


class Teacher(NamedTuple):
    """A trained teacher; ``reused`` says that an earlier run trained it."""

    model: nn.Module
    run: Run
    reused: bool


class Laboratory:
    """One recipe in one run folder.

    Opening it checks all that can be checked before training and changes nothing if a check fails.
    A folder that does not exist, is empty, or was made by this program is used: results in it are
    replaced, its teacher is used again if it was trained by the same settings.

    Raises:
        DistillError: the recipe does not fit its data or networks; ``folder`` holds other things;
            the teacher's checkpoint is damaged.
    """

    def __init__(self, config: Config, folder: Path, monitor: Monitor) -> None:
        splits = load_splits(config.data)
        check_pairs(config, splits)
        check_folder(folder)
        self.teacher_path = folder / "teacher.safetensors"
        self._stored = checkpoint.load(self.teacher_path) if self.teacher_path.exists() else None
        self._fingerprint = checkpoint.fingerprint(_teacher_settings(config))
        self._teacher: Teacher | None = None
        self.config, self.folder, self.monitor = config, folder, monitor
        self.trainer = Trainer(config, splits, monitor)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / _MARKER).write_text(dump_config(config), encoding="utf-8")

    def teacher(self) -> Teacher:
        """The teacher: in memory, from an earlier run's checkpoint, or trained now."""
        if self._teacher is None:
            self._teacher = self._stored_teacher() or self._trained_teacher()
            self._say(self._teacher.run, self._teacher.reused)
        return self._teacher

    def student_path(self, arm: str, seed: int, moment: str = "") -> Path:
        """Where a student's weights are kept; ``moment`` is "stage-1" for those after stage 1."""
        name = "-".join(filter(None, (arm, "seed", str(seed), moment)))
        return self.folder / "checkpoints" / f"{name}.safetensors"

    def student(self, arm: str, seed: int, observe: Observer | None = None) -> Run:
        """Train one student and keep its weights.

        All arms of one seed share the initial weights and, as far as they go, the order of images
        on the task loss.

        Args:
            arm: a key of ``ARMS``; the distilled one trains the teacher first if need be.
            seed: of the initial weights and of the order of images.
            observe: is shown the distilled student "before" and "after" stage 1.

        Raises:
            DistillError: a loss is no longer finite.
        """
        trainer, label, stage1 = self.trainer, f"{arm} seed {seed}", None
        teacher = self.teacher().model if ARMS[arm].distilled else None
        student = trainer.new_network(self.config.student, seed)
        if teacher is not None:
            if observe:
                observe("before", student)
            stage1 = trainer.stage1(student, teacher, seed, label)
            if observe:
                observe("after", student)
            self._keep(student, self.student_path(arm, seed, "stage-1"))
        # Stage 2's settings over more steps: the milestones are shares, so they stretch along.
        training = replace(self.config.stage2, steps=ARMS[arm].task_steps(self.config))
        phase = trainer.task(student, training, trainer.splits.train, seed, (label, "task"))
        run = Run(arm, seed, parameter_count(student), stage1, phase)
        self._keep(student, self.student_path(arm, seed))
        self._say(run)
        return run

    def compare(self) -> Comparison:
        """The teacher, then every arm for every seed."""
        started = time.perf_counter()
        for name in _RESULTS:  # an interrupted comparison must not lie beside an older report
            (self.folder / name).unlink(missing_ok=True)
        teacher = self.teacher()
        matrices = {"teacher": self._matrices(teacher.model.eval(), "teacher")}

        def observe(moment: str, student: nn.Module) -> None:
            if moment not in matrices:  # the first seed's
                matrices[moment] = self._matrices(as_in_stage1(student), "student")

        runs = [self.student(arm, seed, observe) for seed in self.config.seeds for arm in ARMS]
        seconds = time.perf_counter() - started
        return Comparison(self.config, teacher.run, teacher.reused, runs, matrices, seconds)

    def _matrices(self, model: nn.Module, role: str) -> list[Tensor]:
        """Each pair's FSP matrix, averaged over the evaluation split."""
        batches = [
            self.trainer.fsp_matrices(model, role, images)
            for images, _ in self.trainer.evaluation_batches()
        ]
        return [torch.cat(pair).mean(0).cpu() for pair in zip(*batches, strict=True)]

    def _stored_teacher(self) -> Teacher | None:
        if self._stored is None:
            return None
        if self._stored.note.get("fingerprint") != self._fingerprint:
            self.monitor.say(f"{self.teacher_path}: of other settings; training the teacher anew")
            return None
        model = self.trainer.new_network(self.config.teacher, self.config.teacher_seed)
        checkpoint.restore(model, self._stored, self.teacher_path)
        note = self._stored.note["run"]
        return Teacher(model, Run(**{**note, "task": Phase(**note["task"])}), reused=True)

    def _trained_teacher(self) -> Teacher:
        config, seed = self.config, self.config.teacher_seed
        model = self.trainer.new_network(config.teacher, seed)
        images = self.trainer.splits.teacher_train
        phase = self.trainer.task(model, config.teacher_training, images, seed, ("teacher", "task"))
        run = Run("teacher", seed, parameter_count(model), None, phase)
        note = {"fingerprint": self._fingerprint, "run": asdict(run)}
        checkpoint.save(self.teacher_path, model, note)
        return Teacher(model, run, reused=False)

    def _keep(self, student: nn.Module, path: Path) -> None:
        checkpoint.save(path, student, {"config": to_tree(self.config)})

    def _say(self, run: Run, reused: bool = False) -> None:
        split = self.config.evaluation.split
        time_or_reuse = "reused" if reused else f"{run.seconds:.1f} s"
        self.monitor.say(
            f"{run.arm} seed {run.seed}: {split} accuracy {run.accuracy:.2%}, {time_or_reuse}"
        )


def check_pairs(config: Config, splits: Splits) -> None:
    """Both networks have the recipe's maps, and the FSP matrices of each pair have one shape."""
    image = splits.train.images[:1]
    shapes: dict[str, list[torch.Size]] = {"student": [], "teacher": []}
    for role, network in (("student", config.student), ("teacher", config.teacher)):
        model = CifarResNet(network.depth, network.width, image.shape[1], splits.classes).eval()
        for index, pair in enumerate(config.pairs):
            try:
                with torch.no_grad():
                    [maps] = tapped_pairs(model, [getattr(pair, role)], image)
                    shapes[role].append(fsp_matrix(*maps).shape[1:])
            except ValueError as error:
                raise DistillError(f"pairs.{index}.{role}: {error}") from error
    for index, (ours, theirs) in enumerate(zip(*shapes.values(), strict=True)):
        if ours != theirs:
            raise DistillError(
                f"pairs.{index}: the student's FSP matrix is {ours[0]} x {ours[1]}, the teacher's "
                f"{theirs[0]} x {theirs[1]}; their feature maps must have equal channels"
            )


def check_folder(folder: Path) -> None:
    """``folder`` is ours to write to: absent, empty, or holding an earlier run."""
    if folder.is_dir():
        if any(folder.iterdir()) and not (folder / _MARKER).is_file():
            raise DistillError(
                f"{folder}: is not empty and holds no earlier run; choose another with --output"
            )
    elif folder.exists():
        raise DistillError(f"{folder}: is not a folder; choose another with --output")


def _teacher_settings(config: Config) -> dict[str, Any]:
    """All that a teacher's weights and recorded figures depend on."""
    tree = to_tree(config)
    names = ("data", "teacher", "teacher_training", "teacher_seed", "threads")
    evaluation = {name: tree["evaluation"][name] for name in ("split", "every")}
    return {name: tree[name] for name in names} | {"evaluation": evaluation}
