"""Read YAML into frozen pydantic models. Every error names the key.

``config.py`` declares the settings; nothing here knows what they mean.
"""

from __future__ import annotations

import re
import reprlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError, model_validator
from pydantic_core import ErrorDetails, PydanticCustomError

from fsp_kernels.errors import DistillError, did_you_mean

M = TypeVar("M", bound="Settings")
Lines = dict[str, int]
"""The line of each dotted key in its file, from 1."""

_LARGEST_FILE = 1 << 20  # bytes
_MOST_VALUES = 10_000  # an alias counts as all the values that it stands for
_DEEPEST = 30  # sections and lists inside one another
_TOO_LARGE = f"more than {_MOST_VALUES:,} values or {_DEEPEST} levels"
_LONGEST_KEY = 200  # characters
_ERRORS_SHOWN = 10

# ``must be ...`` for the errors of pydantic that speak of Python's types or of a pattern.
_WORDS = {
    "bool_type": "true or false",
    "dict_type": "a section",
    "int_type": "a whole number",
    "string_pattern_mismatch": "a folder name of letters, digits, '.', '_' and '-'",
    "string_type": "text",
    "tuple_type": "a list",
}
# Parts of pydantic's locations that are not keys of a recipe: marks of keys, and tags of unions.
_NOT_KEYS = ("[key]", "[list]", "[name]")


def wrong(key: str, problem: str) -> PydanticCustomError:
    """The error for a section's validator to raise: what is wrong with ``key`` of the section."""
    return PydanticCustomError("setting", "{problem}", {"key": key, "problem": problem})


class Settings(BaseModel):
    """A section of a recipe. A number is not text, ``True`` is not 1, and 1.5 is not a count."""

    model_config = ConfigDict(frozen=True, strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _refuse_unknown_keys(cls, tree: object) -> object:
        fields = cls.model_fields
        known = ", ".join(fields)
        if isinstance(tree, dict):
            for key in tree:
                if key not in fields:
                    hint = did_you_mean(str(key), fields) or f"; known here: {known}"
                    raise wrong(str(key), f"unknown key{hint}")
        elif not isinstance(tree, cls):
            raise wrong("", f"is {_describe(tree)}, must be a section with the keys {known}")
        return tree


def read(kind: type[M], tree: object, place: Callable[[str], str] = lambda _: "") -> M:
    """The settings ``kind`` from plain dicts, lists and scalars.

    ``place`` gives the start of the message about a dotted key, such as its file and line.

    Raises:
        DistillError: unknown or missing keys, wrong types, or values out of range; a line each.
    """
    try:
        return kind.model_validate(tree)
    except ValidationError as error:
        # A list whose items are all wrong is not too short; pydantic counts the valid ones only.
        errors = error.errors(include_url=False)
        errors = [x for x in errors if not (x["type"] == "too_short" and x["input"])]
        found = map(_explain, errors[:_ERRORS_SHOWN])
        lines = (f"{place(key)}{key}{': ' if key else ''}{problem}" for key, problem in found)
        raise DistillError("\n".join(lines)) from None


def to_tree(settings: BaseModel) -> dict[str, Any]:
    """The settings as plain dicts and lists, for YAML and JSON."""
    return settings.model_dump(mode="json")


def parse_yaml(text: str, source: str) -> tuple[Any, Lines]:
    """The sections, lists and scalars in ``text``, and the line of each key.

    Raises:
        DistillError: it is not YAML, or holds other types or too much. The message names ``source``
            and the line.
    """
    loader = None
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None, {}
        lines = _lines_of(node)
        return loader.construct_document(node), lines
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line, problem = mark.line if mark else 0, error.problem
    except yaml.reader.ReaderError as error:
        line, problem = text.count("\n", 0, error.position), error.reason
    except RecursionError:
        line, problem = loader.line if loader else 0, _TOO_LARGE
    raise DistillError(f"{source}, line {line + 1}: not readable as YAML: {problem}")


def load_yaml(path: Path) -> tuple[dict[str, Any], Lines]:
    """The sections that a YAML file holds, and the line of each key.

    Raises:
        DistillError: the file cannot be read, or holds something else.
    """
    try:
        with path.open("rb") as file:
            content = file.read(_LARGEST_FILE + 1)
        if len(content) > _LARGEST_FILE:
            raise DistillError(f"{path}: is larger than {_LARGEST_FILE >> 20} MiB, is it a recipe?")
        tree, lines = parse_yaml(content.decode(), str(path))
    except OSError as error:
        raise DistillError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        line = 1 + content.count(b"\n", 0, error.start)
        raise DistillError(f"{path}, line {line}: is not UTF-8: {error.reason}") from error
    if not isinstance(tree, dict):
        raise DistillError(f"{path}: must hold keys and values, is {_describe(tree)}")
    return tree, lines


def override(tree: dict[str, Any], assignments: Sequence[str]) -> list[str]:
    """Apply ``section.key=value`` assignments to ``tree``, with values in YAML; return the keys.

    Raises:
        DistillError: an assignment is malformed, or goes into something that is not a section.
    """
    keys = []
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        *sections, last = names = key.strip().split(".")
        if not equals or not all(names) or len(names) > _DEEPEST:
            raise DistillError(f"{_describe(assignment)}: an override is written section.key=value")
        branch = tree
        for depth, section in enumerate(sections, start=1):
            parent, branch = branch, branch.get(section, {})
            if not isinstance(branch, dict):
                whole = ".".join(sections[:depth])
                raise DistillError(
                    f"{key}: {whole} is {_describe(branch)}, not a section; override it whole, "
                    f"as in {whole}=..."
                )
            # A copy, since an alias may stand for the same section elsewhere.
            branch = parent[section] = dict(branch)
        branch[last], _ = parse_yaml(text, key)
        keys.append(".".join(names))
    return keys


def is_within(key: str, sections: Iterable[str]) -> bool:
    """Whether a dotted key is one of ``sections``, or in one."""
    return any(f"{key}.".startswith(f"{section}.") for section in sections)


class _Loader(yaml.SafeLoader):
    """Reads the types of JSON only: dates are text; sets, bytes and the like are refused."""

    yaml_constructors: ClassVar[dict[Any, Any]] = {
        tag: constructor
        for tag, constructor in yaml.SafeLoader.yaml_constructors.items()
        if not str(tag).endswith((":timestamp", ":set", ":binary", ":omap", ":pairs"))
    }

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except (ValueError, OverflowError, KeyError) as error:  # PyYAML gives these no line
            kind = node.tag.rpartition(":")[2]
            raise _error(f"{_describe(node.value)} is no {kind}: {error}", node) from None


_Loader.yaml_implicit_resolvers = {
    first: [rule for rule in rules if not rule[0].endswith(":timestamp")]
    for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
# 1e-4 is a number, as in YAML 1.2.
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+"),
    list("-+0123456789"),
)


def _error(problem: str, node: yaml.Node) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)


