"""The report's words: what is said of which numbers."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from distill.report.made_up import (
    RECIPE,
    comparison_of,
    fsp_phase,
    keep,
    keep_matrices,
    recipe,
    run_of,
    task_phase,
)
from fsp_kernels.distill.report import text
from fsp_kernels.distill.report.comparison import Comparison, gather


def rows_of(table: str) -> dict[str, list[str]]:
    """The cells of a Markdown table's rows, by the first."""
    lines = [line for line in table.splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]
    return {first: rest for first, *rest in cells}


def test_the_headline_tells_a_gain_over_the_baseline_of_as_many_steps(tmp_path: Path) -> None:
    arms = {"baseline": [0.5, 0.5, 0.5], "baseline-long": [0.9, 0.91, 0.92]}
    found = comparison_of(tmp_path, arms | {"two-stage": [0.94, 0.95, 0.97]})
    assert text.headline(found) == (
        "With 260 optimiser steps each, the test accuracy is 95.3 ± 1.5 % with FSP in two stages "
        "and 91.0 ± 1.0 % with the baseline: a gain of 4.3 points (95 % interval +2.9 to +5.8)."
    )


def test_the_headline_tells_a_loss(tmp_path: Path) -> None:
    arms = {"baseline-long": [0.9, 0.91, 0.92], "two-stage": [0.84, 0.86, 0.86]}
    assert "a loss of 5.7 points (95 % interval −7.1 to −4.2)" in (
        text.headline(comparison_of(tmp_path, arms))
    )


def test_the_headline_tells_that_there_is_no_telling(tmp_path: Path) -> None:
    arms = {"baseline-long": [0.9, 0.91, 0.92], "two-stage": [0.91, 0.91, 0.91]}
    assert "no difference that 3 seeds can tell (0.0 points, 95 % interval −2.5 to +2.5)" in (
        text.headline(comparison_of(tmp_path, arms))
    )


def test_the_headline_makes_nothing_of_one_seed(tmp_path: Path) -> None:
    found = comparison_of(tmp_path, {"baseline-long": [0.9], "two-stage": [0.95]})
    assert text.headline(found).endswith(
        "and 90.0 % with the baseline: +5.0 points, of which one seed can't tell whether it is "
        "chance."
    )


def test_the_headline_makes_nothing_of_equal_differences(tmp_path: Path) -> None:
    found = comparison_of(tmp_path, {"baseline-long": [0.9, 0.8], "two-stage": [0.95, 0.85]})
    assert "+5.0 points with each of 2 seeds, too alike for an interval" in text.headline(found)


def test_a_small_difference_is_not_rounded_to_none(tmp_path: Path) -> None:
    arms = {"baseline-long": [0.9] * 3, "two-stage": [0.9002, 0.9001, 0.90015]}
    assert "a gain of 0.01 points (95 % interval +0.003 to +0.03)" in (
        text.headline(comparison_of(tmp_path, arms))
    )


def test_the_headline_tells_of_unequal_steps(tmp_path: Path) -> None:
    arms = {"baseline": [0.9, 0.91], "two-stage": [0.95, 0.97]}
    assert text.headline(comparison_of(tmp_path, arms)).startswith(
        "The test accuracy is 96.0 ± 1.4 % with FSP in two stages, in 260 optimiser steps, and "
        "90.5 ± 0.7 % with the baseline, in 60: "
    )


def test_the_headline_tells_of_steps_that_stopping_rules_left_out(tmp_path: Path) -> None:
    for seed, every in enumerate((30, 50)):
        for arm in ("baseline-long", "one-stage"):
            phases = [task_phase(0.1, 0.9, every=every if arm == "one-stage" else 60)]
            keep(run_of(arm, seed, phases=phases), tmp_path)
    assert "in 30 to 50 optimiser steps, and 90.0 ± 0.0 % with the baseline, in 60: " in (
        text.headline(gather([tmp_path]))
    )


