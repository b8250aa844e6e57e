"""YAML in, frozen dataclasses out: each wrong key or value is an error that names its dotted key.

Nothing here knows what the settings mean; ``config.py`` declares them.
"""

from __future__ import annotations

import dataclasses
import math
import typing
from collections.abc import Callable, Hashable, Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, NamedTuple, TypeVar

import yaml

from fsp_kernels.distill.errors import DistillError, did_you_mean

T = TypeVar("T")

_UNIONS = (typing.Union, UnionType)  # ``X | Y`` makes either, by what X and Y are


class Rule(NamedTuple):
    """A condition on a value of the right type, and the words for it: ``must be {words}``."""

    holds: Callable[[Any], bool]
    words: str


def setting(rule: Rule, default: Any = dataclasses.MISSING) -> Any:
    """A dataclass field whose value, or each of whose items when a tuple, must satisfy ``rule``.

    ``None``, where the field admits it, satisfies every rule.
    """
    return dataclasses.field(default=default, metadata={"rule": rule})


def at_least(bound: float) -> Rule:
    return Rule(lambda value: value >= bound, f"at least {bound}")


def more_than(bound: float) -> Rule:
    return Rule(lambda value: value > bound, f"more than {bound}")


def between(low: float, high: float) -> Rule:
    """``low <= value < high``."""
    return Rule(lambda value: low <= value < high, f"at least {low} and less than {high}")


class _Loader(yaml.SafeLoader):
    """PyYAML keeps the last of two equal keys without a word; this one refuses."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if key.value in seen:
                line = key.start_mark.line + 1
                raise DistillError(f"{key.value}: given twice (again in line {line})")
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def parse_yaml(text: str, source: str) -> Any:
    """The parsed text; ``DistillError`` naming ``source`` where it is not YAML."""
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise DistillError(f"{source}: not readable as YAML: {error}") from error


def load_yaml(path: Path) -> dict[str, Any]:
    """The mapping a YAML file holds."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise DistillError(f"{path}: cannot be read: {reason}") from error
    tree = parse_yaml(text, str(path))
    if not isinstance(tree, dict):
        raise DistillError(f"{path}: must hold keys and values, holds {_describe(tree)}")
    return tree


def override(tree: dict[str, Any], assignments: Sequence[str]) -> None:
    """Apply ``section.key=value`` assignments to ``tree``; values are read as YAML."""
    for assignment in assignments:
        dotted, equals, text = assignment.partition("=")
        *sections, last = dotted.strip().split(".")
        if not equals or not all([*sections, last]):
            raise DistillError(f"{assignment!r}: an override is written section.key=value")
        branch = tree
        for depth, section in enumerate(sections):
            branch = branch.setdefault(section, {})
            if not isinstance(branch, dict):
                where = ".".join(sections[: depth + 1])
                raise DistillError(
                    f"{dotted}: {where} is {_describe(branch)}, not a section; "
                    f"override it whole, as in {where}=..."
                )
        branch[last] = parse_yaml(text, dotted)


