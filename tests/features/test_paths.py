"""Paths: what they say, and what they choose in tuples, mappings and objects."""

from __future__ import annotations

from collections import namedtuple
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from fsp_kernels.errors import DistillError
from fsp_kernels.features.paths import Path, parse_path, select, tensors_in

X, Y = torch.zeros(1), torch.ones(1)
Two = namedtuple("Two", ["first", "second"])


@dataclass
class Output:
    logits: Tensor
    states: tuple[Tensor, ...] = ()
    loss: Tensor | None = None


@pytest.mark.parametrize(
    ("text", "module", "side", "keys"),
    [
        ("layer1.0", "layer1.0", "output", ()),
        ("layer1:input", "layer1", "input", ()),
        ("a.3:output[0]", "a.3", "output", (0,)),
        ("a:output.states[-1]", "a", "output", ("states", -1)),
        (":output[last state][2].x", "", "output", ("last state", 2, "x")),
    ],
)
def test_a_path_is_a_module_a_side_and_keys(
    text: str, module: str, side: str, keys: tuple[Any, ...]
) -> None:
    assert parse_path(text) == Path(text, module, side, keys)


@pytest.mark.parametrize(
    "text", ["a:", "a:out", "a:output[", "a:output[]", "a:output.", "a:output[0]b", "a:b:output"]
)
def test_another_path_is_refused(text: str) -> None:
    with pytest.raises(DistillError, match="must end in ':input' or ':output', or in what to"):
        parse_path(text)


@pytest.mark.parametrize(
    ("value", "keys"),
    [
        ((X, Y), "[1]"),
        ([X, (X, Y)], "[-1][1]"),
        ({"a": Y}, ".a"),
        ({"a": Y}, "[a]"),
        ({"a b": Y}, "[a b]"),
        ({"0": X, "1": Y}, "[1]"),
        ({0: X, 1: Y}, "[1]"),
        (Two(X, Y), ".second"),
        (Two(X, Y), "[1]"),
        (Output(X, (X, Y)), ".states[1]"),
        (SimpleNamespace(y=Y), ".y"),
        (Y, ""),
    ],
)
def test_keys_choose_items_and_attributes_alike(value: object, keys: str) -> None:
    assert select(value, parse_path(f":output{keys}")) is Y


def test_outputs_of_hugging_face_are_mappings() -> None:
    outputs = pytest.importorskip("transformers.modeling_outputs")
    value = outputs.ImageClassifierOutput(logits=Y, hidden_states=(X, Y))
    assert select(value, parse_path(":output.logits")) is Y
    assert select(value, parse_path(":output.hidden_states[1]")) is Y


@pytest.mark.parametrize(
    ("value", "keys", "message"),
    [
        ((X, Y), "", r"is a tuple of 2, not a tensor; choose :output\[0\] or :output\[1\]$"),
        ((X, Y), "[2]", r"has no 2, as :output is a tuple of 2; choose :output\[0\] or"),
        ((X, Y), "[-3]", r"has no -3, as :output is a tuple of 2; choose"),
        (X, "[0]", r"has no 0, as :output is a Tensor; choose :output$"),
        (
            (Output(X),),
            "[0].loss",
            r"has no 'loss', as :output\[0\] is an Output; .* :output\[0\]\.logits$",
        ),
        ({"a b": (X,)}, "[a b]", r"is a tuple of 1, not a tensor; choose :output\[a b\]\[0\]$"),
        ([X] * 9, "", r"is a list of 9, .* or :output\[3\] or 5 more$"),
        (None, "", r"is a NoneType, not a tensor; tap a submodule of it$"),
        ({"items": 3}, ".items", r"is an int, not a tensor; tap a submodule"),
        ({}, ".items", r"has no 'items', as :output is a dict of 0$"),
    ],
)
def test_what_is_not_there_is_refused_with_what_could_be_chosen(
    value: object, keys: str, message: str
) -> None:
    with pytest.raises(DistillError, match=rf"^m:output.*: {message}"):
        select(value, parse_path(f"m:output{keys}"))


def test_all_tensors_are_found_with_the_keys_that_choose_them() -> None:
    value = (Output(X, (Y,)), {"a": [X], 3: Y}, "no tensor")
    found = dict(tensors_in(value))
    assert list(found) == ["[0].logits", "[0].states[0]", "[1].a[0]", "[1][3]"]
    assert all(select(value, parse_path(f":output{keys}")) is x for keys, x in found.items())
