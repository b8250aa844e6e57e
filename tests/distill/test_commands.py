"""``fsp-distill`` as people run it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from fsp_kernels.distill.commands import app


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(
        app, [str(argument) for argument in arguments], catch_exceptions=False
    )


def test_compare_writes_a_run_folder_and_says_where(recipe: Path) -> None:
    folder = recipe.parent / "out"
    result = invoke("compare", recipe, "seeds=[3]", "stage1.steps=4", "--output", folder)
    assert result.exit_code == 0, result.output
    assert "report: " in result.output
    assert "seed 3: validation accuracy" in result.output
    assert {path.name for path in folder.iterdir()} == {
        "checkpoints",
        "config.yaml",
        "curves.csv",
        "figures",
        "metrics.json",
        "report.md",
        "runs.csv",
        "teacher.safetensors",
        "tensorboard",
    }
    report = (folder / "report.md").read_text()
    assert f"fsp-distill compare {recipe} 'seeds=[3]' stage1.steps=4" in report
    events = [path.parent.name for path in folder.glob("tensorboard/*/events*")]
    assert sorted(events) == [
        "baseline-long-seed-3-task",
        "baseline-seed-3-task",
        "distilled-seed-3-stage-1",
        "distilled-seed-3-task",
        "teacher-task",
    ]


def test_running_again_reuses_the_teacher_and_replaces_the_results(recipe: Path) -> None:
    folder = recipe.parent / "out"
    assert invoke("teacher", recipe, "-o", folder).exit_code == 0
    arguments = ("student", recipe, "--seed", 1, "-o", folder)
    assert "reused" in invoke(*arguments).output
    assert "reused" in invoke(*arguments).output
    assert len(list(folder.glob("tensorboard/distilled-seed-1-task/events*"))) == 1


def test_the_run_folder_is_named_after_the_recipe(
    recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(recipe.parent)
    assert invoke("teacher", recipe).exit_code == 0
    assert Path("runs/tiny/teacher.safetensors").is_file()


@pytest.mark.parametrize(
    ("arm", "kept"),
    [
        ("baseline", ["baseline-seed-0"]),
        ("distilled", ["distilled-seed-0", "distilled-seed-0-stage-1"]),
    ],
)
def test_student_trains_one_arm(recipe: Path, arm: str, kept: list[str]) -> None:
    folder = recipe.parent / "out"
    result = invoke("student", recipe, "--arm", arm, "-o", folder)
    assert result.exit_code == 0, result.output
    assert sorted(path.stem for path in (folder / "checkpoints").iterdir()) == kept
    assert (folder / "teacher.safetensors").exists() == (arm == "distilled")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["stage1.learing_rate=3"], "stage1.learing_rate: unknown key; did you mean 'learning"),
        (["student.depth=7"], "student.depth: is 7, must be 6n + 2"),
        (["student.width=2"], "pairs.0: the student's FSP matrix is 32 x 32"),
        (["data.teacher_images=900"], "data.teacher_images: is 900, must be at most 797"),
        (["nonsense"], "'nonsense': an override is written section.key=value"),
    ],
)
def test_bad_input_ends_with_code_2_one_line_and_nothing_changed(
    recipe: Path, arguments: list[str], message: str
) -> None:
    result = invoke("compare", recipe, *arguments, "-o", recipe.parent / "out")
    assert result.exit_code == 2
    assert message in result.stderr
    assert "Traceback" not in result.output
    assert len(result.stderr.strip().splitlines()) == 1
    assert sorted(path.name for path in recipe.parent.iterdir()) == ["tiny.yaml"]


def test_an_unknown_arm_is_refused_before_anything_changes(recipe: Path) -> None:
    result = invoke("student", recipe, "--arm", "baselin", "-o", recipe.parent / "out")
    assert result.exit_code == 2
    assert "did you mean 'baseline'" in re.sub(r"[\s│]+", " ", result.stderr)
    assert not (recipe.parent / "out").exists()


@pytest.mark.parametrize("command", ["teacher", "student", "compare"])
def test_help_tells_of_recipes_overrides_and_the_run_folder(command: str) -> None:
    text = invoke(command, "--help").output
    assert "CONFIG" in text
    assert "KEY=VALUE" in text
    assert "runs/NAME" in text
