"""The numbers of a comparison against numbers worked by hand, and the files they are written to."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
from scipy.stats import ttest_rel

from distill.report.made_up import (
    comparison_of,
    fsp_phase,
    keep,
    recipe,
    run_of,
    task_phase,
)
from fsp_kernels.distill.report import metrics
from fsp_kernels.distill.report.comparison import gather


def test_a_summary_is_mean_and_sample_deviation_of_the_last_accuracies() -> None:
    row = metrics.summarise([run_of(accuracy=0.5), run_of(accuracy=0.7)], [])
    assert row.accuracy == pytest.approx(0.6)
    assert row.spread == pytest.approx(0.02**0.5)
    assert (row.network, row.parameters, row.runs) == ("cifar/resnet8", 75002, 2)


def test_one_seed_has_no_spread() -> None:
    assert metrics.summarise([run_of()], []).spread is None


def test_steps_and_time_are_the_median_seeds() -> None:
    runs = [
        run_of("two-stage", phases=[fsp_phase(2.0, 1.0, every=a), task_phase(0.1, 0.2, every=b)])
        for a, b in ((30, 10), (20, 50), (10, 20))
    ]
    row = metrics.summarise(runs, [])
    assert (row.stage1_steps, row.task_steps, row.steps) == (20, 20, 40)
    assert row.seconds == 3.0


def test_steps_to_an_accuracy_are_the_median_seeds() -> None:
    curves = [(0.0, 0.5, 0.9), (0.0, 0.2, 0.5), (0.0, 0.1, 0.2)]
    runs = [run_of(phases=[task_phase(*curve)]) for curve in curves]
    row = metrics.summarise(runs, [0.2, 0.5, 0.9, 1.0])
    assert row.steps_to == {0.2: (10, 3), 0.5: (20, 2), 0.9: (None, 1), 1.0: (None, 0)}


def test_half_of_the_seeds_are_not_enough_for_a_median_count() -> None:
    runs = [run_of(phases=[task_phase(0.0, last)]) for last in (0.9, 0.1)]
    assert metrics.summarise(runs, [0.5]).steps_to == {0.5: (None, 1)}


def test_a_gain_is_the_mean_of_differences_between_equal_seeds(tmp_path: Path) -> None:
    keep(run_of("baseline", 1, 0.5), tmp_path)
    keep(run_of("baseline", 2, 0.8), tmp_path)
    for seed, accuracy in ((0, 0.1), (1, 0.9), (2, 0.6)):  # no baseline has seed 0
        keep(run_of("kd", seed, accuracy), tmp_path)
    [gain] = metrics.gains(gather([tmp_path]))
    assert gain.each == pytest.approx((0.4, -0.2))
    assert gain.mean == pytest.approx(0.1)
    assert gain.better == 1


def test_runs_without_a_seed_in_common_have_no_gain(tmp_path: Path) -> None:
    keep(run_of("baseline", 1), tmp_path)
    keep(run_of("kd", 2), tmp_path)
    assert metrics.gains(gather([tmp_path])) == []


def test_the_interval_is_that_of_a_paired_t_test(tmp_path: Path) -> None:
    ours, theirs = [0.95, 0.93, 0.96, 0.94], [0.92, 0.93, 0.91, 0.93]
    [gain] = metrics.gains(comparison_of(tmp_path, {"two-stage": ours, "baseline-long": theirs}))
    expected = ttest_rel(ours, theirs).confidence_interval(0.95)
    assert (gain.low, gain.high) == pytest.approx((expected.low, expected.high))


def test_the_interval_of_two_seeds_by_hand(tmp_path: Path) -> None:
    found = comparison_of(tmp_path, {"two-stage": [0.6, 0.8], "baseline-long": [0.5, 0.5]})
    [gain] = metrics.gains(found)
    # Differences 0.1 and 0.3: mean 0.2, standard error 0.1; Student's t at 97.5 % with one degree
    # of freedom is 12.706.
    assert (gain.low, gain.high) == pytest.approx((0.2 - 1.2706, 0.2 + 1.2706), abs=1e-4)


@pytest.mark.parametrize(
    ("ours", "verdict"),
    [
        ([0.95, 0.96, 0.97], "gain"),
        ([0.85, 0.84, 0.83], "loss"),
        ([0.85, 0.96, 0.9], "neither"),
        ([0.95], "neither"),
    ],
)
def test_the_verdict_asks_whether_the_interval_leaves_zero_out(
    tmp_path: Path, ours: list[float], verdict: str
) -> None:
    found = comparison_of(tmp_path, {"two-stage": ours, "baseline-long": [0.9, 0.9, 0.9]})
    assert metrics.gains(found)[0].verdict == verdict


@pytest.mark.parametrize("seeds", [1, 3])
def test_equal_differences_have_no_interval(tmp_path: Path, seeds: int) -> None:
    # 0.9 - 0.8 and 0.8 - 0.7 differ by a rounding error, which is no deviation.
    ours, theirs = [0.9, 0.8, 0.7], [0.8, 0.7, 0.6]
    found = comparison_of(tmp_path, {"kd": ours[:seeds], "baseline": theirs[:seeds]})
    [gain] = metrics.gains(found)
    assert (gain.low, gain.high, gain.verdict) == (None, None, "neither")


def test_gains_are_over_both_baselines_of_the_same_study(tmp_path: Path) -> None:
    for study, arms in (("a", ("baseline", "baseline-long", "two-stage")), ("b", ("two-stage",))):
        for arm in arms:
            keep(run_of(arm), tmp_path / study)
    found = metrics.gains(gather([tmp_path]))
    assert [(gain.study, gain.arm, gain.baseline) for gain in found] == [
        ("a", "baseline-long", "baseline"),
        ("a", "two-stage", "baseline"),
        ("a", "two-stage", "baseline-long"),
    ]


def test_a_curve_is_of_the_steps_that_all_seeds_were_evaluated_at() -> None:
    phases = [task_phase(0.1, 0.2, 0.3, every=10), task_phase(0.4, 0.5, every=20)]
    assert metrics.curve(phases, "accuracy") == ([0, 20], [[0.1, 0.3], [0.4, 0.5]])


def test_a_stopped_seed_keeps_its_last_value() -> None:
    phases = [task_phase(0.1, 0.2, 0.3), task_phase(0.4, 0.5, stopped=True)]
    assert metrics.curve(phases, "accuracy") == ([0, 10, 20], [[0.1, 0.2, 0.3], [0.4, 0.5, 0.5]])


def test_json_holds_summaries_runs_and_gains(tmp_path: Path) -> None:
    found = comparison_of(tmp_path, {"two-stage": [0.95, 0.96], "baseline-long": [0.9, 0.9]})
    metrics.write_json(found, tmp_path / "m.json")
    tree = json.loads((tmp_path / "m.json").read_text())
    long, two_stage = tree["groups"]
    assert long["summary"]["accuracy"] == pytest.approx(0.9)
    assert two_stage["summary"]["steps_to"] == {"0.5": [60, 2]}
    assert [run["config"]["stage1"]["steps"] for run in two_stage["runs"]] == [200, 200]
    [gain] = tree["gains"]
    assert gain["mean"] == pytest.approx(0.055)
    assert (gain["better"], gain["verdict"]) == (2, "neither")


def test_runs_csv_has_a_line_for_each_network(tmp_path: Path) -> None:
    stopped = [fsp_phase(2.0, 1.0, stopped=True), task_phase(0.1, 0.75)]
    keep(run_of("two-stage", 4, phases=stopped), tmp_path / "a")
    keep(run_of("teacher", recipe=recipe(evaluation={"targets": [0.8]})), tmp_path / "b")
    metrics.write_runs_csv(gather([tmp_path]), tmp_path / "runs.csv")
    with (tmp_path / "runs.csv").open() as file:
        student, teacher = csv.DictReader(file)
    assert student == {
        "study": "a",
        "arm": "two-stage",
        "seed": "4",
        "network": "cifar/resnet8",
        "parameters": "75002",
        "stage1_steps": "100",
        "task_steps": "10",
        "stopped": "True",
        "accuracy": "0.75",
        "loss": "0.25",
        "seconds": "3.0",
        "steps_to_0.5": "10",
        "steps_to_0.8": "",
    }
    assert (teacher["study"], teacher["arm"], teacher["steps_to_0.8"]) == ("b", "teacher", "60")


def test_curves_csv_has_a_line_for_each_evaluation(tmp_path: Path) -> None:
    keep(run_of("two-stage", phases=[fsp_phase(4.0, 3.0), task_phase(0.1, 0.2)]), tmp_path)
    metrics.write_curves_csv(gather([tmp_path]), tmp_path / "curves.csv")
    with (tmp_path / "curves.csv").open() as file:
        rows = list(csv.DictReader(file))
    columns = ("stage", "step", "fsp_loss", "accuracy")
    assert [tuple(row[name] for name in columns) for row in rows] == [
        ("stage 1", "0", "4.0", ""),
        ("stage 1", "100", "3.0", ""),
        ("task", "0", "", "0.1"),
        ("task", "10", "", "0.2"),
    ]
