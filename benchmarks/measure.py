"""The measuring loop: contenders take turns on the same tensors, on a CPU or on a GPU."""

from __future__ import annotations

import gc
import math
import random
import statistics
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Protocol

import torch

from benchmarks import gpu_timing
from benchmarks.checks import Prepared, Row
from benchmarks.contenders import Contender

OUT_OF_MEMORY = "out of memory"
Readings = dict[str, float]  # seconds of a step by clock: "device", on a GPU also "eager", "replay"


class NotRun(Exception):  # noqa: N818  (it is no error)
    """The reason why a contender is not run, as tables show it."""


@dataclass(frozen=True)
class Rounds:
    """The number of rounds: ``most``, or fewer if they take over ``seconds``, but ``least``.

    If a single round takes over ``seconds``, a quarter of ``least`` is enough. 0: no limit.
    """

    most: int
    least: int
    seconds: float

    def affordable(self, round_seconds: float) -> int:
        """The number of rounds there is time for."""
        if 0 < self.seconds < round_seconds:
            return math.ceil(self.least / 4)
        return max(self.least, min(self.most, math.floor(self.seconds / round_seconds)))


class Timer(Protocol):
    """Times one contender."""

    def turn(self) -> Readings:
        """Time one round."""

    def forget(self) -> None:
        """Leave the rounds so far out of ``facts``."""

    def facts(self) -> Row:
        """What is recorded beside the times."""


class CpuTimer:
    """Times one contender on a CPU, a step in each round."""

    def __init__(self, prepared: Prepared):
        self._step = prepared.steps[0]

    def turn(self) -> Readings:
        start = time.perf_counter()
        self._step()
        return {"device": time.perf_counter() - start}

    def forget(self) -> None:
        pass

    def facts(self) -> Row:
        return {}


def failure(error: Exception) -> Row:
    """The row of a contender that could not be measured; ``fault`` tells a defect from a limit.

    The error of a defect is printed.
    """
    if isinstance(error, NotRun):
        return {"reason": str(error), "fault": False}
    # CPU allocations fail with a plain RuntimeError.
    if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error):
        return {"reason": OUT_OF_MEMORY, "fault": False}
    traceback.print_exception(error)
    kind = "wrong" if isinstance(error, AssertionError) else f"failed: {type(error).__name__}"
    return {"reason": kind, "fault": True}


@contextmanager
def without_garbage_collection() -> Iterator[None]:
    """Keep the garbage collector from running while a contender is timed."""
    was_collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_collecting:
            gc.enable()


def turns(names: Sequence[str], rounds: int, limits: Mapping[str, int]) -> Iterator[str]:
    """Every name in every round, so that a slow moment of the machine slows all alike.

    Each round has another order, the same in every run. So no contender always runs after the same
    neighbour and finds that neighbour's data in the cache.
    """
    for turn in range(rounds):
        order = list(names)
        random.Random(turn).shuffle(order)
        for name in order:
            if turn < limits.get(name, rounds):
                yield name


def summarise(readings: Sequence[Readings]) -> Row:
    """Median and interquartile range of each clock; the columns of "device" have no prefix."""
    row: Row = {"rounds": len(readings)}
    for clock in readings[0]:
        seconds = [reading[clock] for reading in readings]
        prefix = "" if clock == "device" else f"{clock}_"
        row[f"{prefix}median"] = statistics.median(seconds)
        row[f"{prefix}iqr"] = spread(seconds)
    return row


def spread(values: Sequence[float]) -> float:
    """The interquartile range, with quartiles interpolated; 0 of a single value."""
    if len(values) < 2:
        return 0.0
    lower, _, upper = statistics.quantiles(values, method="inclusive")
    return upper - lower


def measure(
    chosen: Sequence[Contender],
    prepare: Callable[[Contender], Prepared],
    device: str,
    rounds: Rounds,
) -> list[Row]:
    """A row for each contender: its times and facts, or the reason why there are none.

    ``prepare`` builds a contender and checks what it computes. It raises AssertionError where that
    is wrong, and NotRun where the contender is not run. A contender that fails does not stop the
    others. A first round, which does not count, warms up and tells how many rounds there is time
    for; contenders with ``max_rounds`` do not take part in it.
    """
    rows: dict[str, Row] = {}
    timers: dict[str, Timer] = {}
    on_gpu = device == "cuda"
    with gpu_timing.own_stream() if on_gpu else nullcontext(), without_garbage_collection():
        for contender in chosen:
            try:
                prepared = prepare(contender)
                timers[contender.name] = (gpu_timing.GpuTimer if on_gpu else CpuTimer)(prepared)
                rows[contender.name] = dict(prepared.facts)
            except Exception as error:
                rows[contender.name] = failure(error)
            gc.collect()
            torch.cuda.empty_cache()  # the next contender finds as much memory as the first did
        limits = {c.name: c.max_rounds for c in chosen if c.max_rounds is not None}
        rows |= take_turns(timers, rows, limits, rounds)
    return [{"contender": c.name, "ours": c.ours} | rows[c.name] for c in chosen]


def take_turns(
    timers: dict[str, Timer], facts: Mapping[str, Row], limits: Mapping[str, int], rounds: Rounds
) -> dict[str, Row]:
    """Time all contenders in turns; ``facts`` become part of their rows."""
    readings: dict[str, list[Readings]] = {name: [] for name in timers}
    failed: dict[str, Row] = {}

    def take(names: Iterator[str]) -> None:
        for name in names:
            try:
                if name not in failed:
                    readings[name].append(timers[name].turn())
            except Exception as error:
                failed[name] = failure(error)

    start = time.perf_counter()
    take(name for name in timers if name not in limits)
    count = rounds.affordable(time.perf_counter() - start or 1e-9)
    for name, timer in timers.items():
        readings[name].clear()
        timer.forget()
    take(turns(list(timers), count, limits))
    timed = [name for name in timers if name not in failed]
    return failed | {
        name: facts[name] | timers[name].facts() | summarise(readings[name]) for name in timed
    }
