"""Finished runs, read from their folders and grouped by study and arm, and their statistics."""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import median_high, median_low
from typing import Any, NamedTuple

import pandas as pd
from scipy.stats import ttest_1samp
from torch import Tensor

from fsp_kernels.distill import checkpoint, records
from fsp_kernels.distill.arms import ARMS
from fsp_kernels.distill.config import Config, Pair
from fsp_kernels.distill.records import MATRICES, Run
from fsp_kernels.distill.settings import read

TITLES = {"source": "teacher on its source data", "teacher": "teacher"}
TITLES |= {name: arm.title for name, arm in ARMS.items()}
BASELINES = ("baseline", "baseline-long")
_SAME = 1e-9  # accuracies are multiples of 1 / images, so a smaller difference is rounding


class Matrices(NamedTuple):
    """FSP matrices of one run, averaged over the evaluation split.

    ``tensors`` has ``teacher/0``, ``before/0`` and ``after/0``, each (m, n), for pair 0, and so on.
    Before and after are the student's, around the stage that has the FSP loss.
    """

    seed: int
    pairs: list[Pair]
    tensors: dict[str, Tensor]


class Group(NamedTuple):
    """The runs of one arm of a study, in the order of their seeds; ``title`` is for people."""

    study: str
    arm: str
    title: str
    runs: list[Run]
    matrices: Matrices | None

    def curve(self, name: str) -> pd.DataFrame:
        """An evaluated value by steps: a column for each seed, a row for each step that all have.

        A seed that a stopping rule ended keeps its last value from there on.
        """
        rows = {
            run.seed: {row["step"]: row[name] for row in phase.history}
            for run in self.runs
            for phase in run.phases
            if name in phase.history[-1]
        }
        table = pd.DataFrame(rows).sort_index()
        has_ended = table.bfill().isna()
        return table.where(~has_ended, table.ffill()).dropna()


@dataclass(frozen=True)
class Results:
    """All groups, teachers first within each study, and the recipe of each study."""

    groups: list[Group]
    configs: dict[str, Config]

    @property
    def students(self) -> list[Group]:
        return [group for group in self.groups if group.arm in ARMS]

    @property
    def targets(self) -> list[float]:
        """The accuracies whose step counts any of the recipes asks for."""
        return sorted({t for config in self.configs.values() for t in config.evaluation.targets})

    @property
    def split(self) -> str:
        """The evaluated split, or all of them."""
        return " / ".join(sorted({config.evaluation.split for config in self.configs.values()}))

    @property
    def environment(self) -> dict[str, str]:
        """What the runs ran on; all values where they differ."""
        found = pd.DataFrame(run.environment for group in self.groups for run in group.runs)
        return {name: ", ".join(found[name].dropna().unique()) for name in found}

    @cached_property
    def runs(self) -> pd.DataFrame:
        """A row for each trained network."""
        reached = {f"steps_to_{target:g}": target for target in self.targets}
        rows = [
            {
                "study": group.study,
                "arm": run.arm,
                "seed": run.seed,
                "network": run.network,
                "parameters": run.parameters,
                "stage1_steps": run.steps - run.task.steps,
                "task_steps": run.task.steps,
                "stopped": any(phase.stopped for phase in run.phases),
                "accuracy": run.accuracy,
                "loss": run.task.history[-1]["loss"],
                "seconds": run.seconds,
                **{name: run.steps_to(target) for name, target in reached.items()},
            }
            for group in self.groups
            for run in group.runs
        ]
        return pd.DataFrame(rows).astype(dict.fromkeys(reached, "Int64"))  # may be missing

    @cached_property
    def curves(self) -> pd.DataFrame:
        """A row for each evaluation of each network."""
        return pd.DataFrame(
            {"study": group.study, "arm": run.arm, "seed": run.seed, "stage": phase.name} | row
            for group in self.groups
            for run in group.runs
            for phase in run.phases
            for row in phase.history
        )

    @cached_property
    def summaries(self) -> dict[tuple[str, str], dict[str, Any]]:
        """Statistics over seeds, by study and arm.

        ``spread`` is the sample standard deviation of the accuracy, ``None`` with a single seed.
        Steps and ``seconds`` are the median seed's. ``steps_to`` gives, for each target accuracy,
        the median seed's task steps (``None`` for never) and how many seeds reached it.
        """
        return {
            key: {
                "network": runs["network"].iat[0],
                "parameters": int(runs["parameters"].iat[0]),
                "runs": len(runs),
                "accuracy": runs["accuracy"].mean(),
                "spread": runs["accuracy"].std() if len(runs) > 1 else None,
                "steps": int(median_low(runs["stage1_steps"] + runs["task_steps"])),
                "stage1_steps": int(median_low(runs["stage1_steps"])),
                "task_steps": int(median_low(runs["task_steps"])),
                "steps_to": {target: _steps_to(runs, target) for target in self.targets},
                "seconds": runs["seconds"].median(),
            }
            for key, runs in self.runs.groupby(["study", "arm"], sort=False)
        }

    @cached_property
    def gains(self) -> list[dict[str, Any]]:
        """Accuracy of each arm minus that of a baseline of its study, over the seeds of both.

        ``low`` and ``high`` are the 95 % confidence interval of the mean difference by the paired
        t-test, ``None`` for a single seed or where all seeds have the same difference. ``better``
        counts the seeds that gained. The ``verdict`` is ``gain`` or ``loss`` where the interval
        excludes zero, else ``neither``.
        """
        accuracies = self.runs.pivot_table("accuracy", ["study", "seed"], "arm")
        found = []
        for group, baseline in itertools.product(self.students, BASELINES):
            if baseline not in accuracies or group.arm in (baseline, "baseline"):
                continue
            each = (accuracies[group.arm] - accuracies[baseline]).loc[group.study].dropna()
            if each.empty:
                continue
            low = high = None
            verdict = "neither"
            if each.max() - each.min() > _SAME:
                low, high = map(float, ttest_1samp(each, 0).confidence_interval(0.95))
                verdict = "gain" if low > 0 else "loss" if high < 0 else "neither"
            found.append(
                {
                    "study": group.study,
                    "arm": group.arm,
                    "baseline": baseline,
                    "each": each.tolist(),
                    "low": low,
                    "high": high,
                    "mean": each.mean(),
                    "better": int((each > _SAME).sum()),
                    "verdict": verdict,
                }
            )
        return found


