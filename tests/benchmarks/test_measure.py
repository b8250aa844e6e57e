"""Interleaved timing and the check before it."""

from __future__ import annotations

import time

import pytest
import torch

from benchmarks import contenders, peers
from benchmarks.contenders import Contender
from benchmarks.measure import interleave, relative_error, time_workload
from benchmarks.workloads import Workload

TINY = Workload("tiny", 8, (((4, 6), (3, 6)), ((3, 6), (5, 3))))


def test_steps_take_turns_and_the_order_rotates() -> None:
    calls: list[str] = []
    steps = {name: lambda name=name: calls.append(name) for name in "abc"}
    interleave(steps, 3, {}, between=lambda: None)
    assert "".join(calls) == "abcbcacab"


def test_a_slow_step_sits_out_after_its_rounds() -> None:
    durations = interleave(
        {"fast": lambda: None, "slow": lambda: None}, 5, {"slow": 2}, between=lambda: None
    )
    assert {name: len(found) for name, found in durations.items()} == {"fast": 5, "slow": 2}


def test_what_happens_between_steps_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0

    def wait(seconds: float) -> None:
        nonlocal now
        now += seconds

    monkeypatch.setattr(time, "perf_counter", lambda: now)
    durations = interleave({"step": lambda: wait(2.0)}, 3, {}, between=lambda: wait(10.0))
    assert durations == {"step": [2.0, 2.0, 2.0]}


def test_every_contender_is_timed_and_checked() -> None:
    eager = [c for c in contenders.on("cpu") if c.name != "torch.compile"]
    timings = time_workload(TINY, eager, rounds=4)
    assert {name: len(t.durations) for name, t in timings.items()} == {
        contenders.OURS: 4,
        "einsum": 4,
        "bmm": 4,
        "broadcast": 3,
    }
    assert all(max(t.loss_error, t.gradient_error) < 1e-5 for t in timings.values())


def test_a_wrong_contender_is_not_timed() -> None:
    one_thousandth_off = Contender(
        "wrong", lambda: peers.loss_over(lambda f, s: peers.bmm_matrix(f, s) * 1.001)
    )
    with pytest.raises(AssertionError, match="wrong is wrong on tiny"):
        time_workload(TINY, [one_thousandth_off], rounds=1)


def test_errors_are_relative_and_nan_is_infinitely_wrong() -> None:
    truth = torch.tensor([3.0, 4.0], dtype=torch.float64)
    assert relative_error([torch.tensor([3.0, 4.5])], [truth]) == pytest.approx(0.1)
    assert relative_error([torch.full((2,), float("nan"))], [truth]) == float("inf")
