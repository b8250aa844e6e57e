"""What recipes may hold, and what each refusal says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fsp_kernels.distill.config import Config, Pair, Training, load_config
from fsp_kernels.distill.settings import load_yaml, override, parse_yaml, read, to_tree
from fsp_kernels.errors import DistillError

TRAINING = {"steps": 3, "learning_rate": 0.1}
PAIR = {"student": ["a", "b"], "teacher": ["c", "d"]}
TREE = {
    "name": "x",
    "data": {},
    "teacher": {"model": "m"},
    "teacher_training": TRAINING,
    "student": {"model": "m"},
    "stage1": TRAINING,
    "stage2": TRAINING,
}


def test_what_was_read_can_be_written_and_read_again() -> None:
    given = TREE | {
        "seeds": [3, 1],
        "pairs": [PAIR | {"channel_dim": -1}],
        "student": {"model": "m", "arguments": {"a": [1, {"b": 2}]}},
    }
    config = read(Config, given)
    assert config.stage1 == Training(steps=3, learning_rate=0.1)
    assert config.pairs == (Pair(student=("a", "b"), teacher=("c", "d"), channel_dim=-1),)
    assert (config.stage1.momentum, config.seeds) == (0.9, (3, 1))
    assert config.student.arguments == {"a": [1, {"b": 2}]}
    assert read(Config, to_tree(config)) == config


@pytest.mark.parametrize(
    ("text", "value"),
    [("1", 1.0), ("1e-4", 1e-4), ("+2E3", 2e3), ("3.e1", 30.0), ("0.5", 0.5), (".5", 0.5)],
)
def test_floats_may_be_written_as_people_write_them(text: str, value: float) -> None:
    # YAML 1.1 takes 1e-4 for text.
    training = read(Training, {"steps": 1, "learning_rate": parse_yaml(text, "rate")[0]})
    assert training.learning_rate == value
    assert type(training.learning_rate) is float


@pytest.mark.parametrize(
    ("key", "value", "problem"),
    [
        ("stage1.stpes", 1, r"unknown key; did you mean 'steps'\?"),
        ("stage1.zzz", 1, "unknown key; known here: steps, epochs, optimizer, learning_rate,"),
        ("stage1.nesterov", False, "unknown key; known here: steps"),
        ("stage1.stop", {"patience": 1, "min_delta": 0}, r".*unknown key; known here: patience$"),
        ("checkpoints.keep", 2, "unknown key; known here: every$"),
        ("data.0", 1, "unknown key; known here: dataset"),
        ("pairs", [PAIR | {"wieght": 1}], r".*unknown key; did you mean 'weight'"),
        ("teacher", {}, ".*missing"),
        ("stage1", 3, "is 3, must be a section with the keys steps, epochs"),
        ("stage1.steps", 1.5, r"is 1\.5, must be a whole number"),
        ("stage1.steps", True, "is True, must be a whole number"),
        ("stage1.learning_rate", None, "is empty, must be a valid number"),
        ("stage1.learning_rate", "fast", "is 'fast', must be a valid number"),
        ("stage1.learning_rate", float("nan"), "is nan, must be a finite number"),
        ("stage1.learning_rate", 0, "is 0, must be greater than 0"),
        ("stage1.clip", -1, "is -1, must be greater than 0"),
        ("stage2.momentum", 1, "is 1, must be less than 1"),
        ("stage2.milestones", [0.5, 2], "is 2, must be less than or equal to 1"),
        ("stage1.optimizer", "sdg", "is 'sdg', must be .*; did you mean 'sgd'"),
        ("stage1.optimizer", ["sgd"], r"is \['sgd'\], must be 'sgd'"),
        ("evaluation.split", "train", "is 'train', must be 'validation' or 'test'"),
        ("name", "a/b", "is 'a/b', must be a folder name"),
        ("seeds", 3, "is 3, must be a list"),
        ("seeds", [], r"is \[\], must have at least 1 item"),
        ("seeds", [-1], "is -1, must be greater than or equal to 0"),
        ("seeds", [0, -1], "is -1, must be greater than or equal to 0"),
        ("seeds", [0, "x"], "is 'x', must be a whole number"),
        ("seeds", [1, 1], r"is \[1, 1\], must not hold one twice"),
        ("arms", ["kd", "kd"], r"is \['kd', 'kd'\], must not hold one twice"),
        ("arms", ["kdd"], "is 'kdd', must be 'baseline', .*; did you mean 'kd'"),
        ("pairs", [PAIR | {"student": ["a"]}], ".*missing"),
        ("pairs", [PAIR | {"student": ["a", "b", "c"]}], ".*must have at most 2 items"),
        ("pairs", [PAIR | {"student": ["a", ""]}], ".*is '', must have at least 1 character"),
        ("pairs", [PAIR | {"weight": -1}], ".*is -1, must be greater than or equal to 0"),
        ("pairs", [PAIR | {"channel_dim": 2}], ".*is 2, must be less than or equal to 1"),
        ("pairs", [PAIR | {"channel_dim": True}], ".*is True, must be a whole number"),
        ("pairs", "atuo", "is 'atuo', must be 'auto' or 'family'; did you mean 'auto'"),
        ("pairs", {"a": 1}, "is a section, must be 'auto', 'family' or a list of pairs"),
        ("pairs", None, "is empty, must be 'auto', 'family' or a list"),
        ("data.augment", 1, "is 1, must be true or false"),
        ("data.arguments", [1], r"is \[1\], must be a section"),
        ("data.arguments", {1: 2}, ".*is 1, must be text"),
        # Values that cannot be meant.
        ("stage1.steps", 10**400, "is 10{10,}.*0, must be less"),
        ("stage1.learning_rate", 10**400, "is 10{10,}.*0, must be"),
        ("stage1.learning_rate", 1e400, "is inf, must be a finite number"),
        ("stage1.learning_rate", 1e39, r"is 1e\+39, must be less"),
        ("stage2.epochs", 10**9, "is 1000000000, must be less than or equal to 100000000"),
        ("execution.threads", 10**8, "is .*, must be less"),
        ("data.workers", 10**5, "is .*, must be less"),
        ("data.image_size", 10**5, "is .*, must be less"),
        ("data.batch_size", 10**10, "is .*, must be less"),
        ("evaluation.every", 10**12, "is .*, must be less"),
        ("kd.temperature", 1e300, "is .*, must be less"),
        ("teacher_seed", 10**100, "is .*, must be less"),
        ("name", "x" * 101, "is .*, must have at most 100 characters"),
        ("data.root", "x" * 5000, "is .*, must have at most 4096 characters"),
        ("student.model", "x" * 5000, "is .*, must have at most 1000 characters"),
    ],
)
def test_each_error_names_the_key_what_it_was_and_what_it_must_be(
    key: str, value: object, problem: str
) -> None:
    section, _, name = key.rpartition(".")
    tree: dict[str, Any] = TREE | {"checkpoints": {}, "evaluation": {}, "execution": {}, "kd": {}}
    tree |= {section: tree[section] | {name: value}} if section else {name: value}
    with pytest.raises(DistillError, match=rf"^{key}[\w.]*: {problem}") as caught:
        read(Config, tree)
    assert len(str(caught.value).splitlines()) == 1
    assert len(str(caught.value)) < 300


def test_several_errors_are_told_at_once_but_not_thousands() -> None:
    with pytest.raises(DistillError, match=r"^name: .*\nstage1\.steps: .*\nstage1\.clip: .*$"):
        read(Config, TREE | {"name": 1, "stage1": TRAINING | {"steps": 0, "clip": -1}})
    with pytest.raises(DistillError) as caught:
        read(Config, TREE | {"seeds": [-1] * 1000})
    assert len(str(caught.value).splitlines()) == 10


def test_what_is_not_a_section_is_refused_as_a_recipe() -> None:
    with pytest.raises(DistillError, match=r"^is \[\], must be a section with the keys name, seed"):
        read(Config, [])


def test_overrides_replace_and_add_keys_in_order() -> None:
    tree: dict[str, Any] = {"inner": {"steps": 1}}
    keys = override(tree, ["inner.steps=2", "inner.rate=0.5", "seeds=[4, 5]", "inner.steps=3"])
    assert tree == {"inner": {"steps": 3, "rate": 0.5}, "seeds": [4, 5]}
    assert keys == ["inner.steps", "inner.rate", "seeds", "inner.steps"]


def test_an_override_of_an_alias_leaves_what_it_stands_for() -> None:
    tree, _ = parse_yaml("a: &a {x: {y: 1}}\nb: *a\n", "recipe")
    override(tree, ["b.x.y=2", "b.z.w=3"])
    assert tree == {"a": {"x": {"y": 1}}, "b": {"x": {"y": 2}, "z": {"w": 3}}}


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("inner.steps", "written section.key=value"),
        ("=3", "written section.key=value"),
        ("inner..steps=3", "written section.key=value"),
        (".".join("a" * 1000) + "=3", "written section.key=value"),
        ("seeds.0=3", r"seeds is \[0\], not a section; override it whole"),
        ("inner.steps=[", "inner.steps, line 1: not readable as YAML"),
    ],
)
def test_a_malformed_override_is_refused(assignment: str, message: str) -> None:
    with pytest.raises(DistillError, match=message) as caught:
        override({"inner": {"steps": 1}, "seeds": [0]}, [assignment])
    assert len(str(caught.value)) < 300


BOMB = "a: &a [1, 2, 3, 4, 5, 6, 7, 8, 9]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]\n"
    for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)
LADDER = "a0: &a0 [1]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}]\n" for i in range(1, 3000))


@pytest.mark.parametrize(
    ("text", "line", "problem"),
    [
        ("steps: 1\nsteps: 2\n", 2, "steps: given twice"),
        ("a: 1\n? [x, y]\n: 2\n", 2, "a key must be text of at most 200 characters"),
        ("a: 1\n? {x: y}\n: 2\n", 2, "a key must be text of at most 200 characters"),
        ("k" * 201 + ": 1\n", 1, "a key must be text of at most 200 characters"),
        ("a: 1\nb: !!int foo\n", 2, "'foo' is no int"),
        ("b: !!bool foo\n", 1, "'foo' is no bool"),
        ("a: !!timestamp 2024-13-45\n", 1, "could not determine a constructor for the tag"),
        ("a: !!binary aGk=\n", 1, "could not determine a constructor for the tag"),
        ("a: !!set {x, y}\n", 1, "could not determine a constructor for the tag"),
        ("a: !!python/object/apply:os.getcwd []\n", 1, "could not determine a constructor"),
        ("a: 1\nb: " + "9" * 5000, 2, r"'9{10,}\.\.\.9+' is no int: Exceeds the limit"),
        ("a: " + "[" * 3000 + "]" * 3000, 1, "more than 10,000 values or 30 levels"),
        ("a: " + "{a: " * 3000 + "}" * 3000, 1, "more than 10,000 values or 30 levels"),
        ("a: " + "[" * 31 + "]" * 31, 1, "more than 10,000 values or 30 levels"),
        (BOMB, 5, "more than 10,000 values or 30 levels, counting what aliases stand for"),
        ("a: 1\nb: &b [1, *b]\n", 2, "more than 10,000 values or 30 levels, counting"),
        ("b: &b {<<: *b}\n", 1, "more than 10,000 values or 30 levels, counting"),
        (LADDER, 30, "more than 10,000 values or 30 levels, counting"),
        ("a: 1\nb: \x07\n", 2, "special characters are not allowed"),
        ("a: b: c\n", 1, "mapping values are not allowed here"),
        ("a: [", 1, "expected the node content"),
        ("a: 1\n---\nb: 1\n", 2, "but found another document"),
        ("a: *nothing\n", 1, "found undefined alias 'nothing'"),
    ],
)
def test_what_is_no_plain_yaml_is_refused_with_its_line(
    text: str, line: int, problem: str, tmp_path: Path
) -> None:
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(DistillError, match=rf"x\.yaml, line {line}: .*{problem}") as caught:
        load_config(tmp_path / "x.yaml")
    assert len(str(caught.value).splitlines()) == 1
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("text", ["2024-13-45", "2024-01-02", "2024-01-02 25:61:00"])
def test_dates_are_text(text: str) -> None:
    assert parse_yaml(text, "x")[0] == text


def test_an_alias_stands_for_what_it_names() -> None:
    tree, _ = parse_yaml("a: &a {x: 1}\nb: {<<: *a, y: 2}\nc: [*a, *a]\n", "x")
    assert tree == {"a": {"x": 1}, "b": {"x": 1, "y": 2}, "c": [{"x": 1}, {"x": 1}]}


def test_the_line_of_each_key_is_known() -> None:
    _, lines = parse_yaml("a:\n  b: 1\n  c:\n  - x\n  - {y: 1}\n", "x")
    assert lines == {"a": 1, "a.b": 2, "a.c": 3, "a.c.0": 4, "a.c.1": 5, "a.c.1.y": 5}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a: 1\nb: \xff\n", r"x\.yaml, line 2: is not UTF-8"),
        (b"#" + "\u03a6".encode() * (1 << 20), r"x\.yaml: is larger than 1 MiB"),
        (b"[1, 2]", r"x\.yaml: must hold keys and values, is \[1, 2\]"),
        (b"", r"x\.yaml: must hold keys and values, is empty"),
        (None, r"x\.yaml: cannot be read: No such file"),
    ],
)
def test_a_file_that_is_no_recipe_is_refused(
    tmp_path: Path, content: bytes | None, message: str
) -> None:
    if content is not None:
        (tmp_path / "x.yaml").write_bytes(content)
    with pytest.raises(DistillError, match=message):
        load_yaml(tmp_path / "x.yaml")


def places_without_a_bound(schema: object, where: str = "") -> list[str]:
    """The places in a JSON schema whose number, text or list has no upper bound."""
    if isinstance(schema, list):
        schema = dict(enumerate(schema))
    if not isinstance(schema, dict):
        return []
    bounds = {"integer": "aximum", "number": "aximum", "string": "maxLength", "array": "maxItems"}
    bound = bounds.get(str(schema.get("type")))
    bounded = bound is None or {"enum", "const"} & set(schema) or bound in "".join(map(str, schema))
    found = [] if bounded else [where]
    return found + [
        place
        for key, part in schema.items()
        for place in places_without_a_bound(part, f"{where}.{key}")
    ]


def test_every_value_of_a_recipe_has_an_upper_bound() -> None:
    schema = Config.model_json_schema()
    assert "maximum" in schema["$defs"]["Training"]["properties"]["learning_rate"]
    assert places_without_a_bound(schema) == []
    del schema["$defs"]["Training"]["properties"]["steps"]["anyOf"][0]["maximum"]
    assert places_without_a_bound(schema) == [".$defs.Training.properties.steps.anyOf.0"]
