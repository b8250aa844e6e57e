"""YAML in, frozen pydantic models out: each wrong key or value is an error that names its key.

Nothing here knows what the settings mean; ``config.py`` declares them.
"""

from __future__ import annotations

import re
import reprlib
import typing
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import yaml
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, ValidationError
from pydantic_core import ErrorDetails, PydanticCustomError

from fsp_kernels.distill.errors import DistillError, did_you_mean

M = TypeVar("M", bound="Settings")
Lines = dict[str, int]
"""The line of a file, from 1, in which each dotted key is."""

_LARGEST_FILE = 1 << 20  # bytes
_MOST_VALUES = 10_000  # with each alias counted as all that it stands for
_DEEPEST = 30  # sections and lists within one another
_ERRORS_SHOWN = 10

# ``must be ...``, by pydantic's type of the error. Of those that are not here, its own words.
_WORDS = {
    "bool_type": "true or false",
    "dict_type": "a section",
    "finite_number": "a finite number",
    "float_type": "a finite number",
    "greater_than": "more than {gt:g}",
    "greater_than_equal": "at least {ge:g}",
    "int_type": "a whole number",
    "less_than": "less than {lt:g}",
    "less_than_equal": "at most {le:g}",
    "literal_error": "one of {expected}",
    "model_type": "a section",
    "string_type": "text",
    "string_too_long": "at most {max_length} characters",
    "string_too_short": "at least {min_length} characters",
    "too_long": "a list of at most {max_length}",
    "too_short": "a list of at least {min_length}",
    "tuple_type": "a list",
}

AS_TUPLE = BeforeValidator(lambda value: tuple(value) if isinstance(value, list) else value)
"""For a field of tuples, since YAML has lists."""


def must(rule: Callable[[Any], object], words: str) -> AfterValidator:
    """A condition on a value of the right type: ``must be {words}``."""

    def check(value: Any) -> Any:
        if not rule(value):
            raise PydanticCustomError("rule", "{words}", {"words": words})
        return value

    return AfterValidator(check)


class SettingError(DistillError):
    """Keys or their values are wrong; ``complaints`` are pairs of a dotted key and what is wrong.

    The message has a line for each.
    """

    def __init__(self, *complaints: tuple[str, str]) -> None:
        super().__init__("\n".join(map(_complaint, complaints)))
        self.complaints = complaints

    def in_file(self, path: Path, lines: Lines, elsewhere: Sequence[str] = ()) -> DistillError:
        """The same, each with its line; where the key isn't in the file, with its section's.

        Args:
            path: the file.
            lines: where its keys are.
            elsewhere: keys whose values are from somewhere else.
        """
        found = []
        for complaint in self.complaints:
            key = complaint[0]
            if is_within(key, elsewhere):
                found.append(_complaint(complaint))
                continue
            while key and key not in lines:
                key = key.rpartition(".")[0]
            line = f", line {lines[key]}" if key else ""
            found.append(f"{path}{line}: {_complaint(complaint)}")
        return DistillError("\n".join(found))


