"""The recipe: shipped files are valid, files and combinations that make no sense are refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from fsp_kernels.distill.config import Config, dump_config, load_config
from fsp_kernels.distill.errors import DistillError

CONFIGS = Path(__file__).parents[2] / "configs"
RECIPES = sorted(CONFIGS.glob("*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_shipped_recipes_are_valid_and_quote_the_test_split(path: Path) -> None:
    config = load_config(path)
    assert config.name == path.stem
    assert config.evaluation.split == "test"
    assert len(config.seeds) >= 3


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_shipped_recipes_compare_two_stages_with_as_many_steps_on_the_task(path: Path) -> None:
    assert {"baseline-long", "two-stage"} <= set(load_config(path).arms)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_shipped_recipes_say_which_section_they_follow_and_where_they_depart(path: Path) -> None:
    header = path.read_text().split("seeds:")[0]
    assert "section" in header
    assert "Departs" in header
    assert f"fsp-distill study configs/{path.name}" in header


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


PAIR = "pairs=[{{student: [a, b], teacher: [a, b], {}}}]"


@pytest.mark.parametrize("given", ["1", "-1", "null"])
def test_a_pair_says_where_its_channels_are(recipe: Path, given: str) -> None:
    [pair] = load_config(recipe, [PAIR.format(f"channel_dim: {given}")]).pairs
    assert pair.channel_dim == {"1": 1, "-1": -1, "null": None}[given]


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("stage1.learning_rate=0", r"stage1\.learning_rate: is 0, must be more than 0"),
        ("stage2.momentum=1", r"stage2\.momentum: is 1, must be less than 1"),
        ("stage2.milestones=[0.5,2]", r"stage2\.milestones\.1: is 2, must be at most 1"),
        ("stage1.optimizer=sdg", r"stage1\.optimizer: is 'sdg', .*; did you mean 'sgd'"),
        ("evaluation.split=train", r"evaluation\.split: is 'train', must be one of 'validation'"),
        ("checkpoints.keep=1", r"checkpoints\.keep: is 1, must be at least 2"),
        ("name=a/b", r"name: is 'a/b', must be a folder name"),
        ("seeds=[1,1]", r"seeds: is \[1, 1\], must not hold one twice"),
        ("arms=[kd,kd]", r"arms: is \['kd', 'kd'\], must not hold one twice"),
        ("arms=[kdd]", r"arms\.0: is 'kdd', must be one of 'baseline', .*; did you mean 'kd'"),
        (PAIR.format("channel_dim: 2"), r"pairs\.0\.channel_dim: is 2, must be at most 1"),
        (PAIR.format("channel_dim: 0"), r"pairs\.0\.channel_dim: is 0, must be 1 or -1"),
        (PAIR.format("channel_dim: true"), r"pairs\.0\.channel_dim: is True, must be a whole"),
        (
            PAIR.format("channels: last"),
            r"pairs\.0\.channels: unknown key; did you mean 'channel_d",
        ),
        ("pairs=automatic", r"pairs: is 'automatic', must be one of 'auto' or 'family'"),
        ("data.batch_size=41", r"data\.batch_size: is 41, must be at most data\.train_images"),
        ("data.teacher_images=39", r"data\.train_images: is 40, must be at most data\.teacher"),
    ],
)
def test_values_out_of_range_are_refused(recipe: Path, assignment: str, message: str) -> None:
    with pytest.raises(DistillError, match=message):
        load_config(recipe, [assignment])


@pytest.mark.parametrize(
    ("assignments", "message"),
    [
        (["stage1.epochs=3"], "stage1: must have steps or epochs, one of the two"),
        (["stage2.steps=null"], "stage2: must have steps or epochs, one of the two"),
        (["teacher_training=null"], "teacher_training: missing; a teacher needs it, or else"),
        (["data.root=/images"], "data.root: digits has none"),
        (["data.arguments={size: 3}"], "data.arguments: digits has none"),
        (["data.corrupt=skip"], "data.corrupt: digits has none"),
        (["data.dataset=mine:splits", "data.root=/images"], "data.root: mine:splits has none"),
        (["data.dataset=digit"], "data.dataset: is 'digit', must be .* did you mean 'digits'"),
        (["data.dataset=cifar10"], "data.root: missing; the folder that cifar10 is in"),
        (
            ["data.dataset=imagefolder", "data.root=x", "data.download=true"],
            "data.download: imagefolder has none",
        ),
        (
            ["fsp.cache_teacher=true", "data.augment=true"],
            "fsp.cache_teacher: is true, must be false while data.augment is true",
        ),
        (
            ["execution.accumulation=3"],
            r"data.batch_size: is 20, must be a multiple of execution.accumulation \(3\)",
        ),
        (
            ["source={data: {dataset: cifar10}, training: {steps: 1, learning_rate: 1}}"],
            "source.data.root: missing",
        ),
        (
            [
                "source={data: {dataset: mnist5k}, training: {steps: 1, learning_rate: 1}}",
                "teacher_training=null",
            ],
            "teacher_training: missing; the source is trained on before it",
        ),
    ],
)
def test_combinations_that_make_no_sense_are_refused(
    recipe: Path, assignments: list[str], message: str
) -> None:
    with pytest.raises(DistillError, match=message):
        load_config(recipe, assignments)


def test_an_error_names_the_file_and_the_line_unless_an_override_made_it(recipe: Path) -> None:
    text = recipe.read_text().replace("{steps: 8, ", "{steps: 0, ")
    recipe.write_text(text)
    line = 1 + text[: text.index("stage1:")].count("\n")
    with pytest.raises(DistillError) as caught:
        load_config(recipe, ["stage2.steps=-1", "data.batch_size=1e3"])
    assert str(caught.value).splitlines() == [
        "data.batch_size: is 1000.0, must be a whole number",
        f"{recipe}, line {line}: stage1.steps: is 0, must be at least 1",
        "stage2.steps: is -1, must be at least 1",
    ]


def test_an_error_about_several_keys_names_the_line_too(recipe: Path) -> None:
    text = recipe.read_text().replace("batch_size: 20", "batch_size: 41")
    recipe.write_text(text)
    line = 1 + text[: text.index("data:")].count("\n")
    with pytest.raises(DistillError, match=f"^{recipe}, line {line}: data.batch_size: is 41, must"):
        load_config(recipe)


@pytest.mark.parametrize(
    "assignment",
    [
        "stage1.steps=" + "9" * 31,
        "stage1.steps=" + "9" * 400,
        "stage1.learning_rate=" + "9" * 400,
        "stage1.learning_rate=1e400",
        "stage1.learning_rate=1e39",
        "stage2.epochs=1000000000",
        "execution.threads=100000000",
        "data.workers=100000",
        "data.image_size=100000",
        "data.batch_size=99999999999",
        "checkpoints.keep=1000000000000",
        "evaluation.every=1000000000000",
        "kd.temperature=1e300",
        "teacher_seed=" + "9" * 100,
        "name=" + "x" * 101,
        "data.root=" + "x" * 5000,
        "student.model=" + "x" * 5000,
    ],
)
def test_a_value_that_cannot_be_meant_is_refused_in_few_words(
    recipe: Path, assignment: str
) -> None:
    key = assignment.partition("=")[0].replace(".", r"\.")
    with pytest.raises(DistillError, match=f"^{key}: is .*, must be ") as caught:
        load_config(recipe, [assignment])
    assert len(str(caught.value)) < 300


def test_a_teacher_that_comes_trained_needs_no_training(recipe: Path) -> None:
    config = load_config(recipe, ["teacher_training=null", "teacher.weights=teacher.safetensors"])
    assert config.teacher_training is None


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
