"""Numbers of a comparison: what is said of each group, and the JSON and CSV files."""

from __future__ import annotations

import csv
import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from scipy.stats import t as student_t

from fsp_kernels.distill.records import Phase, Run
from fsp_kernels.distill.report.comparison import Comparison, Group
from fsp_kernels.distill.storage import replacing, write_text

BASELINES = ("baseline", "baseline-long")
_SAME = 1e-9  # of accuracies, which are shares of a number of images: rounding errors


@dataclass(frozen=True)
class Summary:
    """One row of the report: a group over its seeds.

    ``spread`` is the sample standard deviation of the accuracy, ``None`` with a single seed.
    ``steps`` and its parts, and ``seconds``, are the median seed's. ``steps_to`` gives, for each
    target accuracy, the task steps of the median seed (``None`` where it never got there) and how
    many seeds got there.
    """

    network: str
    parameters: int
    runs: int
    accuracy: float
    spread: float | None
    steps: int
    stage1_steps: int
    task_steps: int
    steps_to: dict[float, tuple[int | None, int]]
    seconds: float


def summarise(runs: Sequence[Run], targets: Sequence[float]) -> Summary:
    """``runs`` (at least one) of one group."""
    accuracies = [run.accuracy for run in runs]
    return Summary(
        network=runs[0].network,
        parameters=runs[0].parameters,
        runs=len(runs),
        accuracy=statistics.fmean(accuracies),
        spread=statistics.stdev(accuracies) if len(runs) > 1 else None,
        steps=statistics.median_low(run.steps for run in runs),
        stage1_steps=statistics.median_low(run.steps - run.task.steps for run in runs),
        task_steps=statistics.median_low(run.task.steps for run in runs),
        steps_to={target: _steps_to(runs, target) for target in targets},
        seconds=statistics.median(run.seconds for run in runs),
    )


@dataclass(frozen=True)
class Gain:
    """Accuracy of one group less that of a baseline, for each seed that both have.

    ``low`` and ``high`` are the 95 % confidence interval of the mean difference, by Student's t.
    They are ``None`` where there is none: of a single seed, and where all seeds have the very same
    difference, whose deviation can't be told from so coarse a scale.
    """

    study: str
    arm: str
    baseline: str
    each: tuple[float, ...]
    low: float | None
    high: float | None

    @property
    def mean(self) -> float:
        return statistics.fmean(self.each)

    @property
    def better(self) -> int:
        """How many seeds gained."""
        return sum(value > _SAME for value in self.each)

    @property
    def verdict(self) -> Literal["gain", "loss", "neither"]:
        """A gain or a loss where the interval leaves zero out."""
        if self.low is None or self.high is None or self.low <= 0 <= self.high:
            return "neither"
        return "gain" if self.low > 0 else "loss"


def gains(comparison: Comparison) -> list[Gain]:
    """Each arm against each baseline of its study, and the longer baseline against the shorter."""
    found = []
    for group in comparison.students:
        for name in BASELINES:
            baseline = comparison.of(group.study, name)
            if baseline is None or group.arm in (name, "baseline"):
                continue
            gain = _gain(group, baseline)
            if gain is not None:
                found.append(gain)
    return found


def _gain(group: Group, baseline: Group) -> Gain | None:
    theirs = {run.seed: run.accuracy for run in baseline.runs}
    each = tuple(run.accuracy - theirs[run.seed] for run in group.runs if run.seed in theirs)
    if not each:
        return None
    low = high = None
    if max(each) - min(each) > _SAME:
        reach = deviations_reached(len(each)) * statistics.stdev(each)
        low, high = statistics.fmean(each) - reach, statistics.fmean(each) + reach
    return Gain(group.study, group.arm, baseline.arm, each, low, high)


def deviations_reached(seeds: int) -> float:
    """How many sample deviations a 95 % interval of a mean over ``seeds`` goes to each side."""
    return float(student_t.ppf(0.975, seeds - 1)) / math.sqrt(seeds)


def summary_of(comparison: Comparison, group: Group) -> Summary:
    """A group's row, by the targets of all studies."""
    return summarise(group.runs, comparison.targets)


def write_json(comparison: Comparison, path: Path) -> None:
    """Everything, in one file."""
    everything: dict[str, Any] = {
        "groups": [
            {
                "study": group.study,
                "arm": group.arm,
                "title": group.title,
                "summary": asdict(summary_of(comparison, group)),
                "runs": [asdict(run) for run in group.runs],
            }
            for group in comparison.groups
        ],
        "gains": [
            asdict(gain) | {"mean": gain.mean, "better": gain.better, "verdict": gain.verdict}
            for gain in gains(comparison)
        ],
    }
    write_text(path, json.dumps(everything, indent=1) + "\n")


def write_runs_csv(comparison: Comparison, path: Path) -> None:
    """A line for each trained network."""
    rows = []
    for group in comparison.groups:
        for run in group.runs:
            row: dict[str, object] = {
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
            }
            reached = {f"steps_to_{t:g}": run.steps_to(t) for t in comparison.targets}
            rows.append(row | reached)
    _write_csv(path, rows)


def write_curves_csv(comparison: Comparison, path: Path) -> None:
    """A line for each evaluation of each network."""
    rows: list[dict[str, object]] = [
        {"study": group.study, "arm": run.arm, "seed": run.seed, "stage": phase.name, **row}
        for group in comparison.groups
        for run in group.runs
        for phase in run.phases
        for row in phase.history
    ]
    _write_csv(path, rows)


def curve(phases: Sequence[Phase], figure: str) -> tuple[list[int], list[list[float]]]:
    """``figure`` over the steps at which all ``phases`` were evaluated: one list for each phase.

    A phase that a stopping rule ended keeps its last value from there on.
    """
    rows = [{int(row["step"]): row[figure] for row in phase.history} for phase in phases]
    ends = [phase.steps for phase in phases]
    steps = [
        step
        for step in sorted(set().union(*rows))
        if all(step in row or step > end for row, end in zip(rows, ends, strict=True))
    ]
    values = [[row[min(step, end)] for step in steps] for row, end in zip(rows, ends, strict=True)]
    return steps, values


def _steps_to(runs: Sequence[Run], target: float) -> tuple[int | None, int]:
    reached = [run.steps_to(target) for run in runs]
    # median_high: an actual seed's count, and infinite when half of the seeds never get there.
    median = statistics.median_high(math.inf if step is None else step for step in reached)
    count = sum(step is not None for step in reached)
    return (None if math.isinf(median) else int(median)), count


def _write_csv(path: Path, rows: Sequence[dict[str, object]]) -> None:
    names = list(dict.fromkeys(name for row in rows for name in row))
    with replacing(path) as unfinished, unfinished.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, names, restval="")
        writer.writeheader()
        writer.writerows(rows)
