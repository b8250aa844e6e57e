"""Runs found in folders, how they are grouped, and statistics against numbers worked by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from made_up_runs import (
    fsp_phase,
    keep,
    keep_matrices,
    recipe,
    results_of,
    run_of,
    task_phase,
)
from scipy.stats import ttest_rel

from fsp_kernels.distill.records import Phase
from fsp_kernels.distill.report.results import Group, Results, gather
from fsp_kernels.errors import DistillError


def test_runs_of_one_arm_are_one_group_in_the_order_of_seeds(tmp_path: Path) -> None:
    for seed in (10, 2, 1):
        keep(run_of("baseline", seed), tmp_path)
    [group] = gather([tmp_path]).groups
    assert [run.seed for run in group.runs] == [1, 2, 10]


def test_groups_are_source_and_teacher_and_then_the_arms(tmp_path: Path) -> None:
    for arm in ("kd", "teacher", "two-stage", "source", "baseline"):
        keep(run_of(arm), tmp_path)
    found = gather([tmp_path])
    assert [g.arm for g in found.groups] == ["source", "teacher", "baseline", "two-stage", "kd"]
    assert [g.arm for g in found.students] == ["baseline", "two-stage", "kd"]
    assert found.groups[-1].title == "soft targets"  # a single study is not named


def test_a_students_run_brings_its_teachers(tmp_path: Path) -> None:
    keep(run_of("teacher"), tmp_path)
    keep(run_of("baseline"), tmp_path)
    folder = keep(run_of("two-stage"), tmp_path)
    assert [group.arm for group in gather([folder]).groups] == ["teacher", "two-stage"]


def test_a_folder_given_twice_counts_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = keep(run_of("baseline"), tmp_path)
    monkeypatch.chdir(tmp_path)
    [group] = gather([tmp_path, Path("baseline"), folder]).groups
    assert len(group.runs) == 1


def test_a_run_that_was_moved_is_of_the_folder_it_is_in(tmp_path: Path) -> None:
    keep(run_of("baseline"), tmp_path / "study").rename(tmp_path / "moved")
    [group] = gather([tmp_path / "moved"]).groups
    assert group.study == tmp_path.name


@pytest.mark.parametrize(
    ("folders", "names"),
    [
        (["b", "a"], ["b", "a"]),
        (["x/study", "y/study"], ["x/study", "y/study"]),
        (["1/x/study", "2/x/study"], ["1/x/study", "2/x/study"]),
    ],
)
def test_studies_have_different_names_in_the_order_given(
    tmp_path: Path, folders: list[str], names: list[str]
) -> None:
    for folder in folders:
        keep(run_of("kd"), tmp_path / folder)
    found = gather([tmp_path / folder for folder in folders])
    assert list(found.configs) == [group.study for group in found.groups] == names
    assert found.groups[0].title == f"{names[0]}: soft targets"


def test_a_folder_without_runs_is_refused_beside_one_with(tmp_path: Path) -> None:
    keep(run_of("baseline"), tmp_path / "study")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DistillError, match="empty: holds no finished run"):
        gather([tmp_path / "study", tmp_path / "empty"])


def test_matrices_are_those_of_the_first_seed_that_has_any(tmp_path: Path) -> None:
    keep(run_of("two-stage", 3), tmp_path)
    for seed in (5, 7):
        keep_matrices(keep(run_of("two-stage", seed), tmp_path), teacher=seed)
    matrices = gather([tmp_path]).groups[0].matrices
    assert matrices is not None
    assert matrices.seed == 5
    assert torch.equal(matrices.tensors["teacher/0"], torch.full((2, 3), 5.0))
    assert matrices.pairs[0].teacher == ("one", "three")


def test_the_recipe_is_the_one_that_most_students_were_trained_by(tmp_path: Path) -> None:
    other = recipe(stage2={"steps": 7, "learning_rate": 0.1})
    keep(run_of("teacher", recipe=other), tmp_path)
    keep(run_of("kd", 0, recipe=other), tmp_path)
    for seed in (0, 1):
        keep(run_of("two-stage", seed), tmp_path)
    assert gather([tmp_path]).configs[tmp_path.name].stage2.steps == 60


def test_the_recipe_of_a_lone_teacher_is_its_own(tmp_path: Path) -> None:
    keep(run_of("teacher", recipe=recipe(name="other")), tmp_path)
    assert gather([tmp_path]).configs[tmp_path.name].name == "other"


def baselines(tmp_path: Path, *each: list[Phase]) -> Results:
    """Runs of one arm that had these phases."""
    for seed, phases in enumerate(each):
        keep(run_of("baseline", seed, phases=phases), tmp_path)
    return gather([tmp_path])


def test_a_summary_is_of_the_last_accuracies_and_the_median_seed(tmp_path: Path) -> None:
    found = baselines(
        tmp_path,
        *(
            [fsp_phase(2.0, 1.0, every=a), task_phase(0.1, last, every=b)]
            for a, b, last in ((30, 10, 0.4), (20, 50, 0.5), (10, 20, 0.9))
        ),
    )
    row = found.summaries[tmp_path.name, "baseline"]
    assert row["accuracy"] == pytest.approx(0.6)
    assert row["spread"] == pytest.approx(0.07**0.5)
    assert (row["network"], row["parameters"], row["runs"]) == ("cifar/resnet8", 75002, 3)
    assert (row["stage1_steps"], row["task_steps"], row["steps"]) == (20, 20, 40)
    assert row["seconds"] == 3.0


@pytest.mark.parametrize(
    ("curves", "expected"),
    [
        # A half of the seeds is not enough for a median.
        ([(0.0, 0.9), (0.0, 0.1)], {0.5: (None, 1), 0.9: (None, 1)}),
        ([(0.0, 0.5, 0.9), (0.0, 0.2, 0.5), (0.0, 0.2)], {0.5: (20, 2), 0.9: (None, 1)}),
        ([(0.0, 0.5), (0.0, 0.5, 0.6)], {0.5: (10, 2), 0.9: (None, 0)}),
    ],
)
def test_steps_to_an_accuracy_are_the_median_seeds(
    tmp_path: Path, curves: list[tuple[float, ...]], expected: dict[float, object]
) -> None:
    targets = recipe(evaluation={"targets": [0.5]}), recipe(evaluation={"targets": [0.9, 0.5]})
    for seed, curve in enumerate(curves):
        phases = [task_phase(*curve)]
        keep(run_of("kd", seed, phases=phases, recipe=targets[0]), tmp_path / "a")
    keep(run_of("teacher", recipe=targets[1]), tmp_path / "b")
    assert gather([tmp_path]).summaries["a", "kd"]["steps_to"] == expected


def test_a_gain_is_of_the_seeds_that_both_have(tmp_path: Path) -> None:
    for seed, accuracy in ((1, 0.5), (2, 0.8)):
        keep(run_of("baseline", seed, accuracy), tmp_path)
    for seed, accuracy in ((0, 0.1), (1, 0.9), (2, 0.6)):
        keep(run_of("kd", seed, accuracy), tmp_path)
    keep(run_of("two-stage", 5), tmp_path)  # has none in common with the baseline
    [gain] = gather([tmp_path]).gains
    assert gain["arm"] == "kd"
    assert gain["each"] == pytest.approx([0.4, -0.2])
    assert gain["mean"] == pytest.approx(0.1)
    assert gain["better"] == 1


def test_gains_are_over_both_baselines_of_the_same_study(tmp_path: Path) -> None:
    for study, arms in (("a", ("baseline", "baseline-long", "two-stage")), ("b", ("two-stage",))):
        for arm in arms:
            keep(run_of(arm), tmp_path / study)
    found = gather([tmp_path]).gains
    assert [(gain["study"], gain["arm"], gain["baseline"]) for gain in found] == [
        ("a", "baseline-long", "baseline"),
        ("a", "two-stage", "baseline"),
        ("a", "two-stage", "baseline-long"),
    ]


def test_the_interval_is_that_of_a_paired_t_test(tmp_path: Path) -> None:
    ours, theirs = [0.95, 0.93, 0.96, 0.94], [0.92, 0.93, 0.91, 0.93]
    [gain] = results_of(tmp_path, {"two-stage": ours, "baseline-long": theirs}).gains
    expected = ttest_rel(ours, theirs).confidence_interval(0.95)
    assert (gain["low"], gain["high"]) == pytest.approx((expected.low, expected.high))


@pytest.mark.parametrize(
    ("ours", "verdict"),
    [
        ([0.95, 0.96, 0.97], "gain"),
        ([0.85, 0.84, 0.83], "loss"),
        ([0.85, 0.96, 0.9], "neither"),
        ([0.95], "neither"),
    ],
)
def test_the_verdict_asks_whether_the_interval_excludes_zero(
    tmp_path: Path, ours: list[float], verdict: str
) -> None:
    found = results_of(tmp_path, {"two-stage": ours, "baseline-long": [0.9, 0.9, 0.9]})
    assert found.gains[0]["verdict"] == verdict


@pytest.mark.parametrize("seeds", [1, 3])
def test_equal_differences_have_no_interval(tmp_path: Path, seeds: int) -> None:
    # 0.9 - 0.8 and 0.8 - 0.7 differ by a rounding error, which is no deviation.
    ours, theirs = [0.9, 0.8, 0.7], [0.8, 0.7, 0.6]
    [gain] = results_of(tmp_path, {"kd": ours[:seeds], "baseline": theirs[:seeds]}).gains
    assert (gain["low"], gain["high"], gain["verdict"]) == (None, None, "neither")


@pytest.mark.parametrize(
    ("other", "expected"),
    [
        # The steps that both were evaluated at.
        (task_phase(0.4, 0.5, every=20), {0: [0.1, 0.4], 20: [0.3, 0.5]}),
        # A seed that a stopping rule ended keeps its last value.
        (task_phase(0.4, 0.5), {0: [0.1, 0.4], 10: [0.2, 0.5], 20: [0.3, 0.5]}),
    ],
)
def test_a_curve_has_a_value_of_each_seed_for_each_step(
    other: Phase, expected: dict[int, list[float]]
) -> None:
    runs = [run_of(seed=i, phases=[p]) for i, p in enumerate((task_phase(0.1, 0.2, 0.3), other))]
    table = Group("study", "baseline", "title", runs, None).curve("accuracy")
    assert dict(zip(table.index, table.to_numpy().tolist(), strict=True)) == expected