class Settings(BaseModel):
    """A section of a recipe. ``True`` is no number here, ``"1"`` neither, and 1.5 is no count."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


def read(kind: type[M], tree: object) -> M:
    """``tree``, as YAML or JSON gives it, as the settings ``kind``.

    Raises:
        SettingError: unknown or missing keys, wrong types, or values out of range.
    """
    try:
        return kind.model_validate(tree)
    except ValidationError as error:
        found = error.errors(include_url=False)[:_ERRORS_SHOWN]
        raise SettingError(*(_explained(kind, details) for details in found)) from None


def to_tree(settings: BaseModel) -> dict[str, Any]:
    """Plain dicts and lists, fit for YAML and JSON."""
    return settings.model_dump(mode="json")


def parse_yaml(text: str, source: str) -> tuple[Any, Lines]:
    """What ``text`` holds: nothing but sections, lists and scalars; and where each key is.

    Raises:
        DistillError: it is not YAML, holds something else or too much of it; ``source`` and the
            line are named.
    """
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None, {}
        _measure(node, {})
        value = loader.construct_document(node)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f", line {mark.line + 1}" if mark else ""
        raise DistillError(f"{source}{line}: not readable as YAML: {error.problem}") from None
    except yaml.reader.ReaderError as error:
        line = f", line {1 + text.count(chr(10), 0, error.position)}"
        raise DistillError(f"{source}{line}: not readable as YAML: {error.reason}") from None
    return value, dict(_lines(node, ""))


def load_yaml(path: Path) -> tuple[dict[str, Any], Lines]:
    """The mapping that a YAML file holds, and where each of its keys is.

    Raises:
        DistillError: the file cannot be read, or holds something else.
    """
    try:
        with path.open("rb") as file:
            content = file.read(_LARGEST_FILE + 1)
        if len(content) > _LARGEST_FILE:
            raise DistillError(f"{path}: is larger than {_LARGEST_FILE >> 20} MiB, is it a recipe?")
        text = content.decode()
    except OSError as error:
        raise DistillError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        line = 1 + content.count(b"\n", 0, error.start)
        raise DistillError(f"{path}, line {line}: is not UTF-8: {error.reason}") from error
    tree, lines = parse_yaml(text, str(path))
    if not isinstance(tree, dict):
        raise DistillError(f"{path}: must hold keys and values, holds {_describe(tree)}")
    return tree, lines


def override(tree: dict[str, Any], assignments: Sequence[str]) -> list[str]:
    """Apply ``section.key=value`` assignments to ``tree``; values are read as YAML.

    Returns:
        The dotted keys.
    """
    keys = []
    for assignment in assignments:
        dotted, equals, text = assignment.partition("=")
        *sections, last = names = dotted.strip().split(".")
        if not equals or not all(names) or len(names) > _DEEPEST:
            raise DistillError(f"{_describe(assignment)}: an override is written section.key=value")
        branch = tree
        for depth, section in enumerate(sections):
            parent, branch = branch, branch.get(section, {})
            if not isinstance(branch, dict):
                where = ".".join(sections[: depth + 1])
                raise DistillError(
                    f"{dotted}: {where} is {_describe(branch)}, not a section; "
                    f"override it whole, as in {where}=..."
                )
            # A copy, since an alias may stand for the same section elsewhere.
            branch = parent[section] = dict(branch)
        branch[last], _ = parse_yaml(text, dotted)
        keys.append(".".join(names))
    return keys


def is_within(key: str, sections: Iterable[str]) -> bool:
    """Whether a dotted key is one of ``sections``, or in one."""
    return any(f"{key}.".startswith(f"{section}.") for section in sections)


class _Size(NamedTuple):
    """How many values there are, and how many levels of sections and lists around the innermost."""

    values: int
    levels: int


class _Loader(yaml.SafeLoader):
    """JSON's types alone, and an error with its line for all that PyYAML has none for."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        self._depth += 1
        if self._depth > _DEEPEST:
            raise yaml.composer.ComposerError(
                None, None, f"more than {_DEEPEST} levels deep", self.peek_event().start_mark
            )
        node: yaml.Node | None = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            problem = None
            if not isinstance(key, yaml.ScalarNode):
                problem = "a key must be text, this is a list or a section"
            elif key.value in seen:
                problem = f"{key.value}: given twice"  # PyYAML would keep the last
            if problem:
                raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except (ValueError, OverflowError, KeyError) as error:
            problem = f"{_short(node.value)} is no {node.tag.rpartition(':')[2]}: {error}"
            raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark) from None


def _restrict(loader: type[_Loader]) -> None:
    """Dates stay text, sets and bytes are refused, and ``1e-4`` is a number as in YAML 1.2."""
    kept = ("null", "bool", "int", "float", "str", "seq", "map")
    tags = [f"tag:yaml.org,2002:{name}" for name in kept]
    constructors = yaml.SafeLoader.yaml_constructors
    loader.yaml_constructors = {tag: constructors[tag] for tag in [*tags, None]}
    loader.yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in rules if not tag.endswith(":timestamp")]
        for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    number = re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+")
    loader.add_implicit_resolver("tag:yaml.org,2002:float", number, list("-+0123456789"))


