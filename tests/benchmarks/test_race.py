"""Turns on a CPU: whose they are, what is timed, and who does not take part."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable

import pytest
import torch

from benchmarks.race import Entrant, NotRun, Outcome, Prepared, Rounds, interleave, on_cpu, turns

NO_LIMIT = Rounds(most=4, least=4, seconds=0.0)


def nothing() -> None:
    pass


def entrant(name: str, step: Callable[[], object] = nothing, **options: int) -> Entrant:
    return Entrant(name, lambda: Prepared([step], {"who": name}), **options)


def failing(error: Exception) -> Entrant:
    def prepare() -> Prepared:
        raise error

    return Entrant("failing", prepare)


def test_everyone_has_a_turn_in_every_round() -> None:
    order = "".join(turns("abc", 5, {}))
    assert [sorted(order[i : i + 3]) for i in range(0, 15, 3)] == [["a", "b", "c"]] * 5


def test_no_one_always_follows_the_same_neighbour() -> None:
    order = "".join(turns("abcd", 30, {}))
    before = Counter(order[i - 1] for i in range(1, len(order)) if order[i] == "a")
    assert all(before[name] >= 5 for name in "bcd")


def test_the_order_is_the_same_in_every_run() -> None:
    assert list(turns("abcd", 9, {})) == list(turns("abcd", 9, {}))


def test_a_slow_step_sits_out_after_its_rounds() -> None:
    steps = {"fast": nothing, "slow": nothing}
    durations = interleave(steps, 5, {"slow": 2})
    assert {name: len(found) for name, found in durations.items()} == {"fast": 5, "slow": 2}


@pytest.mark.parametrize(
    ("round_seconds", "count"), [(0.1, 30), (0.5, 12), (1.0, 7), (100.0, 7), (1e-9, 30)]
)
def test_rounds_are_as_many_as_there_is_time_for(round_seconds: float, count: int) -> None:
    assert Rounds(most=30, least=7, seconds=6.0).affordable(round_seconds) == count


def test_a_first_round_tells_how_many_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0

    def wait() -> None:
        nonlocal now
        now += 1.0

    monkeypatch.setattr(time, "perf_counter", lambda: now)
    rounds = Rounds(most=30, least=3, seconds=10.0)
    outcomes = on_cpu([entrant("x", wait), entrant("y", wait)], rounds)
    assert [len(outcomes[name].durations) for name in "xy"] == [5, 5]


def test_the_times_stand_beside_the_facts() -> None:
    outcomes = on_cpu([entrant("x"), entrant("y", max_rounds=2)], NO_LIMIT)
    assert [(len(o.durations), o.facts) for o in outcomes.values()] == [
        (4, {"who": "x"}),
        (2, {"who": "y"}),
    ]


@pytest.mark.parametrize(
    ("error", "outcome"),
    [
        (NotRun("not run: too large"), Outcome(reason="not run: too large")),
        (torch.OutOfMemoryError("no room"), Outcome(reason="out of memory")),
        (
            RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried 1 byte"),
            Outcome(reason="out of memory"),
        ),
        (AssertionError("off"), Outcome(reason="wrong", fault=True)),
        (ValueError("what"), Outcome(reason="failed: ValueError", fault=True)),
    ],
)
def test_who_cannot_be_timed_says_so_and_the_others_are(error: Exception, outcome: Outcome) -> None:
    outcomes = on_cpu([failing(error), entrant("x")], NO_LIMIT)
    assert list(outcomes) == ["failing", "x"]
    assert outcomes["failing"] == outcome
    assert outcomes["x"].durations
