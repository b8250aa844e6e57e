"""What tables of contenders have in common: a line for each of them, and its cells."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from benchmarks.report.layout import short
from benchmarks.report.runs import Contest, Result, Timing
from benchmarks.tables import MIB, digits, times, with_spread

RATIO = "time over that of the first of ours (above 1x ours is faster)"


class Line(NamedTuple):
    """One contender in one contest."""

    contest: Contest
    name: str

    @property
    def result(self) -> Result | None:
        return self.contest.results.get(self.name)


def lines_of(contests: Sequence[Contest]) -> list[Line]:
    """Everyone who took part in any."""
    return [Line(contest, name) for contest in contests for name in contest.names]


def milliseconds(time: Timing) -> str:
    """Median and half the interquartile range."""
    return with_spread(time.median * 1e3, time.spread * 1e3)


def mebibytes(peak: int | None) -> str:
    """A size; empty where it is not known."""
    return "" if peak is None else digits(peak / MIB)


def batch(contest: Contest) -> str:
    return next((str(result.info["batch"]) for result in contest.results.values()), "")


def of_result(value: Callable[[Result], str]) -> Callable[[Line], str]:
    """The same of a line, empty where there is no result."""
    return lambda line: value(line.result) if line.result else ""


def time_or_reason(line: Line) -> str:
    """The time, marked where the device may have waited for launches; else why there is none."""
    if line.result is None:
        return short(line.contest.missing[line.name].reason)
    gaps = " (with gaps)" if line.result.info.get("full_queue") is False else ""
    return digits(line.result.time.median * 1e3) + gaps


def clock(name: str) -> Callable[[Line], str]:
    """What another clock said; of a replay that is not possible, why."""

    def value(line: Line) -> str:
        time = line.result.timing(name) if line.result else None
        if time is not None:
            return milliseconds(time)
        return short(line.result.info.get(f"{name}_reason") or "") if line.result else ""

    return value


def fact(name: str, show: Callable[[Any], str]) -> Callable[[Line], str]:
    """Something recorded beside the times; empty where it is not known."""

    def value(line: Line) -> str:
        found = line.result.info.get(name) if line.result else None
        return "" if found is None else show(found)

    return value


def error(value: float) -> str:
    return f"{value:.1e}"


def ratio(line: Line) -> str:
    return times(line.contest.ratio(line.name)) if line.result else ""