def _lines_of(root: yaml.Node) -> Lines:
    """The line of each key. Refuses what is too large, with each alias spelled out."""
    lines: Lines = {}
    for count, (key, node) in enumerate(_walk(root, "")):
        if "." not in key:
            top = node
        if count == _MOST_VALUES or key.count(".") == _DEEPEST:
            raise _error(f"{_TOO_LARGE}, counting what aliases stand for", top)
        lines[key] = node.start_mark.line + 1
    return lines


def _walk(node: yaml.Node, parent: str) -> Iterator[tuple[str, yaml.Node]]:
    """Every key in ``node`` and below, dotted, with the node that marks its place."""
    children: list[tuple[str, yaml.Node, yaml.Node]] = []
    if isinstance(node, yaml.SequenceNode):
        children = [(str(index), value, value) for index, value in enumerate(node.value)]
    elif isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode) or len(key.value) > _LONGEST_KEY:
                raise _error(f"a key must be text of at most {_LONGEST_KEY} characters", key)
            if any(key.value == name for name, _, _ in children):
                raise _error(f"{key.value}: given twice", key)  # PyYAML would keep the last
            children.append((key.value, key, value))
    for name, place, value in children:
        dotted = f"{parent}.{name}" if parent else name
        yield dotted, place
        yield from _walk(value, dotted)


def _explain(details: ErrorDetails) -> tuple[str, str]:
    """The dotted key of one of pydantic's errors, and what is wrong there."""
    kind, context, value = details["type"], details.get("ctx", {}), details["input"]
    names = [str(name) for name in details["loc"] if name not in _NOT_KEYS]
    if kind == "setting":
        return ".".join(filter(None, [*names, context["key"]])), context["problem"]
    if kind == "missing":
        return ".".join(names), "missing"
    rule = f"must be {_WORDS[kind]}" if kind in _WORDS else details["msg"]
    rule = re.sub(r"^\w+ should", "must", rule)
    known = re.findall(r"'([^']*)'", context.get("expected", ""))
    near = did_you_mean(value, known) if isinstance(value, str) else ""
    return ".".join(names), f"is {_describe(value)}, {rule}{near}"


def _describe(value: object) -> str:
    if value is None:
        return "empty"
    return "a section" if isinstance(value, dict) else reprlib.repr(value)
