"""SIGTERM and Ctrl-C end a run after the current step, with its state saved."""

from __future__ import annotations

import signal
from types import FrameType


class InterruptedRunError(Exception):
    """A run stopped because of the signal ``number``; ``exit_code`` is a shell's code for it."""

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message)
        self.number, self.exit_code = number, 128 + number


class Interruption:
    """Inside a ``with`` block the first SIGTERM or SIGINT is only noted; the second is obeyed.

    A signal that the process ignores stays ignored, as a shell's background jobs ignore Ctrl-C.
    ``requested`` is the number of the noted signal, 0 if there is none.
    """

    _SIGNALS = (signal.SIGTERM, signal.SIGINT)

    def __init__(self) -> None:
        self.requested = 0
        self._before: dict[signal.Signals, object] = {}

    def check(self) -> None:
        """Raise ``InterruptedRunError`` if a signal was noted."""
        if self.requested:
            raise InterruptedRunError("stopped during an evaluation", self.requested)

    def __enter__(self) -> Interruption:
        heeded = [n for n in self._SIGNALS if signal.getsignal(n) is not signal.SIG_IGN]
        self._before = {number: signal.signal(number, self._note) for number in heeded}
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()

    def _note(self, number: int, _frame: FrameType | None) -> None:
        self.requested = number
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        self._before = {}
