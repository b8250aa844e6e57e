"""Errors about networks, recipes and files that a user gave, and the words they are made of."""

from __future__ import annotations

import difflib
import sysconfig
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

# Code in these folders is not the user's: Python, installed packages, and this package.
_LIBRARIES = [
    *(Path(sysconfig.get_path(name)) for name in ("stdlib", "platstdlib", "purelib", "platlib")),
    Path(__file__).parent,
]
# The messages of these errors are clear without the name of the error.
_PLAIN = (ValueError, TypeError, RuntimeError, ImportError, SyntaxError)
_FRAMES = 3  # of a traceback in one message


class DistillError(ValueError):
    """Something that the user gave cannot be used; the message says what, and what can."""


class DamagedError(DistillError):
    """A file that this program wrote is damaged."""


def did_you_mean(wrong: str, known: Iterable[str], limit: int = 1) -> str:
    """``"; did you mean 'steps'?"`` if ``wrong`` is close to a known name, else ``""``."""
    close = difflib.get_close_matches(wrong, list(known), n=limit)
    return f"; did you mean {' or '.join(map(repr, close))}?" if close else ""


@contextmanager
def prefixed(where: str) -> Iterator[None]:
    """Turn an error about a value into a ``DistillError`` that begins with ``where``."""
    try:
        yield
    except (ValueError, TypeError, IndexError) as error:
        raise DistillError(f"{where}: {error}") from error


def explain(error: BaseException) -> str:
    """The message of an error in a user's code, and the last lines of that code that led to it."""
    kind, text = type(error).__name__, str(error)
    if not (text and isinstance(error, _PLAIN)):
        text = f"{kind}: {text}" if text else kind
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if _is_users(frame)]
    places = (f"  {x.filename}:{x.lineno}, in {x.name}: {x.line}" for x in frames[-_FRAMES:])
    return "\n".join([text, *places])


def _is_users(frame: traceback.FrameSummary) -> bool:
    path = Path(frame.filename)
    return path.is_absolute() and not any(map(path.is_relative_to, _LIBRARIES))