@pytest.mark.parametrize(
    ("arms", "said"),
    [
        (
            ("baseline", "baseline-long", "kd", "two-stage-kd", "two-stage"),
            "with FSP in two stages and",
        ),
        (
            ("baseline", "baseline-long", "kd", "two-stage-kd"),
            "with FSP in two stages, soft targets in the second and",
        ),
        (("baseline", "baseline-long", "kd"), "with soft targets and"),
        (
            ("baseline", "baseline-long"),
            "with baseline, same total steps, in 260 optimiser steps, and",
        ),
        (("two-stage", "kd"), "test accuracy: FSP in two stages 90.0 %; soft targets 90.0 %"),
        (("teacher",), "test accuracy: teacher 90.0 %"),
    ],
)
def test_the_headline_is_of_the_two_stages_or_of_what_there_is(
    tmp_path: Path, arms: tuple[str, ...], said: str
) -> None:
    found = comparison_of(tmp_path, {"teacher": [0.9]} | {arm: [0.9] for arm in arms})
    assert said in text.headline(found)


def test_each_study_has_a_headline(tmp_path: Path) -> None:
    for study in ("a", "b"):
        comparison_of(tmp_path / study, {"baseline-long": [0.9], "two-stage": [0.95]})
    lines = text.headline(gather([tmp_path])).splitlines()
    assert [line[:20] for line in lines] == ["a: With 260 optimise", "b: With 260 optimise"]


def test_the_table_has_a_row_for_each_group(tmp_path: Path) -> None:
    found = comparison_of(tmp_path, {"teacher": [0.97], "two-stage": [0.6, 0.8]})
    rows = rows_of(text.table(found))
    assert rows[""][4:] == ["steps: stage 1 + task", "task steps to 50 %", "time"]
    assert rows["FSP in two stages"] == [
        "cifar/resnet8",
        "75,002",
        "2",
        "70.0 ± 14.1 %",
        "200 + 60",
        "60",
        "3.0 s",
    ]
    assert rows["teacher"][3:5] == ["97.0 %", "0 + 60"]


@pytest.mark.parametrize(
    ("accuracies", "cell"),
    [([0.6, 0.7], "60"), ([0.1, 0.6], "– (1 of 2)"), ([0.1, 0.2], "–"), ([0.6, 0.6, 0.1], None)],
)
def test_steps_to_an_accuracy_say_how_many_seeds_got_there(
    tmp_path: Path, accuracies: list[float], cell: str | None
) -> None:
    rows = rows_of(text.table(comparison_of(tmp_path, {"baseline": accuracies})))
    assert rows["baseline, stage 2's steps"][5] == (cell or "60 (2 of 3)")


def test_studies_of_different_targets_and_splits_share_a_table(tmp_path: Path) -> None:
    keep(run_of(accuracy=0.9), tmp_path / "a")
    other = {"every": 5, "split": "validation", "targets": [0.995]}
    keep(run_of(accuracy=0.999, recipe=recipe(evaluation=other)), tmp_path / "b")
    table = text.table(gather([tmp_path]))
    rows = rows_of(table)
    assert rows[""][3:7] == [
        "test / validation accuracy",
        "steps: stage 1 + task",
        "task steps to 50 %",
        "task steps to 99.5 %",
    ]
    assert rows["a: baseline, stage 2's steps"][5:7] == ["60", "–"]
    assert rows["b: baseline, stage 2's steps"][5:7] == ["60", "60"]
    assert "evaluated every 5 or 10 steps" in table


@pytest.mark.parametrize(
    ("seconds", "cell"), [(119.94, "119.9 s"), (150.0, "2.5 min"), (9000.0, "2.5 h")]
)
def test_time_is_in_a_unit_that_fits(tmp_path: Path, seconds: float, cell: str) -> None:
    keep(run_of(phases=[task_phase(0.1, 0.2, seconds=seconds)]), tmp_path)
    assert rows_of(text.table(gather([tmp_path])))["baseline, stage 2's steps"][-1] == cell


@pytest.fixture
def compared(tmp_path: Path) -> Comparison:
    arms = {"baseline": [0.5, 0.6, 0.7], "baseline-long": [0.9, 0.91, 0.92]}
    return comparison_of(tmp_path, arms | {"two-stage": [0.94, 0.95, 0.97], "kd": [0.8, 0.9, 1.0]})


