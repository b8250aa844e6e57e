"""``fsp-distill`` as people run it."""

from __future__ import annotations

import json
import re
import signal
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from fsp_kernels.distill.commands import app


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(
        app, [str(argument) for argument in arguments], catch_exceptions=False
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a study, of one seed and the arms baseline-long and two-stage."""
    from distill.studies import TINY_RECIPE

    recipe = tmp_path_factory.mktemp("commands") / "tiny.yaml"
    recipe.write_text(TINY_RECIPE)
    folder = recipe.parent / "out"
    arms = "arms=[baseline-long, two-stage]"
    result = invoke("study", recipe, "seeds=[3]", arms, "stage1.steps=4", "--output", folder)
    assert result.exit_code == 0, result.output
    assert "report: " in result.output
    assert "seed 3: validation accuracy" in result.output
    return folder


def test_study_writes_a_run_folder_and_says_where(finished: Path) -> None:
    assert {path.name for path in finished.iterdir()} == {
        ".lock",
        "baseline-long",
        "config.yaml",
        "curves.csv",
        "figures",
        "metrics.json",
        "report.html",
        "report.md",
        "runs.csv",
        "teacher",
        "tensorboard",
        "two-stage",
    }
    events = {path.parent.name for path in finished.glob("tensorboard/*/events*")}
    assert events == {
        "baseline-long-seed-3-task",
        "teacher-task",
        "two-stage-seed-3-stage-1",
        "two-stage-seed-3-stage-2",
    }


def test_a_finished_run_keeps_no_checkpoints_and_nothing_unfinished(finished: Path) -> None:
    names = {path.name for path in finished.rglob("*")}
    assert "checkpoints" not in names
    assert not any("unfinished" in name for name in names)


def test_a_finished_study_is_left_as_it_is_and_says_what_restart_would_cost(
    recipe: Path,
) -> None:
    command = ["study", recipe, "seeds=[3]", "arms=[baseline]", "-o", recipe.parent / "out"]
    invoke(*command)
    model = recipe.parent / "out" / "baseline" / "seed-3" / "model.safetensors"
    before = model.stat().st_mtime_ns
    result = invoke(*command)
    assert result.exit_code == 0
    assert model.stat().st_mtime_ns == before
    told = r"nothing was trained; --restart trains it again, which took \d\.\d s of steps"
    assert re.search(told, result.output)
    assert "nothing was trained" not in invoke(*command, "--restart").output
    assert model.stat().st_mtime_ns > before


def test_train_does_not_mind_what_else_the_folder_holds(recipe: Path) -> None:
    folder = recipe.parent / "out"
    assert invoke("train", recipe, "--arm", "baseline", "-o", folder).exit_code == 0
    more = ["train", recipe, "stage2.steps=3", "-o", folder]
    assert invoke(*more, "--arm", "baseline-long").exit_code == 0
    refused = invoke(*more, "--arm", "baseline")
    assert refused.exit_code == 2
    assert "trained under other settings than these: stage2.steps; --restart" in refused.stderr


def test_train_trains_one_student_and_reports_on_it(recipe: Path) -> None:
    folder = recipe.parent / "out"
    result = invoke("train", recipe, "--arm", "kd", "--seed", 5, "-o", folder)
    assert result.exit_code == 0, result.output
    run = folder / "kd" / "seed-5"
    assert {"model.safetensors", "run.json", "report.md", "report.html"} <= {
        path.name for path in run.iterdir()
    }
    assert f"weights: {run / 'model.safetensors'}" in result.output


def test_teacher_trains_the_teacher_alone(recipe: Path) -> None:
    folder = recipe.parent / "out"
    assert invoke("teacher", recipe, "-o", folder).exit_code == 0
    assert {path.name for path in folder.iterdir()} == {
        ".lock",
        "config.yaml",
        "teacher",
        "tensorboard",
    }
    assert "accuracy 32.75%, finished earlier" in invoke("train", recipe, "-o", folder).output


def test_the_run_folder_is_named_after_the_recipe(
    recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(recipe.parent)
    assert invoke("teacher", recipe).exit_code == 0
    assert Path("runs/tiny/teacher/model.safetensors").is_file()


def test_compare_draws_runs_together(finished: Path, tmp_path: Path) -> None:
    folders = [finished / arm / "seed-3" for arm in ("baseline-long", "two-stage")]
    result = invoke("compare", *folders, "-o", tmp_path / "together")
    assert result.exit_code == 0, result.output
    groups = json.loads((tmp_path / "together" / "metrics.json").read_text())["groups"]
    assert [group["arm"] for group in groups] == ["teacher", "baseline-long", "two-stage"]


def test_compare_of_a_folder_without_runs_is_an_error(tmp_path: Path) -> None:
    result = invoke("compare", tmp_path, "-o", tmp_path / "together")
    assert result.exit_code == 2
    assert "holds no finished run" in result.stderr


def test_export_writes_weights_and_program(finished: Path) -> None:
    run = finished / "two-stage" / "seed-3"
    result = invoke("export", run)
    assert result.exit_code == 0, result.output
    paths = result.output.split()
    assert [Path(path).name for path in paths] == ["model.safetensors", "model.pt2", "model.json"]
    assert all(Path(path).is_file() for path in paths)


def test_inspect_prints_paths_shapes_and_pairs_that_fit() -> None:
    command = ["inspect", "cifar/resnet8", "--teacher", "cifar/resnet14", "--input", "1x8x8"]
    result = invoke(*command)
    assert result.exit_code == 0, result.output
    assert "fits" in result.output
    module = r"stage2\.0\.relu1 +ReLU +32x4x4"
    assert not re.search(module, result.output)
    everything = invoke(*command, "--modules").output
    assert everything.startswith(result.output)
    assert len(re.findall(module, everything)) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["cifar/resnet9"], "cifar/resnet9"),
        (["cifar/resnet8", "--input", "3x32"], "3x32"),
        (["cifar/resnet8", "--input", "3x99999999x99999999"], "each from 1 to 1024"),
        (["cifar/resnet8", "--input", f"{'9' * 5000}x1x1"], "each from 1 to 1024"),
        (["cifar/resnet8", "--classes", "100001"], "less than or equal to 100000"),
        (["cifar/resnet99999998"], "at most 1202"),
        (["torchvision/resnet19"], "did you mean"),
    ],
)
def test_inspect_refuses_what_it_cannot_make(arguments: list[str], message: str) -> None:
    result = invoke("inspect", *arguments)
    assert result.exit_code == 2
    assert message in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["stage1.learing_rate=3"], "stage1.learing_rate: unknown key; did you mean 'learning"),
        (["student.model=cifar/resnet7"], "student.model: "),
        (["student.arguments={width: 2}"], "pairs.0: the student's FSP matrix is 32 x 32"),
        (["data.teacher_images=900"], "data.teacher_images: is 900, must be at most 797"),
        (["nonsense"], "'nonsense': an override is written section.key=value"),
    ],
)
@pytest.mark.parametrize("command", ["study", "train", "teacher"])
def test_bad_input_ends_with_code_2_one_line_and_nothing_changed(
    recipe: Path, command: str, arguments: list[str], message: str
) -> None:
    result = invoke(command, recipe, *arguments, "-o", recipe.parent / "out")
    assert result.exit_code == 2
    assert message in result.stderr
    assert "Traceback" not in result.output
    assert len(result.stderr.strip().splitlines()) == 1
    assert sorted(path.name for path in recipe.parent.iterdir()) == ["tiny.yaml"]


def test_signals_are_as_they_were_after_a_command(recipe: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    invoke("train", recipe, "--arm", "baseline", "-o", recipe.parent / "out")
    assert signal.getsignal(signal.SIGTERM) == before


def test_an_unknown_arm_is_refused_before_anything_changes(recipe: Path) -> None:
    result = invoke("train", recipe, "--arm", "baselin", "-o", recipe.parent / "out")
    assert result.exit_code == 2
    assert "did you mean 'baseline'" in re.sub(r"[\s│]+", " ", result.stderr)
    assert not (recipe.parent / "out").exists()


@pytest.mark.parametrize("command", ["teacher", "train", "study"])
def test_help_tells_of_recipes_overrides_resuming_and_the_run_folder(command: str) -> None:
    text = invoke(command, "--help").output
    for word in ("CONFIG", "KEY=VALUE", "runs/NAME", "--resume", "--restart"):
        assert word in text
