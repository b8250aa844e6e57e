"""The one exception a person at the command line is meant to read."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class DistillError(ValueError):
    """Something the user gave cannot be used; the message says what, and what would do."""


class DamagedError(DistillError):
    """A file of this program's own is damaged, or was written by another version of it."""


def did_you_mean(wrong: str, known: Iterable[str], limit: int = 1) -> str:
    """``"; did you mean 'steps'?"`` where ``wrong`` is close to a known name, else ``""``."""
    close = difflib.get_close_matches(wrong, list(known), n=limit)
    return f"; did you mean {' or '.join(map(repr, close))}?" if close else ""