def test_differences_are_a_table_of_arms_and_baselines(compared: Comparison) -> None:
    rows = rows_of(text.differences(compared))
    assert rows[""] == [
        "points over *baseline, stage 2's steps*",
        "points over *baseline, same total steps*",
        "FSP loss, before and after",
    ]
    assert rows["baseline, same total steps"] == ["+31.0 (+8.6 to +53.4), 3 of 3: **gain**", "", ""]
    assert rows["FSP in two stages"][1:] == ["+4.3 (+2.9 to +5.8), 3 of 3: **gain**", "400 → 100"]
    assert rows["soft targets"][1:] == ["−1.0 (−23.4 to +21.4), 1 of 3", ""]


def test_what_the_intervals_cannot_tell_is_said(compared: Comparison) -> None:
    said = text.differences(compared)
    assert "with 3 seeds one reaches 2.5 standard deviations" in said  # 4.303 / sqrt(3)
    assert "does not say that there is no difference" in said
    assert "Each of the 5 intervals misses the true mean in 5 % of such studies." in said
    assert "share the teacher, the training images and the evaluated images" in said


def test_one_seed_has_no_interval_and_says_so(tmp_path: Path) -> None:
    said = text.differences(comparison_of(tmp_path, {"baseline": [0.9], "kd": [0.95]}))
    assert rows_of(said)["soft targets"] == ["+5.0 (no interval), 1 of 1"]
    assert "One seed has no interval: any of these differences may be chance." in said
    assert "What the intervals" not in said


def test_the_fsp_loss_is_told_without_a_baseline(tmp_path: Path) -> None:
    rows = rows_of(text.differences(comparison_of(tmp_path, {"two-stage": [0.9]})))
    assert rows == {
        "": ["FSP loss, before and after"],
        "---": ["---"],
        "FSP in two stages": ["400 → 100"],
    }


@pytest.mark.parametrize("arm", ["teacher", "kd"])
def test_nothing_to_compare_makes_no_differences(tmp_path: Path, arm: str) -> None:
    assert text.differences(comparison_of(tmp_path, {arm: [0.9]})) == ""


def test_runs_by_another_recipe_are_named(tmp_path: Path) -> None:
    for seed in (0, 1):
        keep(run_of("two-stage", seed, recipe=recipe(seeds=[seed])), tmp_path)
    keep(
        run_of("two-stage", 2, recipe=RECIPE | {"kd": {"weight": 0.5}, "pairs": "family"}), tmp_path
    )
    assert text.warnings(gather([tmp_path])) == (
        "- **Careful:** FSP in two stages with seed 2 was trained by another recipe than the one "
        "below: `pairs` and `kd` differ."
    )


def test_the_method_tells_stages_and_losses(tmp_path: Path) -> None:
    losses = ["cross-entropy", "soft targets", "FSP loss"]
    keep(run_of("one-stage-kd", phases=[task_phase(0.1, 0.2, losses=losses)]), tmp_path)
    keep(run_of("two-stage"), tmp_path)
    said = text.method(gather([tmp_path]))
    assert "*FSP in two stages*: 200 steps on the FSP loss, then 60 steps on the cross-ent" in said
    assert "10 steps on the cross-entropy, the soft targets and the FSP loss." in said
    assert "same weights and see the same images" in said


def test_the_method_tells_what_stopping_rules_did(tmp_path: Path) -> None:
    for seed, (every, stopped) in enumerate(((30, False), (10, True), (20, True))):
        keep(run_of(seed=seed, phases=[task_phase(0, 1, every=every, stopped=stopped)]), tmp_path)
    assert "10 to 30 steps on the cross-entropy (the stopping rule ended 2 of 3 runs)." in (
        text.method(gather([tmp_path]))
    )


