"""The one exception a person at the command line is meant to read."""

from __future__ import annotations

import difflib
import sysconfig
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

# A user's file is in none of these: Python's own, installed packages, and this one.
_LIBRARIES = [
    *(Path(sysconfig.get_path(name)) for name in ("stdlib", "platstdlib", "purelib", "platlib")),
    Path(__file__).parents[1],
]
_PLAIN = (ValueError, TypeError, RuntimeError, ImportError, SyntaxError)  # these say what is wrong
_FRAMES = 3  # of a traceback in one message


class DistillError(ValueError):
    """Something the user gave cannot be used; the message says what, and what would do."""


class DamagedError(DistillError):
    """A file of this program's own is damaged."""


def did_you_mean(wrong: str, known: Iterable[str], limit: int = 1) -> str:
    """``"; did you mean 'steps'?"`` where ``wrong`` is close to a known name, else ``""``."""
    close = difflib.get_close_matches(wrong, list(known), n=limit)
    return f"; did you mean {' or '.join(map(repr, close))}?" if close else ""


@contextmanager
def prefixed(where: str) -> Iterator[None]:
    """What is wrong with a value inside becomes a ``DistillError`` that begins with ``where``."""
    try:
        yield
    except (ValueError, TypeError, IndexError) as error:
        raise DistillError(f"{where}: {error}") from error


def explain(error: BaseException) -> str:
    """What a user's code raised and, a line each, the last places in that code that led there."""
    kind, text = type(error).__name__, str(error)
    if not (text and isinstance(error, _PLAIN)):
        text = f"{kind}: {text}" if text else kind
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if _is_users(frame)]
    places = (f"  {x.filename}:{x.lineno}, in {x.name}: {x.line}" for x in frames[-_FRAMES:])
    return "\n".join([text, *places])


def _is_users(frame: traceback.FrameSummary) -> bool:
    path = Path(frame.filename)
    return path.is_absolute() and not any(map(path.is_relative_to, _LIBRARIES))
