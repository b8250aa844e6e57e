"""The recipe: shipped files are valid, files and combinations that make no sense are refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from fsp_kernels.distill.config import Config, dump_config, load_config
from fsp_kernels.distill.errors import DistillError

CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_recipes_are_valid_and_quote_the_test_split(path: Path) -> None:
    config = load_config(path)
    assert config.name == path.stem
    assert config.evaluation.split == "test"
    assert len(config.seeds) >= 5


def test_the_name_is_that_of_the_file_unless_given(recipe: Path) -> None:
    assert load_config(recipe).name == "tiny"
    assert load_config(recipe, ["name=other"]).name == "other"


def test_overrides_win_over_the_file(recipe: Path) -> None:
    config = load_config(recipe, ["student.depth=20", "stage1.steps=3"])
    assert (config.student.depth, config.stage1.steps) == (20, 3)


def test_a_dumped_recipe_reads_back_the_same(config: Config, tmp_path: Path) -> None:
    path = tmp_path / "dumped.yaml"
    path.write_text(dump_config(config))
    assert load_config(path) == config


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("student.depth=9", r"student\.depth: is 9, must be 6n \+ 2"),
        ("student.width=0", r"student\.width: is 0, must be at least 1"),
        ("stage1.learning_rate=0", r"stage1\.learning_rate: is 0\.0, must be more than 0"),
        ("stage2.momentum=1", r"stage2\.momentum: is 1\.0, must be at least 0 and less than 1"),
        ("stage2.milestones=[0.5,2]", r"stage2\.milestones\.1: is 2\.0, must be more than 0 and"),
        ("evaluation.split=train", r"evaluation\.split: is 'train', must be one of 'validation'"),
        ("name=a/b", r"name: is 'a/b', must be a folder name"),
        ("seeds=[1,1]", r"seeds: is \[1, 1\], must not hold a seed twice"),
        ("data.batch_size=41", r"data\.batch_size: is 41, must be at most data\.train_images"),
        ("data.teacher_images=39", r"data\.train_images: is 40, must be at most data\.teacher"),
    ],
)
def test_values_out_of_range_are_refused(recipe: Path, assignment: str, message: str) -> None:
    with pytest.raises(DistillError, match=message):
        load_config(recipe, [assignment])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1, 2]", "must hold keys and values"),
        ("a: [", "not readable as YAML"),
        ("", "is empty|empty"),
    ],
)
def test_a_file_that_holds_no_recipe_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "broken.yaml"
    path.write_text(text)
    with pytest.raises(DistillError, match=message):
        load_config(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DistillError, match=r"nowhere\.yaml: cannot be read: No such file"):
        load_config(tmp_path / "nowhere.yaml")
