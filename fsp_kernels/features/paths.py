"""Paths to tensors in a network, such as ``layer3:output[0]``, and choosing by them."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

from torch import Tensor

from fsp_kernels.errors import DistillError

_SIDE = re.compile(r"(input|output)((?:\[[^\[\]]+\]|\.\w+)*)")
_KEY = re.compile(r"\[([^\[\]]+)\]|\.(\w+)")
_NUMBER = re.compile(r"-?\d{1,9}")
_SHOWN = 4  # choices in one message


class Path(NamedTuple):
    """``"layer3:output[0]"``: the module ``layer3``, its ``output``, and of that the item 0."""

    text: str
    module: str
    side: str
    keys: tuple[int | str, ...]


def parse_path(text: str) -> Path:
    """Parse a path; without a colon it is a module's output.

    Raises:
        DistillError: after the colon, ``text`` is not as it must be.
    """
    module, colon, rest = text.partition(":")
    match = _SIDE.fullmatch(rest if colon else "output")
    if not match:
        raise DistillError(
            f"{text}: ends in {rest!r}, must end in ':input' or ':output', or in what to choose in "
            "those, as ':output[0]' or ':output.logits'"
        )
    side, keys = match.groups()
    names = [index or name for index, name in _KEY.findall(keys)]
    return Path(text, module, side, tuple(int(n) if _NUMBER.fullmatch(n) else n for n in names))


def select(value: object, path: Path) -> Tensor:
    """The tensor that ``path`` chooses in ``value``, a module's input or output.

    Raises:
        DistillError: there is none; the message lists what could be chosen.
    """
    # Text only where there is an error: compiled code may have no number at hand, only its symbol.
    for i, key in enumerate(path.keys):
        found = _item(value, key)
        if found is None:
            chosen = _chosen(path, i)
            raise DistillError(
                f"{path.text}: has no {key!r}, as {chosen} is {describe(value)}"
                f"{choices(value, chosen)}"
            )
        value = found
    if not isinstance(value, Tensor):
        hint = choices(value, _chosen(path, len(path.keys))) or "; tap a submodule of it"
        raise DistillError(f"{path.text}: is {describe(value)}, not a tensor{hint}")
    return value


def describe(value: object) -> str:
    """``"a tuple of 2"``, for a message."""
    size = f" of {len(value)}" if isinstance(value, (tuple, list, Mapping)) else ""
    kind = type(value).__name__
    return f"{'an' if kind[0] in 'aeiouAEIOU' else 'a'} {kind}{size}"


def choices(value: object, chosen: str) -> str:
    """``"; choose :output[0] or :output[1]"``, where ``value`` is a tensor or holds any."""
    found = [f"{chosen}{keys}" for keys, _ in tensors_in(value)]
    more = f" or {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
    return f"; choose {' or '.join(found[:_SHOWN])}{more}" if found else ""


def tensors_in(value: object) -> Iterator[tuple[str, Tensor]]:
    """Every tensor within tuples, mappings and dataclasses, and the keys that choose it."""
    items: Iterable[tuple[object, object]] = ()
    if isinstance(value, Tensor):
        yield "", value
    elif isinstance(value, Mapping):
        items = value.items()
    elif isinstance(value, (tuple, list)):
        items = enumerate(value)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        items = [(field.name, getattr(value, field.name)) for field in dataclasses.fields(value)]
    for key, item in items:
        for keys, tensor in tensors_in(item):
            yield f"{_step(key)}{keys}", tensor


def _item(value: object, key: int | str) -> object:
    """``value[key]`` or ``value.key``; ``None`` if there is none."""
    if isinstance(value, Tensor):  # its items are those of the batch
        return None
    if isinstance(value, Mapping):  # its keys may be numbers written as text
        return value.get(key, value.get(str(key)))
    if isinstance(key, str):
        return getattr(value, key, None)
    if isinstance(value, (tuple, list)) and -len(value) <= key < len(value):
        return value[key]
    return None


def _chosen(path: Path, count: int) -> str:
    """What the first keys of a path choose, as ``":output[0].logits"``."""
    return f":{path.side}" + "".join(map(_step, path.keys[:count]))


def _step(key: object) -> str:
    return f".{key}" if isinstance(key, str) and key.isidentifier() else f"[{key}]"