def _steps_to(runs: pd.DataFrame, target: float) -> tuple[int | None, int]:
    steps = runs[f"steps_to_{target:g}"].astype(float)
    # The higher median is one seed's count, and infinite if half of the seeds never got there.
    median = median_high(steps.fillna(math.inf))
    return None if math.isinf(median) else int(median), int(steps.count())


def gather(folders: Sequence[Path]) -> Results:
    """All finished runs in ``folders`` and below, and the teachers of the students among them.

    Raises:
        DistillError: a folder holds none, or one that is damaged.
    """
    paths = [path.resolve() for folder in folders for path in records.find(folder)]
    runs = {path: records.read(path) for path in paths}
    teachers = {_root(path, run) / "teacher" for path, run in runs.items()} - runs.keys()
    runs |= {path: records.read(path) for path in teachers if records.is_finished(path)}
    roots = list(dict.fromkeys(_root(path, run) for path, run in runs.items()))
    # The last parts of the paths name the studies: as many as make the names different.
    ends = ([root.parts[-length:] for root in roots] for length in itertools.count(1))
    names = next(found for found in ends if len(set(found)) == len(roots))
    studies = {root: "/".join(name) for root, name in zip(roots, names, strict=True)}
    found = defaultdict(list)
    for path, run in sorted(runs.items(), key=lambda item: item[1].seed):
        found[studies[_root(path, run)], run.arm].append((path, run))
    groups = [
        Group(
            study,
            arm,
            f"{study}: {title}" if len(studies) > 1 else title,
            [run for _, run in found[study, arm]],
            next(filter(None, (_matrices(*one) for one in found[study, arm])), None),
        )
        for study in studies.values()
        for arm, title in TITLES.items()
        if found[study, arm]
    ]
    return Results(groups, {study: _recipe(study, groups) for study in studies.values()})


def _root(path: Path, run: Run) -> Path:
    """The folder of a run's study: the run's is ROOT/teacher, or ROOT/ARM/seed-N."""
    in_arm = run.arm in ARMS and path.parent.name == run.arm
    return path.parent.parent if in_arm else path.parent


def _matrices(path: Path, run: Run) -> Matrices | None:
    if not (path / MATRICES).is_file():
        return None
    tensors, note = checkpoint.load(path / MATRICES)
    return Matrices(run.seed, [read(Pair, tree) for tree in note.get("pairs", [])], tensors)


def _recipe(study: str, groups: Sequence[Group]) -> Config:
    """The recipe that most of a study's students were trained by, or else its teachers."""
    runs = [run for group in groups if group.study == study for run in group.runs]
    students = [run for run in runs if run.arm in ARMS]
    recipes = [read(Config, run.config) for run in students or runs]
    return max(recipes, key=recipes.count)