@pytest.mark.parametrize(
    ("images", "said"),
    [
        ({"train_images": 40, "teacher_images": 60}, "on 60 images of digits, the student's among"),
        ({"train_images": 40}, "on all training images of digits, the student's among them"),
        ({"train_images": 40, "teacher_images": 40}, "on the same images."),
        ({"teacher_images": 40}, "on the same images."),
        ({}, "on the same images."),
    ],
)
def test_images_that_only_the_teacher_saw_are_admitted(
    tmp_path: Path, images: dict[str, int], said: str
) -> None:
    data = {"dataset": "digits", "augment": False, **images}
    keep(run_of("two-stage", recipe=recipe(data=data)), tmp_path)
    method = text.method(gather([tmp_path]))
    assert f"The teacher was trained {said}" in method
    assert ("images that the baselines never had any part of" in method) == ("among" in said)


def test_a_student_that_sees_all_of_the_teachers_images_sees_no_more(tmp_path: Path) -> None:
    data = {"dataset": "digits", "teacher_images": 40}
    keep(run_of(recipe=recipe(data=data)), tmp_path)
    assert "The student trains on 40 images of digits, augmented." in (
        text.method(gather([tmp_path]))
    )


def test_the_source_is_told(tmp_path: Path) -> None:
    source = {"data": {"dataset": "mnist5k"}, "training": {"steps": 1, "learning_rate": 0.1}}
    keep(run_of("kd", recipe=recipe(source=source)), tmp_path)
    keep(run_of("source"), tmp_path)
    found = gather([tmp_path])
    assert "on the same images after all training images of mnist5k, augmented." in (
        text.method(found)
    )
    assert "teacher on its source data" in rows_of(text.table(found))


def test_a_teacher_that_came_trained_is_told(tmp_path: Path) -> None:
    teacher = {"model": "cifar/resnet14", "weights": "t.pt"}
    keep(run_of("kd", recipe=recipe(teacher=teacher, teacher_training=None)), tmp_path)
    assert "The teacher came trained." in text.method(gather([tmp_path]))


def test_no_teacher_is_told_of_where_none_had_a_part(tmp_path: Path) -> None:
    assert "teacher" not in text.method(comparison_of(tmp_path, {"baseline": [0.9]}))


def test_the_layers_of_the_matrices_are_told(tmp_path: Path) -> None:
    keep_matrices(keep(run_of("two-stage"), tmp_path), teacher=1.0)
    assert "- FSP matrices: `one` to `two` (the teacher's `one` to `three`)." in (
        text.method(gather([tmp_path]))
    )


def test_each_study_has_its_own_facts_and_recipe(tmp_path: Path) -> None:
    keep(run_of("baseline"), tmp_path / "a")
    keep(run_of("baseline", phases=[task_phase(0, 1, every=7)]), tmp_path / "b_c")
    found = gather([tmp_path])
    assert re.findall(r"^### .*|\d+ steps", text.method(found), re.M) == [
        "### a",
        "60 steps",
        "### b_c",
        "7 steps",
    ]
    assert text.recipes(found).count("```yaml\nname: made-up") == 2


def test_the_environment_is_all_there_was(tmp_path: Path) -> None:
    for seed, device in enumerate(("cpu", "NVIDIA H100", "cpu")):
        keep(run_of(seed=seed, environment={"torch": "2.11", "device": device}), tmp_path)
    rows = rows_of(text.environment(gather([tmp_path])))
    assert rows["torch"] == ["2.11"]
    assert rows["device"] == ["cpu, NVIDIA H100"]


def test_the_fsp_loss_is_a_mean_over_seeds(tmp_path: Path) -> None:
    for seed, losses in enumerate(((6.0, 9.0, 1.0), (4.0, 9.0, 2.0))):
        phases = [fsp_phase(*losses), task_phase(0.1, 0.2)]
        keep(run_of("two-stage", seed, phases=phases), tmp_path)
    assert rows_of(text.differences(gather([tmp_path])))["FSP in two stages"] == ["5 → 1.5"]


def test_names_are_shown_as_they_are(tmp_path: Path) -> None:
    keep(run_of(network="my_nets:_<b>*net*|x_"), tmp_path)
    assert rows_of(text.table(gather([tmp_path])))["baseline, stage 2's steps"][0] == (
        r"my_nets:\_&lt;b&gt;\*net\*\|x\_"
    )