_restrict(_Loader)


def _measure(node: yaml.Node, known: dict[int, _Size]) -> _Size:
    """The size of ``node`` with each alias in it spelt out.

    Raises:
        yaml.constructor.ConstructorError: it is too large, as that of what holds itself is.
    """
    if id(node) not in known:
        known[id(node)] = _Size(_MOST_VALUES, 0)  # until it is measured
        sizes = [_measure(child, known) for child in _children(node)]
        values = 1 + sum(size.values for size in sizes)
        known[id(node)] = _Size(values, 1 + max((size.levels for size in sizes), default=0))
    size = known[id(node)]
    problem = ""
    if size.values >= _MOST_VALUES:
        problem = f"stands for {_MOST_VALUES:,} values or more, with its aliases"
    elif size.levels > _DEEPEST:
        problem = f"is more than {_DEEPEST} levels deep, with its aliases"
    if problem:
        raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)
    return size


def _children(node: yaml.Node) -> list[yaml.Node]:
    if isinstance(node, yaml.MappingNode):
        return [child for item in node.value for child in item]
    return node.value if isinstance(node, yaml.SequenceNode) else []


def _lines(node: yaml.Node, dotted: str) -> Iterator[tuple[str, int]]:
    items: list[tuple[str, yaml.Node, yaml.Node]] = []
    if isinstance(node, yaml.MappingNode):
        items = [(key.value, key, value) for key, value in node.value]
    elif isinstance(node, yaml.SequenceNode):
        items = [(str(index), value, value) for index, value in enumerate(node.value)]
    for name, place, value in items:
        key = _join(dotted, name)
        yield key, place.start_mark.line + 1
        yield from _lines(value, key)


def _explained(kind: type[BaseModel], details: ErrorDetails) -> tuple[str, str]:
    """The dotted key of one of pydantic's errors, and what is wrong there."""
    section, names = kind, []
    for name in details["loc"]:
        if isinstance(name, int):
            names.append(str(name))
        elif name in section.model_fields:
            names.append(name)
            section = _model_in(section.model_fields[name].annotation) or section
        elif name == details["loc"][-1] and details["type"] in ("extra_forbidden", "missing"):
            names.append(str(name))
        # All else names a member of a union, or that a key is meant.
    dotted, problem = ".".join(names), details["type"]
    if problem in ("extra_forbidden", "invalid_key"):
        fields = list(section.model_fields)
        hint = did_you_mean(names[-1], fields) or f"; known here: {', '.join(fields)}"
        return dotted, f"unknown key{hint}"
    if problem == "missing":
        return dotted, "missing"
    context = details.get("ctx", {})
    words = _WORDS.get(problem, details["msg"].removeprefix("Input should be ")).format(**context)
    if problem == "model_type":
        words += f" with the keys {', '.join(section.model_fields)}"
    value = details["input"]
    known = re.findall(r"'([^']*)'", context.get("expected", ""))
    near = did_you_mean(value, known) if isinstance(value, str) else ""
    return dotted, f"is {_describe(value)}, must be {words}{near}"


def _model_in(hint: Any) -> type[BaseModel] | None:
    """The settings that a field's type holds, if any: its own, or a list's or a union's."""
    if typing.get_origin(hint) is None:  # in Python 3.10 tuple[int] counts as a type, too
        return hint if isinstance(hint, type) and issubclass(hint, BaseModel) else None
    return next(filter(None, map(_model_in, typing.get_args(hint))), None)


def _describe(value: Any) -> str:
    if value is None:
        return "empty"
    if isinstance(value, dict):
        return "a section"
    if isinstance(value, (list, tuple)):
        return f"the list {_short(list(value))}"
    return _short(value)


_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 100


def _short(value: object) -> str:
    return _SHORT.repr(value)


def _complaint(complaint: tuple[str, str]) -> str:
    return ": ".join(filter(None, complaint))


def _join(where: str, key: object) -> str:
    return f"{where}.{key}" if where else str(key)
