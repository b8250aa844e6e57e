"""Hand durations measured elsewhere to pytest-benchmark.

pytest-benchmark times one function to its end before it starts the next, so a busy moment of the
machine falls on one contender only. We measure all of them turn by turn (``measure.py``) and let
pytest-benchmark time a replay: its clock stands still but for the recorded durations. Statistics,
comparison tables and JSON are then its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence


class ReplayClock:
    """A timer that moves by the next recorded duration whenever ``step`` is called.

    ``rewind`` (pedantic mode's ``setup``) sets it to zero before each round, since the difference
    of two later readings would round the duration.
    """

    def __init__(self) -> None:
        self._now = 0.0
        self._durations: Iterator[float] = iter(())

    def load(self, durations: Sequence[float]) -> None:
        """What the next calls of ``step`` will take, in seconds."""
        self._durations = iter(durations)

    def now(self) -> float:
        """Seconds since the last ``rewind``."""
        return self._now

    def rewind(self) -> None:
        """Start a round."""
        self._now = 0.0

    def step(self) -> None:
        """Let the next recorded duration pass."""
        self._now += next(self._durations)


CLOCK = ReplayClock()  # of all benchmarks: pytest takes them one after the other