def read(kind: type[T], tree: object, where: str = "") -> T:
    """``tree`` as the dataclass ``kind``.

    Args:
        kind: a dataclass whose fields are ``bool``, ``int``, ``float``, ``str``, ``Literal``,
            tuples of one type, free mappings ``dict``, such dataclasses, or unions of these and
            ``None``; fields without a default are required.
        tree: what YAML gave.
        where: dotted key of ``tree``, for messages.

    Raises:
        DistillError: an unknown or missing key, a wrong type, or a value a ``Rule`` forbids.
    """
    if not isinstance(tree, dict):
        raise DistillError(
            f"{where}: is {_describe(tree)}, must be a section with the keys {_names(kind)}"
        )
    fields = {field.name: field for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    hints = typing.get_type_hints(kind)
    for key in tree:
        if key not in fields:
            hint = did_you_mean(str(key), fields) or f"; known here: {_names(kind)}"
            raise DistillError(f"{_join(where, key)}: unknown key{hint}")
    values = {}
    for name, field in fields.items():
        dotted = _join(where, name)
        if name in tree:
            values[name] = _convert(hints[name], tree[name], dotted)
            _obey(field.metadata.get("rule"), values[name], dotted)
        elif field.default is field.default_factory is dataclasses.MISSING:
            raise DistillError(f"{dotted}: missing; must be {_expected(hints[name])}")
    return kind(**values)


def to_tree(settings: Any) -> Any:
    """The dataclass as plain dicts and lists, fit for YAML and JSON."""
    if dataclasses.is_dataclass(settings):
        fields = dataclasses.fields(settings)
        return {field.name: to_tree(getattr(settings, field.name)) for field in fields}
    return [to_tree(item) for item in settings] if isinstance(settings, tuple) else settings


def _convert(hint: Any, value: Any, dotted: str) -> Any:
    if typing.get_origin(hint) in _UNIONS:
        return _convert_union(hint, value, dotted)
    if dataclasses.is_dataclass(hint):
        return read(typing.cast(type, hint), value, dotted)
    if typing.get_origin(hint) is tuple:
        item_type, *more = typing.get_args(hint)
        fixed_length = None if more == [...] else 1 + len(more)
        if not isinstance(value, list) or not value or len(value) != (fixed_length or len(value)):
            raise DistillError(f"{dotted}: is {_describe(value)}, must be {_expected(hint)}")
        return tuple(_convert(item_type, item, f"{dotted}.{i}") for i, item in enumerate(value))
    if typing.get_origin(hint) is typing.Literal:
        if value in typing.get_args(hint):
            return value
        near = did_you_mean(str(value), map(str, typing.get_args(hint)))
        raise DistillError(f"{dotted}: is {_describe(value)}, must be {_expected(hint)}{near}")
    if hint is float:
        value = _as_float(value)
    hint = typing.get_origin(hint) or hint  # dict[str, Any], a free mapping
    if type(value) is not hint:  # not isinstance: YAML's `true` must not pass for 1
        raise DistillError(f"{dotted}: is {_describe(value)}, must be {_expected(hint)}")
    return value


def _convert_union(hint: Any, value: Any, dotted: str) -> Any:
    """By the member that takes values of this kind: nothing, a list, a section, or a scalar."""
    members = [member for member in typing.get_args(hint) if member is not NoneType]
    if value is None and len(members) < len(typing.get_args(hint)):
        return None
    fitting = [member for member in members if _takes(member) is _kind(value)]
    if not fitting and len(members) > 1:
        raise DistillError(f"{dotted}: is {_describe(value)}, must be {_expected(hint)}")
    return _convert((fitting or members)[0], value, dotted)


def _kind(value: Any) -> type:
    return next((kind for kind in (list, dict) if isinstance(value, kind)), object)


def _takes(hint: Any) -> type:
    """The kind of YAML value, as ``_kind`` tells it, that ``hint`` is made from."""
    if dataclasses.is_dataclass(hint) or typing.get_origin(hint) is dict:
        return dict
    return list if typing.get_origin(hint) is tuple else object


def _as_float(value: Any) -> Any:
    """``1`` and ``"1e-4"`` (a string to YAML 1.1, which wants ``1.0e-4``) as floats."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return value
    try:
        number = float(value)
    except ValueError:
        return value
    return number if math.isfinite(number) else str(value)


def _obey(rule: Rule | None, value: Any, dotted: str) -> None:
    if rule is None or value is None:
        return
    items = enumerate(value) if isinstance(value, tuple) else [(None, value)]
    for index, item in items:
        if not rule.holds(item):
            key = dotted if index is None else f"{dotted}.{index}"
            raise DistillError(f"{key}: is {item!r}, must be {rule.words}")


def _expected(hint: Any) -> str:
    if typing.get_origin(hint) in _UNIONS:
        members = [member for member in typing.get_args(hint) if member is not NoneType]
        return ", or ".join(map(_expected, members))
    if typing.get_origin(hint) is tuple:
        item_type, *more = typing.get_args(hint)
        count = "" if more == [...] else f" of {1 + len(more)}"
        return f"a list{count}, each item {_expected(item_type)}"
    if typing.get_origin(hint) is typing.Literal:
        return "one of " + ", ".join(map(repr, typing.get_args(hint)))
    if dataclasses.is_dataclass(hint):
        return f"a section with the keys {_names(typing.cast(type, hint))}"
    words = {bool: "true or false", int: "a whole number", float: "a finite number", str: "text"}
    return words.get(hint, "a section")


def _describe(value: Any) -> str:
    if value is None:
        return "empty"
    if isinstance(value, dict):
        return "a section"
    return f"the list {value!r}" if isinstance(value, list) else repr(value)


def _names(kind: type) -> str:
    return ", ".join(field.name for field in dataclasses.fields(kind))


def _join(where: str, key: object) -> str:
    return f"{where}.{key}" if where else str(key)
