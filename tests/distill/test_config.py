"""Recipes: names and overrides, keys that must fit one another, and lines of errors."""

from __future__ import annotations

from pathlib import Path

import pytest

from fsp_kernels.distill.config import Config, dump_config, load_config
from fsp_kernels.errors import DistillError


def test_the_name_is_that_of_the_file_unless_given(recipe: Path) -> None:
    assert load_config(recipe).name == "tiny"
    assert load_config(recipe, ["name=other"]).name == "other"


def test_overrides_win_over_the_file(recipe: Path) -> None:
    config = load_config(recipe, ["student.model=cifar/resnet20", "stage1.steps=3"])
    assert (config.student.model, config.stage1.steps) == ("cifar/resnet20", 3)


def test_a_dumped_recipe_reads_back_the_same(config: Config, tmp_path: Path) -> None:
    path = tmp_path / "dumped.yaml"
    path.write_text(dump_config(config))
    assert load_config(path) == config


SOURCE = "source={{data: {}, training: {{steps: 1, learning_rate: 1}}}}"


@pytest.mark.parametrize(
    ("assignments", "message"),
    [
        (["stage1.epochs=3"], "stage1: must have steps or epochs, one of the two"),
        (["stage2.steps=null"], "stage2: must have steps or epochs, one of the two"),
        (["teacher_training=null"], "teacher_training: missing; without it, teacher.weights or"),
        (["data.root=/images"], "data.root: digits does not use it"),
        (["data.arguments={size: 3}"], "data.arguments: digits does not use it"),
        (["data.corrupt=skip"], "data.corrupt: digits does not use it"),
        (["data.dataset=mine:x", "data.root=/images"], "data.root: mine:x does not use it"),
        (["data.dataset=digit"], "data.dataset: is 'digit', must be .* did you mean 'digits'"),
        (["data.dataset=cifar10"], "data.root: missing; the folder of cifar10"),
        (
            ["data={dataset: imagefolder, root: x, download: true}"],
            "data.download: imagefolder does not use it",
        ),
        (
            ["fsp.cache_teacher=true", "data.augment=true"],
            "fsp.cache_teacher: is true, must be false while data.augment is true",
        ),
        (
            ["execution.accumulation=3"],
            r"data.batch_size: is 20, must be a multiple of execution.accumulation \(3\)",
        ),
        ([SOURCE.format("{dataset: cifar10}")], "source.data.root: missing"),
        (
            [SOURCE.format("{dataset: mnist5k}"), "teacher_training=null"],
            "teacher_training: missing; the source is trained on before it",
        ),
    ],
)
def test_combinations_that_make_no_sense_are_refused(
    recipe: Path, assignments: list[str], message: str
) -> None:
    with pytest.raises(DistillError, match=message):
        load_config(recipe, assignments)


def test_a_teacher_that_comes_trained_needs_no_training(recipe: Path) -> None:
    config = load_config(recipe, ["teacher_training=null", "teacher.weights=teacher.safetensors"])
    assert config.teacher_training is None


def test_an_error_names_the_file_and_the_line_unless_an_override_made_it(recipe: Path) -> None:
    text = recipe.read_text().replace("{steps: 8, ", "{steps: 0, ").replace("{every: 3}", "{x: 3}")
    recipe.write_text(text)
    stage, checkpoints = (
        1 + text[: text.index(f"\n{section}:") + 1].count("\n")
        for section in ("stage1", "checkpoints")
    )
    with pytest.raises(DistillError) as caught:
        load_config(recipe, ["stage2.steps=-1", "data.batch_size=1e3"])
    assert str(caught.value).splitlines() == [
        "data.batch_size: is 1000.0, must be a whole number",
        f"{recipe}, line {stage}: stage1.steps: is 0, must be greater than or equal to 1",
        "stage2.steps: is -1, must be greater than or equal to 1",
        f"{recipe}, line {checkpoints}: checkpoints.x: unknown key; known here: every",
    ]


def test_an_error_about_several_keys_names_the_line_too(recipe: Path) -> None:
    text = recipe.read_text().replace("{threads: 1}", "{threads: 1, accumulation: 3}")
    recipe.write_text(text)
    line = 1 + text[: text.index("data:")].count("\n")
    with pytest.raises(DistillError, match=f"^{recipe}, line {line}: data.batch_size: is 20, must"):
        load_config(recipe)


def test_an_error_about_a_key_that_is_missing_names_the_line_of_its_section(recipe: Path) -> None:
    text = recipe.read_text().replace("steps: 8, ", "")
    recipe.write_text(text)
    line = 1 + text[: text.index("stage1: {")].count("\n")
    with pytest.raises(DistillError, match=f"^{recipe}, line {line}: stage1: must have steps or"):
        load_config(recipe)
