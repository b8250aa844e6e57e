"""Reading YAML into settings: what is accepted, and what each refusal says."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from pydantic import Field

from fsp_kernels.distill.config import Config, Many, Pairs, TwoPaths
from fsp_kernels.distill.errors import DistillError
from fsp_kernels.distill.settings import Settings, load_yaml, override, parse_yaml, read, to_tree


class Inner(Settings):
    steps: Annotated[int, Field(ge=1, le=100)]
    rate: Annotated[float, Field(gt=0, lt=1e6)] = 0.1


class Outer(Settings):
    kind: Literal["digits", "cifar"] = "digits"
    inner: Inner
    seeds: Many[Annotated[int, Field(ge=0)]] = (0,)
    ends: TwoPaths = ("a", "b")


def test_defaults_fill_what_is_not_given() -> None:
    assert read(Outer, {"inner": {"steps": 3}}) == Outer(inner=Inner(steps=3, rate=0.1))


def test_what_was_read_can_be_written_and_read_again() -> None:
    settings = Outer(kind="cifar", inner=Inner(steps=2, rate=1e-4), seeds=(3, 1))
    assert read(Outer, to_tree(settings)) == settings


@pytest.mark.parametrize(
    ("text", "value"),
    [("1", 1.0), ("1e-4", 1e-4), ("+2E3", 2e3), ("3.e1", 30.0), ("0.5", 0.5), (".5", 0.5)],
)
def test_floats_may_be_written_as_people_write_them(text: str, value: float) -> None:
    # YAML 1.1 takes 1e-4 for text.
    inner = read(Inner, {"steps": 1, "rate": parse_yaml(text, "rate")[0]})
    assert inner.rate == value
    assert type(inner.rate) is float


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"inner": {"stpes": 1}}, r"inner\.stpes: unknown key; did you mean 'steps'\?"),
        ({"inner": {"steps": 1, "zzz": 1}}, r"inner\.zzz: unknown key; known here: steps, rate"),
        ({"inner": {"steps": 1}, 7: 1}, r"7: unknown key; known here: kind, inner, seeds"),
        ({"inner": {}}, r"inner\.steps: missing"),
        ({}, r"inner: missing"),
        ([], r"is the list \[\], must be a section with the keys kind, inner, seeds, ends"),
        ({"inner": 3}, r"inner: is 3, must be a section with the keys steps, rate"),
        ({"inner": {"steps": 0}}, r"inner\.steps: is 0, must be at least 1"),
        ({"inner": {"steps": 101}}, r"inner\.steps: is 101, must be at most 100"),
        ({"inner": {"steps": 1.5}}, r"inner\.steps: is 1\.5, must be a whole number"),
        ({"inner": {"steps": True}}, r"inner\.steps: is True, must be a whole number"),
        ({"inner": {"steps": None}}, r"inner\.steps: is empty, must be a whole number"),
        ({"inner": {"steps": 1, "rate": "fast"}}, r"inner\.rate: is 'fast', must be a finite"),
        ({"inner": {"steps": 1, "rate": float("nan")}}, r"inner\.rate: is nan, must be a finite"),
        ({"inner": {"steps": 1, "rate": 0}}, r"inner\.rate: is 0, must be more than 0"),
        ({"inner": {"steps": 1, "rate": 1e6}}, r"inner\.rate: is 1000000\.0, must be less than"),
        ({"inner": {"steps": 1}, "kind": "digit"}, r"kind: is 'digit', .* did you mean 'digits'"),
        ({"inner": {"steps": 1}, "kind": ["digits"]}, r"kind: is the list \['digits'\], must be"),
        ({"inner": {"steps": 1}, "seeds": 3}, r"seeds: is 3, must be a list"),
        ({"inner": {"steps": 1}, "seeds": []}, r"seeds: is the list \[\], must be a list of at"),
        ({"inner": {"steps": 1}, "seeds": [0, -1]}, r"seeds\.1: is -1, must be at least 0"),
        ({"inner": {"steps": 1}, "seeds": [0, "x"]}, r"seeds\.1: is 'x', must be a whole number"),
        ({"inner": {"steps": 1}, "ends": ["a"]}, r"ends\.1: missing"),
        ({"inner": {"steps": 1}, "ends": ["a", "b", "c"]}, r"ends: .* must be a list of at most 2"),
        ({"inner": {"steps": 1}, "ends": ["a", ""]}, r"ends\.1: is '', must be at least 1 char"),
    ],
)
def test_each_error_names_the_key_what_it_was_and_what_it_must_be(
    tree: object, message: str
) -> None:
    with pytest.raises(DistillError, match=message):
        read(Outer, tree)


def test_all_that_is_wrong_is_told_at_once() -> None:
    with pytest.raises(DistillError) as caught:
        read(Outer, {"kind": 1, "inner": {"steps": 0, "rate": -1}})
    assert [line.partition(":")[0] for line in str(caught.value).splitlines()] == [
        "kind",
        "inner.steps",
        "inner.rate",
    ]


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
        ("seeds.0=3", "seeds is the list .*, not a section; override it whole"),
        ("inner.steps=[", "inner.steps, line 1: not readable as YAML"),
    ],
)
def test_a_malformed_override_is_refused(assignment: str, message: str) -> None:
    with pytest.raises(DistillError, match=message):
        override({"inner": {"steps": 1}, "seeds": [0]}, [assignment])


class Loose(Settings):
    limit: Annotated[float, Field(ge=0)] | None = None
    inner: Inner | None = None
    pairs: Pairs = "auto"
    fast: bool = False
    arguments: dict[str, Any] = Field(default_factory=dict)


PAIR = {"student": ["a", "b"], "teacher": ["c", "d"]}


@pytest.mark.parametrize(
    "tree",
    [
        {},
        {"limit": None},
        {"limit": 1},
        {"inner": {"steps": 2}},
        {"pairs": "family"},
        {"pairs": [PAIR]},
        {"fast": True},
        {"arguments": {"a": [1, {"b": 2}]}},
    ],
)
def test_a_value_is_read_as_the_kind_that_takes_it(tree: dict[str, Any]) -> None:
    settings = read(Loose, tree)
    written = to_tree(settings)
    assert read(Loose, written) == settings
    for key, value in tree.items():
        if key not in ("pairs", "inner"):
            assert written[key] == value
            assert getattr(settings, key) == value


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"limit": -1}, r"limit: is -1, must be at least 0"),
        ({"limit": "x"}, r"limit: is 'x', must be a finite number"),
        ({"inner": 3}, r"inner: is 3, must be a section with the keys steps, rate"),
        ({"inner": {"steps": 0}}, r"inner\.steps: is 0, must be at least 1"),
        ({"pairs": "atuo"}, r"pairs: is 'atuo', must be one of 'auto' or 'family'; did you mean"),
        ({"pairs": {"a": 1}}, r"pairs: is a section, must be 'auto', 'family', or a list of pairs"),
        ({"pairs": [PAIR | {"weight": -1}]}, r"pairs\.0\.weight: is -1, must be at least 0"),
        ({"pairs": [PAIR | {"wieght": 1}]}, r"pairs\.0\.wieght: unknown key; did you mean 'weigh"),
        ({"pairs": None}, r"pairs: is empty, must be 'auto'"),
        ({"fast": 1}, r"fast: is 1, must be true or false"),
        ({"arguments": [1]}, r"arguments: is the list \[1\], must be a section"),
        ({"arguments": {1: 2}}, r"arguments\.1: is 1, must be text"),
    ],
)
def test_an_error_is_about_the_kind_that_was_meant(tree: dict[str, object], message: str) -> None:
    with pytest.raises(DistillError, match=message):
        read(Loose, tree)


BOMB = "a: &a [1, 2, 3, 4, 5, 6, 7, 8, 9]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]\n"
    for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("text", "line", "problem"),
    [
        ("steps: 1\nsteps: 2\n", 2, "steps: given twice"),
        ("a: 1\n? [x, y]\n: 2\n", 2, "a key must be text, this is a list or a section"),
        ("a: 1\n? {x: y}\n: 2\n", 2, "a key must be text, this is a list or a section"),
        ("a: 1\nb: !!int foo\n", 2, "'foo' is no int"),
        ("b: !!bool foo\n", 1, "'foo' is no bool"),
        ("a: !!timestamp 2024-13-45\n", 1, "could not determine a constructor for the tag"),
        ("a: !!binary aGk=\n", 1, "could not determine a constructor for the tag"),
        ("a: !!set {x, y}\n", 1, "could not determine a constructor for the tag"),
        ("a: !!python/object/apply:os.getcwd []\n", 1, "could not determine a constructor"),
        ("a: 1\nb: " + "9" * 5000, 2, r"'9{10,}\.\.\.9+' is no int: Exceeds the limit"),
        ("a: " + "[" * 3000 + "]" * 3000, 1, "more than 30 levels deep"),
        ("a: " + "{a: " * 3000 + "}" * 3000, 1, "more than 30 levels deep"),
        (BOMB, 5, "stands for 10,000 values or more, with its aliases"),
        ("a: 1\nb: &b [1, *b]\n", 2, "stands for 10,000 values or more, with its aliases"),
        ("b: &b {<<: *b}\n", 1, "stands for 10,000 values or more, with its aliases"),
        (
            "a0: &a0 [1]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}]\n" for i in range(1, 3000)),
            30,
            "is more than 30 levels deep, with its aliases",
        ),
        ("a: 1\nb: \x07\n", 2, "special characters are not allowed"),
        ("a: b: c\n", 1, "mapping values are not allowed here"),
        ("a: 1\n---\nb: 1\n", 2, "but found another document"),
        ("a: *nothing\n", 1, "found undefined alias 'nothing'"),
    ],
)
def test_what_is_no_plain_yaml_is_refused_with_its_line(text: str, line: int, problem: str) -> None:
    with pytest.raises(DistillError, match=f"^x.yaml, line {line}: .*{problem}") as caught:
        parse_yaml(text, "x.yaml")
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
        (
            b"#" + "\N{GREEK SMALL LETTER PHI}".encode() * (1 << 20),
            r"x\.yaml: is larger than 1 MiB",
        ),
        (b"[1, 2]", r"x\.yaml: must hold keys and values, holds the list \[1, 2\]"),
        (b"", r"x\.yaml: must hold keys and values, holds empty"),
    ],
)
def test_a_file_that_is_no_recipe_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "x.yaml").write_bytes(content)
    with pytest.raises(DistillError, match=message):
        load_yaml(tmp_path / "x.yaml")


def numbers_without_a_bound(schema: dict[str, Any], where: str = "") -> list[str]:
    """The places in a JSON schema whose number, text or list has no upper bound."""
    found = []
    kind = schema.get("type")
    if kind in ("integer", "number") and not {"maximum", "exclusiveMaximum"} & set(schema):
        found.append(where)
    if kind == "string" and not {"maxLength", "enum", "const"} & set(schema):
        found.append(where)
    if kind == "array" and "maxItems" not in schema:
        found.append(where)
    parts = {key: part for key, part in schema.items() if isinstance(part, dict)}
    parts |= {
        f"{key}.{i}": part
        for key, several in schema.items()
        if isinstance(several, list)
        for i, part in enumerate(several)
        if isinstance(part, dict)
    }
    for key, part in parts.items():
        found += numbers_without_a_bound(part, f"{where}.{key}")
    return found


def test_every_value_of_a_recipe_has_an_upper_bound() -> None:
    schema = Config.model_json_schema()
    assert "maximum" in schema["$defs"]["Training"]["properties"]["learning_rate"]
    assert numbers_without_a_bound(schema) == []
    assert numbers_without_a_bound(Loose.model_json_schema()) == [".properties.limit.anyOf.0"]
