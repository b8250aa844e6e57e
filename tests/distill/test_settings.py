"""Reading YAML into dataclasses: what is accepted, and what each refusal says."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import pytest

from fsp_kernels.distill.errors import DistillError
from fsp_kernels.distill.settings import at_least, override, parse_yaml, read, setting, to_tree


@dataclass(frozen=True, kw_only=True)
class Inner:
    steps: int = setting(at_least(1))
    rate: float = 0.1


@dataclass(frozen=True, kw_only=True)
class Outer:
    kind: Literal["digits", "cifar"] = "digits"
    inner: Inner
    seeds: tuple[int, ...] = setting(at_least(0), (0,))
    ends: tuple[str, str] = ("a", "b")


def test_defaults_fill_what_is_not_given() -> None:
    assert read(Outer, {"inner": {"steps": 3}}) == Outer(inner=Inner(steps=3, rate=0.1))


def test_what_was_read_can_be_written_and_read_again() -> None:
    settings = Outer(kind="cifar", inner=Inner(steps=2, rate=1e-4), seeds=(3, 1))
    assert read(Outer, to_tree(settings)) == settings


@pytest.mark.parametrize(("text", "value"), [("1", 1.0), ("1e-4", 1e-4), ("0.5", 0.5)])
def test_floats_may_be_written_as_people_write_them(text: str, value: float) -> None:
    # YAML 1.1 takes 1e-4 for a string.
    inner = read(Inner, {"steps": 1, "rate": parse_yaml(text, "rate")})
    assert inner.rate == value
    assert type(inner.rate) is float


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"inner": {"stpes": 1}}, r"inner\.stpes: unknown key; did you mean 'steps'\?"),
        ({"inner": {"steps": 1, "zzz": 1}}, r"inner\.zzz: unknown key; known here: steps, rate"),
        ({"inner": {}}, r"inner\.steps: missing; must be a whole number"),
        ({}, r"inner: missing; must be a section with the keys steps, rate"),
        ({"inner": 3}, r"inner: is 3, must be a section"),
        ({"inner": {"steps": 0}}, r"inner\.steps: is 0, must be at least 1"),
        ({"inner": {"steps": 1.5}}, r"inner\.steps: is 1\.5, must be a whole number"),
        ({"inner": {"steps": True}}, r"inner\.steps: is True, must be a whole number"),
        ({"inner": {"steps": None}}, r"inner\.steps: is empty, must be a whole number"),
        ({"inner": {"steps": 1, "rate": "fast"}}, r"inner\.rate: is 'fast', must be a finite"),
        ({"inner": {"steps": 1, "rate": float("nan")}}, r"inner\.rate: is 'nan', must be a fin"),
        ({"inner": {"steps": 1}, "kind": "digit"}, r"kind: is 'digit', .* did you mean 'digits'"),
        ({"inner": {"steps": 1}, "seeds": 3}, r"seeds: is 3, must be a list, each item a whole"),
        ({"inner": {"steps": 1}, "seeds": []}, r"seeds: is the list \[\], must be a list"),
        ({"inner": {"steps": 1}, "seeds": [0, -1]}, r"seeds\.1: is -1, must be at least 0"),
        ({"inner": {"steps": 1}, "seeds": [0, "x"]}, r"seeds\.1: is 'x', must be a whole number"),
        ({"inner": {"steps": 1}, "ends": ["a"]}, r"ends: .* must be a list of 2, each item text"),
    ],
)
def test_each_error_names_the_key_what_it_was_and_what_it_must_be(
    tree: dict[str, object], message: str
) -> None:
    with pytest.raises(DistillError, match=message):
        read(Outer, tree)


def test_overrides_replace_and_add_keys_in_order() -> None:
    tree = {"inner": {"steps": 1}}
    override(tree, ["inner.steps=2", "inner.rate=0.5", "seeds=[4, 5]", "inner.steps=3"])
    assert tree == {"inner": {"steps": 3, "rate": 0.5}, "seeds": [4, 5]}


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("inner.steps", "written section.key=value"),
        ("=3", "written section.key=value"),
        ("inner..steps=3", "written section.key=value"),
        ("seeds.0=3", "seeds is the list .*, not a section; override it whole"),
        ("inner.steps=[", "inner.steps: not readable as YAML"),
    ],
)
def test_a_malformed_override_is_refused(assignment: str, message: str) -> None:
    with pytest.raises(DistillError, match=message):
        override({"inner": {"steps": 1}, "seeds": [0]}, [assignment])


def test_a_key_given_twice_is_refused() -> None:
    with pytest.raises(DistillError, match=r"steps: given twice \(again in line 2\)"):
        parse_yaml("steps: 1\nsteps: 2\n", "recipe")


@dataclass(frozen=True, kw_only=True)
class Loose:
    limit: float | None = setting(at_least(0), None)
    inner: Inner | None = None
    pairs: Literal["auto", "family"] | tuple[Inner, ...] = "auto"
    fast: bool = False
    arguments: dict[str, Any] = field(default_factory=dict)


@pytest.mark.parametrize(
    ("tree", "settings"),
    [
        ({"limit": None}, Loose()),
        ({"limit": 1}, Loose(limit=1.0)),
        ({"inner": {"steps": 2}}, Loose(inner=Inner(steps=2))),
        ({"pairs": "family"}, Loose(pairs="family")),
        ({"pairs": [{"steps": 1}]}, Loose(pairs=(Inner(steps=1),))),
        ({"fast": True}, Loose(fast=True)),
        ({"arguments": {"a": [1, {"b": 2}]}}, Loose(arguments={"a": [1, {"b": 2}]})),
    ],
)
def test_a_value_is_read_as_the_kind_that_takes_it(
    tree: dict[str, object], settings: Loose
) -> None:
    assert read(Loose, tree) == settings
    assert read(Loose, to_tree(settings)) == settings


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"limit": -1}, r"limit: is -1\.0, must be at least 0"),
        ({"limit": "x"}, r"limit: is 'x', must be a finite number"),
        ({"inner": 3}, r"inner: is 3, must be a section with the keys steps, rate"),
        ({"inner": {"steps": 0}}, r"inner\.steps: is 0, must be at least 1"),
        ({"pairs": "atuo"}, r"pairs: is 'atuo', must be one of 'auto', 'family'; did you mean"),
        ({"pairs": {"a": 1}}, r"pairs: is a section, must be one of 'auto', 'family', or a list"),
        ({"pairs": [{"steps": 0}]}, r"pairs\.0\.steps: is 0, must be at least 1"),
        ({"pairs": None}, r"pairs: is empty, must be one of"),
        ({"fast": 1}, r"fast: is 1, must be true or false"),
        ({"arguments": [1]}, r"arguments: is the list \[1\], must be a section"),
    ],
)
def test_an_error_names_all_that_would_do(tree: dict[str, object], message: str) -> None:
    with pytest.raises(DistillError, match=message):
        read(Loose, tree)
