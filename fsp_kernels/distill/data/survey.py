"""Every image is looked at once before training, so that none ends it halfway."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

from accelerate import PartialState
from accelerate.utils import gather_object

from fsp_kernels.distill.config import Data
from fsp_kernels.distill.data.images import CorruptImageError
from fsp_kernels.distill.errors import DistillError

T = TypeVar("T")
Say = Callable[[str], None]

_SHOWN = 3  # errors of as many images


class Surveyed(Protocol[T]):
    """A part of a data set."""

    def __len__(self) -> int: ...

    def survey(self, numbers: Sequence[int]) -> list[T | DistillError]:
        """What is found of the image at each of ``numbers``, or what is wrong with it."""


def survey(parts: Sequence[Surveyed[T]], data: Data, where: str, say: Say) -> list[dict[int, T]]:
    """What is found of each part's images, by number; those to be left out are not in it.

    Each process of a group looks at its share, and all get the same. All must call this.

    Raises:
        DistillError: an image is not as it has to be, or is corrupt and the recipe says "refuse".
    """
    count = sum(map(len, parts))
    say(f"{where}: reading {count} images once")
    found = [_shared_out(part) for part in parts]
    errors = [x for part in found for x in part if isinstance(x, DistillError)]
    wrong = [error for error in errors if not isinstance(error, CorruptImageError)]
    if wrong:
        raise DistillError(_listed(wrong, where, count, "are not as they must be"))
    if errors and data.corrupt != "skip":
        text = _listed(errors, where, count, "cannot be read")
        raise DistillError(f"{text}\n{where}.corrupt=skip leaves them out")
    if errors:
        say(_listed(errors, where, count, "cannot be read and are left out"))
    kept = [
        {number: x for number, x in enumerate(part) if not isinstance(x, DistillError)}
        for part in found
    ]
    if not all(kept):
        raise DistillError(_listed(errors, where, count, "cannot be read, and none is left"))
    return kept


def _shared_out(part: Surveyed[T]) -> list[T | DistillError]:
    state = PartialState()
    share = range(state.process_index, len(part), state.num_processes)
    shares = gather_object([part.survey(share)])
    found: list[T | DistillError] = [None] * len(part)  # type: ignore[list-item]
    for first, of_process in enumerate(shares):
        found[first :: len(shares)] = of_process
    return found


def _listed(errors: Sequence[DistillError], where: str, count: int, what: str) -> str:
    lines = [f"{where}: {len(errors)} of {count} images {what}:", *map(str, errors[:_SHOWN])]
    return "\n".join([*lines, "..."] if len(errors) > _SHOWN else lines)
