"""Runs found in folders, and who is grouped with whom."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from distill.report.made_up import keep, keep_matrices, recipe, run_of
from fsp_kernels.distill.errors import DistillError
from fsp_kernels.distill.report.comparison import gather


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
    assert [g.arm for g in found.teachers] == ["source", "teacher"]
    assert [g.arm for g in found.students] == ["baseline", "two-stage", "kd"]


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


def test_studies_are_kept_apart_in_the_order_given(tmp_path: Path) -> None:
    for study in ("a", "b"):
        keep(run_of("baseline"), tmp_path / study)
    found = gather([tmp_path / "b", tmp_path / "a"])
    assert [group.study for group in found.groups] == ["b", "a"]
    assert found.groups[0].title == "b: baseline, stage 2's steps"


def test_a_single_study_is_not_named_in_titles(tmp_path: Path) -> None:
    keep(run_of("kd"), tmp_path)
    assert gather([tmp_path]).groups[0].title == "soft targets"


def test_studies_of_one_name_are_told_apart_by_their_parents(tmp_path: Path) -> None:
    folders = [tmp_path / parent / "study" for parent in ("x", "y")]
    for folder in folders:
        keep(run_of("baseline"), folder)
    assert list(gather(folders).configs) == ["x/study", "y/study"]


def test_studies_that_cannot_be_told_apart_are_refused(tmp_path: Path) -> None:
    folders = [tmp_path / parent / "x" / "study" for parent in ("1", "2")]
    for folder in folders:
        keep(run_of("baseline"), folder)
    with pytest.raises(DistillError, match=r"2/x/study: have equal names; rename a folder"):
        gather(folders)


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


def test_targets_are_those_of_all_recipes(tmp_path: Path) -> None:
    keep(run_of(), tmp_path / "a")
    keep(run_of(recipe=recipe(evaluation={"targets": [0.9, 0.5]})), tmp_path / "b")
    assert gather([tmp_path]).targets == [0.5, 0.9]
