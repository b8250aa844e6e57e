"""Runs that nobody trained: records with chosen numbers, and folders that hold them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from fsp_kernels.distill import checkpoint, records
from fsp_kernels.distill.arms import ARMS
from fsp_kernels.distill.config import Config
from fsp_kernels.distill.records import Phase, Run
from fsp_kernels.distill.report.results import Results, gather
from fsp_kernels.distill.settings import read

PAIR = {"student": ["one", "two"], "teacher": ["one", "three"]}
RECIPE: dict[str, Any] = {
    "name": "made-up",
    "data": {"dataset": "digits", "train_images": 40, "teacher_images": 40, "augment": False},
    "teacher": {"model": "cifar/resnet14"},
    "teacher_training": {"steps": 6, "learning_rate": 0.05},
    "student": {"model": "cifar/resnet8"},
    "stage1": {"steps": 200, "learning_rate": 0.1},
    "stage2": {"steps": 60, "learning_rate": 0.1},
    "evaluation": {"every": 10, "targets": [0.5]},
}


def task_phase(*accuracies: float, every: int = 10, **fields: Any) -> Phase:
    """Evaluated each ``every`` steps, from step 0."""
    rows = [
        {"step": every * i, "accuracy": accuracy, "loss": 1.0 - accuracy}
        for i, accuracy in enumerate(accuracies)
    ]
    made: dict[str, Any] = {"name": "task", "losses": ["cross-entropy"], "seconds": 1.0}
    return Phase(**(made | {"stopped": False} | fields), history=rows)


def fsp_phase(*losses: float, every: int = 100, **fields: Any) -> Phase:
    """A first stage, likewise."""
    rows = [
        {"step": every * i, "fsp_loss": loss, "fsp_loss/0": loss} for i, loss in enumerate(losses)
    ]
    made: dict[str, Any] = {"name": "stage 1", "losses": ["FSP loss"], "seconds": 2.0}
    return Phase(**(made | {"stopped": False} | fields), history=rows)


def run_of(
    arm: str = "baseline",
    seed: int = 0,
    accuracy: float = 0.9,
    phases: Sequence[Phase] | None = None,
    recipe: Mapping[str, Any] = RECIPE,
    **fields: Any,
) -> Run:
    """A run of the recipe's 200 and 60 steps, as the arm has them, that ends at ``accuracy``."""
    if phases is None:
        long = arm in ARMS and arm not in ("baseline", "two-stage", "two-stage-kd")
        more = {"soft targets": "kd" in arm, "FSP loss": "one-stage" in arm}
        losses = ["cross-entropy", *(name for name, there in more.items() if there)]
        task = task_phase(0.1, accuracy, every=260 if long else 60, losses=losses)
        phases = [fsp_phase(400.0, 100.0, every=200), task] if arm.startswith("two") else [task]
    made = {
        "network": "cifar/resnet8",
        "parameters": 75002,
        "settings": {},
        "environment": {"python": "3.0", "device": "cpu"},
    }
    return Run(arm=arm, seed=seed, phases=list(phases), config=dict(recipe), **(made | fields))


def keep(run: Run, study: Path) -> Path:
    """``run`` in its place in the folder of a study."""
    folder = study / run.arm / f"seed-{run.seed}" if run.arm in ARMS else study / run.arm
    records.write(run, folder)
    return folder


def keep_matrices(folder: Path, **means: float) -> None:
    """One pair's FSP matrices (2, 3), each of equal entries, beside a run."""
    tensors = {f"{name}/0": torch.full((2, 3), value) for name, value in means.items()}
    checkpoint.save(folder / records.MATRICES, tensors, {"pairs": [PAIR]})


def results_of(study: Path, accuracies: Mapping[str, Sequence[float]]) -> Results:
    """A study whose arms end at ``accuracies``, seed by seed from 0."""
    for arm, each in accuracies.items():
        for seed, accuracy in enumerate(each):
            keep(run_of(arm, seed, accuracy), study)
    return gather([study])


def recipe(**sections: Any) -> dict[str, Any]:
    """``RECIPE`` with other keys, checked for being one."""
    changed = {**RECIPE, **sections}
    read(Config, changed)
    return changed
