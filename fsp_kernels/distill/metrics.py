"""Numbers of a comparison: what is said of each arm, and the JSON and CSV files."""

from __future__ import annotations

import csv
import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fsp_kernels.distill.compare import ARMS, Comparison, Run
from fsp_kernels.distill.settings import to_tree


@dataclass(frozen=True)
class Summary:
    """One row of the report: an arm over its seeds.

    ``spread`` is the sample standard deviation of the accuracy, ``None`` with a single seed.
    ``steps_to`` gives, for each target accuracy, the task steps of the median seed (``None`` where
    it never got there) and how many seeds got there. ``seconds`` is the median network's.
    """

    parameters: int
    runs: int
    accuracy: float
    spread: float | None
    stage1_steps: int
    task_steps: int
    steps_to: dict[float, tuple[int | None, int]]
    seconds: float


def summarise(runs: Sequence[Run], targets: Sequence[float]) -> Summary:
    """``runs`` (at least one) of one arm."""
    accuracies = [run.accuracy for run in runs]
    return Summary(
        parameters=runs[0].parameters,
        runs=len(runs),
        accuracy=statistics.fmean(accuracies),
        spread=statistics.stdev(accuracies) if len(runs) > 1 else None,
        stage1_steps=steps(runs[0])[0],
        task_steps=steps(runs[0])[1],
        steps_to={target: _steps_to(runs, target) for target in targets},
        seconds=statistics.median(run.seconds for run in runs),
    )


def steps(run: Run) -> tuple[int, int]:
    """Optimiser steps of stage 1 and on the task loss."""
    stage1 = run.stage1.history[-1]["step"] if run.stage1 else 0
    return int(stage1), int(run.task.history[-1]["step"])


def gains(comparison: Comparison, baseline: str) -> list[float]:
    """Accuracy of the distilled student less that of ``baseline``'s, seed by seed."""
    pairs = zip(comparison.of("distilled"), comparison.of(baseline), strict=True)
    return [ours.accuracy - theirs.accuracy for ours, theirs in pairs]


def summaries(comparison: Comparison) -> dict[str, Summary]:
    """A row for the teacher and for each arm, in the order of the report."""
    targets = comparison.config.evaluation.targets
    rows = {"teacher": summarise([comparison.teacher], targets)}
    return rows | {arm: summarise(comparison.of(arm), targets) for arm in ARMS}


def write_json(comparison: Comparison, environment: dict[str, str], path: Path) -> None:
    """Everything, in one file."""
    everything: dict[str, Any] = {
        "config": to_tree(comparison.config),
        "environment": environment,
        "teacher_reused": comparison.teacher_reused,
        "summary": {arm: asdict(row) for arm, row in summaries(comparison).items()},
        "teacher": asdict(comparison.teacher),
        "runs": [asdict(run) for run in comparison.runs],
        "seconds": comparison.seconds,
    }
    path.write_text(json.dumps(everything, indent=1) + "\n", encoding="utf-8")


def write_runs_csv(comparison: Comparison, path: Path) -> None:
    """A line for each trained network."""
    targets = comparison.config.evaluation.targets
    rows = []
    for run in [comparison.teacher, *comparison.runs]:
        stage1, task = steps(run)
        row: dict[str, object] = {
            "arm": run.arm,
            "seed": run.seed,
            "parameters": run.parameters,
            "stage1_steps": stage1,
            "task_steps": task,
            "accuracy": run.accuracy,
            "loss": run.task.history[-1]["loss"],
            "seconds": run.seconds,
        }
        rows.append(row | {f"steps_to_{target:g}": run.steps_to(target) for target in targets})
    _write_csv(path, list(rows[0]), rows)


def write_curves_csv(comparison: Comparison, path: Path) -> None:
    """A line for each evaluation of each network."""
    rows: list[dict[str, object]] = []
    for run in [comparison.teacher, *comparison.runs]:
        for name, phase in (("stage1", run.stage1), ("task", run.task)):
            for row in phase.history if phase else ():
                rows.append({"arm": run.arm, "seed": run.seed, "phase": name, **row})
    figures = ["step", "train_loss", "fsp_loss", "accuracy", "loss"]
    _write_csv(path, ["arm", "seed", "phase", *figures], rows)


def _steps_to(runs: Sequence[Run], target: float) -> tuple[int | None, int]:
    reached = [run.steps_to(target) for run in runs]
    # median_high: an actual seed's count, and infinite when half of the seeds never get there.
    median = statistics.median_high(math.inf if step is None else step for step in reached)
    count = sum(step is not None for step in reached)
    return (None if math.isinf(median) else int(median)), count


def _write_csv(path: Path, names: list[str], rows: Sequence[dict[str, object]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, names, restval="")
        writer.writeheader()
        writer.writerows(rows)
