"""The measuring loop: whose turn it is, what is timed, and who is not measured."""

import time
from collections import Counter

import pytest
import torch

from benchmarks.checks import Prepared
from benchmarks.contenders import Contender
from benchmarks.measure import NotRun, Rounds, measure, summarise, turns

NO_LIMIT = Rounds(most=4, least=4, seconds=0.0)


def nothing():
    pass


def contender(name, max_rounds=None):
    return Contender(name, lambda: nothing, max_rounds)


def rows_of(*contenders, rounds=NO_LIMIT, step=nothing, **errors):
    def prepare(who):
        if who.name in errors:
            raise errors[who.name]
        return Prepared([step], {"batch": 3})

    return {row["contender"]: row for row in measure(contenders, prepare, "cpu", rounds)}


def test_each_contender_has_a_turn_in_every_round():
    order = "".join(turns("abc", 5, {}))
    assert [sorted(order[i : i + 3]) for i in range(0, 15, 3)] == [["a", "b", "c"]] * 5


def test_no_contender_always_follows_the_same_neighbour():
    order = "".join(turns("abcd", 30, {}))
    before = Counter(order[i - 1] for i in range(1, len(order)) if order[i] == "a")
    assert all(before[name] >= 5 for name in "bcd")


def test_the_order_is_the_same_in_every_run():
    assert list(turns("abcd", 9, {})) == list(turns("abcd", 9, {}))


@pytest.mark.parametrize(
    ("round_seconds", "count"),
    [(0.1, 30), (0.5, 12), (1.0, 7), (6.0, 7), (6.1, 2), (100.0, 2), (1e-9, 30)],
)
def test_rounds_are_as_many_as_there_is_time_for(round_seconds, count):
    assert Rounds(most=30, least=7, seconds=6.0).affordable(round_seconds) == count


def test_rounds_that_are_asked_for_are_taken():
    assert Rounds(most=9, least=9, seconds=0.0).affordable(round_seconds=100.0) == 9


def test_a_first_round_tells_how_many_there_are(monkeypatch):
    now = 0.0

    def wait():
        nonlocal now
        now += 1.0

    monkeypatch.setattr(time, "perf_counter", lambda: now)
    rounds = Rounds(most=30, least=3, seconds=10.0)
    found = rows_of(contender("x"), contender("y"), rounds=rounds, step=wait)
    assert [(row["rounds"], row["median"]) for row in found.values()] == [(5, 1.0), (5, 1.0)]


def test_a_slow_contender_has_fewer_rounds():
    found = rows_of(contender("fast"), contender("slow", max_rounds=2))
    assert {name: row["rounds"] for name, row in found.items()} == {"fast": 4, "slow": 2}


def test_times_are_medians_with_their_interquartile_range():
    readings = [{"device": x, "eager": 2 * x} for x in (1.0, 2.0, 3.0, 4.0, 100.0)]
    assert summarise(readings) == {
        "rounds": 5,
        "median": 3.0,
        "iqr": 2.0,
        "eager_median": 6.0,
        "eager_iqr": 4.0,
    }
    assert summarise(readings[:1])["iqr"] == 0


@pytest.mark.parametrize(
    ("error", "reason", "fault"),
    [
        (NotRun("not run: too large"), "not run: too large", False),
        (torch.OutOfMemoryError("no room"), "out of memory", False),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "out of memory", False),
        (AssertionError("off"), "wrong", True),
        (ValueError("what"), "failed: ValueError", True),
    ],
)
def test_a_contender_that_fails_says_why_and_the_others_are_measured(error, reason, fault):
    found = rows_of(contender("failing"), contender("x"), failing=error)
    assert list(found) == ["failing", "x"]
    assert (found["failing"]["reason"], found["failing"]["fault"]) == (reason, fault)
    assert found["x"]["rounds"] == 4


def test_a_contender_may_fail_while_it_is_timed():
    def fail():
        raise torch.OutOfMemoryError

    assert rows_of(contender("x"), step=fail)["x"]["reason"] == "out of memory"
