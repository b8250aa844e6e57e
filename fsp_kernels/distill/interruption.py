"""SIGTERM and Ctrl-C end a run after the step at hand, with its state saved."""

from __future__ import annotations

import signal
from types import FrameType


class InterruptedRunError(Exception):
    """A run stopped because a signal asked it to.

    ``number`` is the signal's, ``exit_code`` what a shell reports of a process that it ended.
    """

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message)
        self.number, self.exit_code = number, 128 + number


class Interruption:
    """Inside a ``with`` block the first SIGTERM or SIGINT is noted, not obeyed; the second is.

    One that the process ignores, as a shell has its background jobs ignore Ctrl-C, it still does.
    ``requested`` is the number of the signal, 0 while there was none.
    """

    _SIGNALS = (signal.SIGTERM, signal.SIGINT)

    def __init__(self) -> None:
        self.requested = 0
        self._before: dict[signal.Signals, object] = {}

    def check(self) -> None:
        """Obey, if there was a signal.

        Raises:
            InterruptedRunError: there was.
        """
        if self.requested:
            raise InterruptedRunError("stopped while measuring", self.requested)

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
