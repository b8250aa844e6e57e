"""What a trained network leaves behind in its folder, and how it is read back."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fsp_kernels.distill.errors import DamagedError, DistillError
from fsp_kernels.distill.storage import write_text

RECORD = "run.json"
MODEL = "model.safetensors"
MATRICES = "matrices.safetensors"
_FORMAT = 2


@dataclass(frozen=True)
class Phase:
    """One stage, done.

    ``losses`` says what it minimised, in words. ``history`` has a row per evaluation: ``step``, the
    evaluated figures and, but for step 0, the mean ``train_loss`` since the row before. ``seconds``
    excludes evaluations. ``stopped`` says that its stopping rule ended it.
    """

    name: str
    losses: list[str]
    history: list[dict[str, float]]
    seconds: float
    stopped: bool

    @property
    def steps(self) -> int:
        return int(self.history[-1]["step"])

    @property
    def has_task(self) -> bool:
        return "accuracy" in self.history[-1]

    @property
    def has_fsp(self) -> bool:
        return "fsp_loss" in self.history[-1]


@dataclass(frozen=True)
class Run:
    """One trained network.

    ``settings`` are the job's; ``config`` is the recipe, as YAML would have it.
    """

    arm: str
    seed: int
    network: str
    parameters: int
    phases: list[Phase]
    settings: dict[str, Any]
    config: dict[str, Any]
    environment: dict[str, str]

    @property
    def task(self) -> Phase:
        """The stage that trained the task."""
        return next(phase for phase in reversed(self.phases) if phase.has_task)

    @property
    def accuracy(self) -> float:
        """After the last step, on the evaluation split, 0 to 1."""
        return self.task.history[-1]["accuracy"]

    @property
    def steps(self) -> int:
        """Optimiser steps of all stages."""
        return sum(phase.steps for phase in self.phases)

    @property
    def seconds(self) -> float:
        """Spent in optimiser steps: the teacher's forward passes included, evaluations not."""
        return sum(phase.seconds for phase in self.phases)

    def steps_to(self, accuracy: float) -> int | None:
        """Task steps before an evaluation first shows ``accuracy``; ``None`` if none does."""
        reached = (row["step"] for row in self.task.history if row["accuracy"] >= accuracy)
        step = next(reached, None)
        return None if step is None else int(step)


def write(run: Run, folder: Path) -> None:
    """Keep ``run`` in ``folder``: the mark of a run that is finished."""
    text = json.dumps({"format": _FORMAT, **asdict(run)}, indent=1)
    write_text(folder / RECORD, text + "\n")


def read(folder: Path) -> Run:
    """The run that ``folder`` holds.

    Raises:
        DistillError: there is none, its record cannot be read, or is of another version.
        DamagedError: its record is damaged.
    """
    path = folder / RECORD
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
        if tree.pop("format") == _FORMAT:
            phases = [Phase(**phase) for phase in tree.pop("phases")]
            return Run(phases=phases, **tree)
    except FileNotFoundError:
        raise DistillError(f"{folder}: holds no finished run ({RECORD} is missing)") from None
    except OSError as error:
        raise DistillError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise DamagedError(f"{path}: not the record of a run, or damaged: {error}") from error
    raise DistillError(
        f"{path}: was written by another version of this program; --restart trains it anew"
    )


def is_finished(folder: Path) -> bool:
    """Whether a run ended there."""
    return (folder / RECORD).is_file()


def find(folder: Path) -> list[Path]:
    """The folders of finished runs: ``folder`` itself, or those below it, in order.

    Raises:
        DistillError: there is none.
    """
    if not folder.is_dir():
        raise DistillError(f"{folder}: is not a folder")
    found = sorted(path.parent for path in folder.rglob(RECORD))
    if not found:
        raise DistillError(f"{folder}: holds no finished run")
    return found
