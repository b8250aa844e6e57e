"""``fsp-distill`` as people run it."""

from __future__ import annotations

import json
import re
import signal
from pathlib import Path

import pytest
from studies import TINY_RECIPE
from typer.testing import CliRunner, Result

from fsp_kernels.distill.commands import app


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(app, list(map(str, arguments)), catch_exceptions=False)


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a study, of one seed and the arms baseline-long and two-stage."""
    recipe = tmp_path_factory.mktemp("commands") / "tiny.yaml"
    recipe.write_text(TINY_RECIPE)
    folder = recipe.parent / "out"
    arms = "arms=[baseline-long, two-stage]"
    result = invoke("study", recipe, "seeds=[3]", arms, "stage1.steps=4", "--output", folder)
    assert result.exit_code == 0, result.output
    assert "report: " in result.output
    assert "seed 3: validation accuracy" in result.output
    return folder


def test_study_writes_a_run_folder_without_checkpoints_and_unfinished_files(finished: Path) -> None:
    files = ["config.yaml", "curves.csv", "metrics.json", "report.html", "report.md", "runs.csv"]
    folders = ["baseline-long", "figures", "teacher", "tensorboard", "two-stage"]
    assert names_in(finished) == {".lock", *files, *folders}
    assert {path.parent.name for path in finished.glob("tensorboard/*/events*")} == {
        "baseline-long-seed-3-task",
        "teacher-task",
        "two-stage-seed-3-stage-1",
        "two-stage-seed-3-stage-2",
    }
    assert not [x for x in finished.rglob("*") if "checkpoints" in x.name or "unfini" in x.name]


def test_a_finished_study_is_left_as_it_is_and_says_what_restart_would_cost(recipe: Path) -> None:
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
    folder, handler = recipe.parent / "out", signal.getsignal(signal.SIGTERM)
    result = invoke("train", recipe, "--arm", "kd", "--seed", 5, "-o", folder)
    assert result.exit_code == 0, result.output
    run = folder / "kd" / "seed-5"
    assert {"model.safetensors", "run.json", "report.md", "report.html"} <= names_in(run)
    assert f"weights: {run / 'model.safetensors'}" in result.output
    assert signal.getsignal(signal.SIGTERM) == handler


def test_teacher_trains_the_teacher_alone_in_a_folder_named_after_the_recipe(
    recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(recipe.parent)
    assert invoke("teacher", recipe).exit_code == 0
    assert names_in(Path("runs/tiny")) == {".lock", "config.yaml", "teacher", "tensorboard"}
    assert Path("runs/tiny/teacher/model.safetensors").is_file()
    assert "accuracy 32.75%, finished earlier" in invoke("train", recipe).output


def test_compare_draws_runs_together(finished: Path, tmp_path: Path) -> None:
    folders = [finished / arm / "seed-3" for arm in ("baseline-long", "two-stage")]
    result = invoke("compare", *folders, "-o", tmp_path / "together")
    assert result.exit_code == 0, result.output
    groups = json.loads((tmp_path / "together" / "metrics.json").read_text())["groups"]
    assert [group["arm"] for group in groups] == ["teacher", "baseline-long", "two-stage"]


def test_export_writes_weights_and_program(finished: Path) -> None:
    result = invoke("export", finished / "two-stage" / "seed-3")
    assert result.exit_code == 0, result.output
    paths = list(map(Path, result.output.split()))
    assert [path.name for path in paths] == ["model.safetensors", "model.pt2", "model.json"]
    assert all(path.is_file() for path in paths)


def test_inspect_prints_pairs_that_fit_and_modules_where_asked_for() -> None:
    command = ["inspect", "cifar/resnet8", "--teacher", "cifar/resnet14", "--input", "1x8x8"]
    result = invoke(*command)
    assert result.exit_code == 0, result.output
    assert "fits" in result.output
    everything = invoke(*command, "--modules").output
    assert everything.startswith(result.output)
    modules = r"stage2\.0\.relu1 +ReLU +32x4x4"
    assert [len(re.findall(modules, text)) for text in (result.output, everything)] == [0, 2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["inspect", "cifar/resnet9"], "cifar/resnet9"),
        (["inspect", "cifar/resnet8", "--input", "3x32"], "3x32"),
        (["inspect", "cifar/resnet8", "--input", "3x99999999x99999999"], "each from 1 to 1024"),
        (["inspect", "cifar/resnet8", "--classes", "100001"], "100000"),
        (["compare", "."], "holds no finished run"),
        (["train", "tiny.yaml", "--arm", "baselin"], "'baselin' is not one of 'baseline'"),
    ],
)
def test_a_wrong_argument_ends_with_code_2(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    monkeypatch.chdir(recipe.parent)
    result = invoke(*arguments)
    assert result.exit_code == 2
    assert message in re.sub(r"[\s│]+", " ", result.stderr)
    assert names_in(recipe.parent) == {"tiny.yaml"}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("stage1.learing_rate=3", "stage1.learing_rate: unknown key; did you mean 'learning"),
        ("student.model=cifar/resnet7", "student.model: "),
        ("student.arguments={width: 2}", "pairs.0: the student's FSP matrix is 32 x 32"),
        ("data.teacher_images=900", "data.teacher_images: is 900, must be at most 797"),
        ("data.batch_size=41", "data.batch_size: "),
        (
            "pairs=[{student: [conv, fc], teacher: [conv, fc], channel_dim: 0}]",
            "channel_dim: got 0",
        ),
        ("nonsense", "'nonsense': an override is written section.key=value"),
    ],
)
@pytest.mark.parametrize("command", ["study", "train", "teacher"])
def test_a_wrong_recipe_ends_with_code_2_one_line_and_nothing_changed(
    recipe: Path, command: str, override: str, message: str
) -> None:
    result = invoke(command, recipe, override, "-o", recipe.parent / "out")
    assert result.exit_code == 2
    assert message in result.stderr
    assert "Traceback" not in result.output
    assert len(result.stderr.strip().splitlines()) == 1
    assert names_in(recipe.parent) == {"tiny.yaml"}


@pytest.mark.parametrize("command", ["teacher", "train", "study"])
def test_help_tells_of_recipes_overrides_resuming_and_the_run_folder(command: str) -> None:
    text = invoke(command, "--help").output
    for word in ("CONFIG", "KEY=VALUE", "runs/NAME", "--resume", "--restart"):
        assert word in text
