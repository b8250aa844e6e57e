"""Contenders timed against each other: who takes part, whose turn it is, and what came of it."""

from __future__ import annotations

import gc
import math
import random
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

Step = Callable[[], object]
OUT_OF_MEMORY = "out of memory"


class Prepared(NamedTuple):
    """A contender that is ready to be timed.

    ``steps`` do the work that is timed, one for each copy of the inputs (on a GPU they take turns,
    so that no copy is found in its cache; a CPU has one). A step leaves no gradient behind.
    ``facts`` are recorded beside the times.
    """

    steps: Sequence[Step]
    facts: dict[str, Any]


@dataclass(frozen=True)
class Entrant:
    """One way to do the work being timed.

    ``prepare`` builds it and checks what it computes; an AssertionError says it is wrong,
    ``NotRun`` why it does not take part. ``max_rounds`` bounds the rounds of one too slow on a CPU
    to be timed as often as the others.
    """

    name: str
    prepare: Callable[[], Prepared]
    max_rounds: int | None = None


class NotRun(Exception):  # noqa: N818  (it is no error)
    """Why an entrant does not take part, as in a table."""


@dataclass(frozen=True)
class Outcome:
    """``durations`` in seconds, in the order of the rounds, and what is recorded beside them.

    Where ``reason`` says why there are none, ``fault`` tells a defect from a limit of the device.
    """

    durations: list[float] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    reason: str | None = None
    fault: bool = False


@dataclass(frozen=True)
class Rounds:
    """How often each takes its turn: ``most`` times, or less if that takes over ``seconds``."""

    most: int
    least: int
    seconds: float

    def affordable(self, round_seconds: float) -> int:
        """Rounds there is time for."""
        return max(self.least, min(self.most, math.floor(self.seconds / round_seconds)))


Race = Callable[[Sequence[Entrant], Rounds], dict[str, Outcome]]


def failure(error: Exception) -> Outcome:
    """A contender that cannot be timed costs its own row, never the others' results."""
    if isinstance(error, NotRun):
        return Outcome(reason=str(error))
    # CPU allocations fail with a plain RuntimeError.
    if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error):
        return Outcome(reason=OUT_OF_MEMORY)
    traceback.print_exception(error)
    kind = "wrong" if isinstance(error, AssertionError) else f"failed: {type(error).__name__}"
    return Outcome(reason=kind, fault=True)


@contextmanager
def without_garbage_collection() -> Iterator[None]:
    """A collection would fall on whoever happens to be timed."""
    was_collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_collecting:
            gc.enable()


def turns(names: Sequence[str], rounds: int, max_rounds: Mapping[str, int]) -> Iterator[str]:
    """Every name in every round, so that whatever slows the machine down slows all alike.

    Each round has an order of its own, the same in every run: no one always runs after the same
    neighbour, with its leftovers in cache.
    """
    for turn in range(rounds):
        order = list(names)
        random.Random(turn).shuffle(order)
        for name in order:
            if turn < max_rounds.get(name, rounds):
                yield name


def interleave(
    steps: Mapping[str, Step], rounds: int, max_rounds: Mapping[str, int]
) -> dict[str, list[float]]:
    """Time all steps in turns."""
    durations: dict[str, list[float]] = {name: [] for name in steps}
    with without_garbage_collection():
        for name in turns(list(steps), rounds, max_rounds):
            start = time.perf_counter()
            steps[name]()
            durations[name].append(time.perf_counter() - start)
    return durations


def on_cpu(entrants: Sequence[Entrant], rounds: Rounds) -> dict[str, Outcome]:
    """Time all of them on a CPU; a first round, which warms up, tells how many there is time for.

    An entrant that fails, or would not fit, says so in place of its times.
    """
    ready: dict[str, Prepared] = {}
    failed: dict[str, Outcome] = {}
    for entrant in entrants:
        try:
            ready[entrant.name] = entrant.prepare()
        except Exception as error:
            failed[entrant.name] = failure(error)
    steps = {name: prepared.steps[0] for name, prepared in ready.items()}
    limits = {x.name: x.max_rounds for x in entrants if x.max_rounds is not None}
    often = {name: step for name, step in steps.items() if name not in limits}
    first = interleave(often, 1, {})
    count = rounds.affordable(sum(sum(found) for found in first.values()) or 1e-9)
    durations = interleave(steps, count, limits)
    timed = {name: Outcome(durations[name], prepared.facts) for name, prepared in ready.items()}
    return {x.name: (timed | failed)[x.name] for x in entrants}
