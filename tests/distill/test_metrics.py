"""The numbers of a comparison, by hand, and the files they are written to."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from fsp_kernels.distill import metrics
from fsp_kernels.distill.compare import Comparison, Run
from fsp_kernels.distill.train import Phase


def run_of(*accuracies: float, seconds: float = 1.0) -> Run:
    """A run evaluated every ten steps."""
    history = [{"step": 10 * i, "accuracy": a, "loss": 0.5} for i, a in enumerate(accuracies)]
    return Run("baseline", 0, 7, None, Phase(history, seconds))


def test_a_summary_is_mean_and_sample_deviation_of_the_last_accuracies() -> None:
    row = metrics.summarise([run_of(0.9, 0.5, seconds=1), run_of(0.1, 0.7, seconds=3)], [])
    assert row.accuracy == pytest.approx(0.6)
    assert row.spread == pytest.approx(0.02**0.5)
    assert (row.runs, row.parameters, row.task_steps, row.stage1_steps) == (2, 7, 10, 0)
    assert row.seconds == 2


def test_one_seed_has_no_spread() -> None:
    assert metrics.summarise([run_of(0.5)], []).spread is None


def test_steps_to_an_accuracy_are_the_median_seeds() -> None:
    runs = [run_of(0.0, 0.5, 0.9), run_of(0.0, 0.2, 0.5), run_of(0.0, 0.1, 0.2)]
    row = metrics.summarise(runs, [0.2, 0.5, 0.9, 1.0])
    assert row.steps_to == {0.2: (10, 3), 0.5: (20, 2), 0.9: (None, 1), 1.0: (None, 0)}


def test_gains_are_paired_by_seed(compared: tuple[Comparison, Path]) -> None:
    comparison, _ = compared
    ours, theirs = comparison.of("distilled"), comparison.of("baseline-long")
    assert metrics.gains(comparison, "baseline-long") == [
        ours[0].accuracy - theirs[0].accuracy,
        ours[1].accuracy - theirs[1].accuracy,
    ]


def test_json_holds_everything(compared: tuple[Comparison, Path], tmp_path: Path) -> None:
    comparison, _ = compared
    metrics.write_json(comparison, {"python": "3"}, tmp_path / "m.json")
    tree = json.loads((tmp_path / "m.json").read_text())
    assert tree["config"]["stage1"]["steps"] == 8
    assert tree["environment"] == {"python": "3"}
    assert list(tree["summary"]) == ["teacher", "baseline", "baseline-long", "distilled"]
    for stored, run in zip(tree["runs"], comparison.runs, strict=True):
        assert stored["task"]["history"] == run.task.history


def test_csv_files_have_a_line_per_network_and_per_evaluation(
    compared: tuple[Comparison, Path], tmp_path: Path
) -> None:
    comparison, _ = compared
    metrics.write_runs_csv(comparison, tmp_path / "runs.csv")
    metrics.write_curves_csv(comparison, tmp_path / "curves.csv")
    with (tmp_path / "runs.csv").open() as file:
        runs = list(csv.DictReader(file))
    with (tmp_path / "curves.csv").open() as file:
        curves = list(csv.DictReader(file))
    assert [row["arm"] for row in runs[:4]] == ["teacher", "baseline", "baseline-long", "distilled"]
    assert [float(row["accuracy"]) for row in runs[1:]] == [r.accuracy for r in comparison.runs]
    assert (runs[3]["stage1_steps"], runs[3]["task_steps"]) == ("8", "6")
    assert runs[3]["steps_to_1"] == ""
    stage1 = [row for row in curves if row["phase"] == "stage1" and row["seed"] == "1"]
    assert [row["step"] for row in stage1] == ["0", "4", "8"]
    assert stage1[0]["accuracy"] == ""
    assert float(stage1[2]["fsp_loss"]) < float(stage1[0]["fsp_loss"])
