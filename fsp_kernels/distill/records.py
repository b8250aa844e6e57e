"""The record of a trained network, ``run.json``: its fields, writing and reading."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fsp_kernels.distill.storage import write_text
from fsp_kernels.errors import DamagedError, DistillError

RECORD = "run.json"
MODEL = "model.safetensors"
MATRICES = "matrices.safetensors"
FORMAT = 3  # of records and checkpoints


@dataclass(frozen=True)
class Phase:
    """One finished stage.

    ``losses`` are in words. ``history`` has a row for each evaluation: ``step``, the figures and,
    except at step 0, the mean ``train_loss`` since the row before. ``seconds`` are those of the
    optimiser steps, the teacher's passes included. ``stopped``: its stopping rule ended it.
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
    """One trained network: ``settings`` are those of its job, ``config`` is the whole recipe."""

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
        """The last stage that trained the task."""
        return next(phase for phase in reversed(self.phases) if phase.has_task)

    @property
    def accuracy(self) -> float:
        """Accuracy after the last step, on the quoted split, 0 to 1."""
        return self.task.history[-1]["accuracy"]

    @property
    def steps(self) -> int:
        """Optimiser steps of all stages."""
        return sum(phase.steps for phase in self.phases)

    @property
    def seconds(self) -> float:
        """Spent in optimiser steps of all stages."""
        return sum(phase.seconds for phase in self.phases)

    def steps_to(self, accuracy: float) -> int | None:
        """Steps of the task before an evaluation first shows ``accuracy``; ``None`` if none."""
        reached = (int(row["step"]) for row in self.task.history if row["accuracy"] >= accuracy)
        return next(reached, None)


def write(run: Run, folder: Path) -> None:
    """Write the record of ``run`` to ``folder``, which marks the run as finished."""
    text = json.dumps({"format": FORMAT, **asdict(run)}, indent=1)
    write_text(folder / RECORD, text + "\n")


def read(folder: Path) -> Run:
    """Read the record of the finished run in ``folder``.

    Raises:
        DistillError: there is none, it cannot be read, or another version wrote it.
        DamagedError: it is damaged.
    """
    path = folder / RECORD
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
        if tree.pop("format") != FORMAT:
            raise another_version_error(path)
        phases = [Phase(**phase) for phase in tree.pop("phases")]
        return Run(phases=phases, **tree)
    except DistillError:
        raise
    except FileNotFoundError:
        raise DistillError(f"{folder}: holds no finished run ({RECORD} is missing)") from None
    except OSError as error:
        raise DistillError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise DamagedError(f"{path}: not the record of a run, or damaged: {error}") from error


def another_version_error(path: Path) -> DistillError:
    """The error for a file that another version of this program wrote."""
    return DistillError(
        f"{path}: was written by another version of this program; --restart trains it anew"
    )


def is_finished(folder: Path) -> bool:
    """Whether ``folder`` holds a finished run."""
    return (folder / RECORD).is_file()


def find(folder: Path) -> list[Path]:
    """The folders of finished runs in ``folder`` and below it, sorted.

    Raises:
        DistillError: there is none.
    """
    if not folder.is_dir():
        raise DistillError(f"{folder}: is not a folder")
    found = sorted(path.parent for path in folder.rglob(RECORD))
    if not found:
        raise DistillError(f"{folder}: holds no finished run")
    return found
