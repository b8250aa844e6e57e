"""The measurement on a GPU, as far as it can be followed without one (see ``fake_gpu.py``)."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import fake_gpu
import pytest
import torch

from benchmarks import contenders, cuda, floor, peers
from benchmarks.contenders import Contender
from benchmarks.measure import Check, leaves
from benchmarks.outcome import Outcome
from benchmarks.workloads import Workload, feature_maps

TINY = Workload("tiny", 8, (((4, 6), (3, 6)), ((3, 6), (5, 3))))
EINSUM = Contender("einsum", lambda: peers.loss_over(peers.einsum_matrix))


@pytest.fixture(autouse=True)
def _fake_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    fake_gpu.install(monkeypatch)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # maps this small gain nothing from more
    yield
    torch.set_num_threads(threads)


def raising(error: Exception) -> Contender:
    def loss(*_: object) -> torch.Tensor:
        raise error

    return Contender("raising", lambda: loss)


def runner(contender: Contender = EINSUM) -> cuda.Runner:
    student, teacher = feature_maps(TINY, 8)
    return cuda.Runner(contender, Check(TINY, student, teacher), cuda.rotating(student, teacher))


def time_tiny(*chosen: Contender, dtype: torch.dtype = torch.float32) -> dict[str, Outcome]:
    return cuda.time_workload(TINY, chosen, 4, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_contender_is_checked_and_measured(dtype: torch.dtype) -> None:
    eager = [c for c in contenders.on("cuda") if c.name != "torch.compile"]
    outcomes = time_tiny(*eager, dtype=dtype)
    assert list(outcomes) == ["ours (torch)", "einsum", "bmm", "broadcast"]
    for outcome in outcomes.values():
        facts = outcome.facts
        assert len(outcome.durations) == len(facts["eager_seconds"]) == 4
        assert facts["kernel_launches"] == fake_gpu.KERNELS
        assert facts["peak_extra_bytes"] == fake_gpu.EXTRA
        assert facts["full_queue"]
        assert facts["gradient_error"] < 0.1


def test_who_runs_out_of_memory_says_so_and_the_others_are_measured() -> None:
    outcomes = time_tiny(raising(torch.OutOfMemoryError("no room")), EINSUM)
    assert outcomes["raising"] == Outcome(reason="out of memory")
    assert outcomes["einsum"].durations


def test_running_out_of_memory_late_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    def take_turn(_: cuda.Runner) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(cuda.Runner, "take_turn", take_turn)
    assert time_tiny(EINSUM) == {"einsum": Outcome(reason="out of memory")}


@pytest.mark.parametrize(
    ("contender", "reason"),
    [
        (raising(ValueError("what")), "failed: ValueError"),
        (
            Contender("wrong", lambda: peers.loss_over(lambda f, s: peers.bmm_matrix(f, s) * 2)),
            "wrong",
        ),
    ],
)
def test_a_defect_costs_one_contender_and_is_a_fault(contender: Contender, reason: str) -> None:
    outcomes = time_tiny(contender, EINSUM)
    assert outcomes[contender.name] == Outcome(reason=reason, fault=True)
    assert outcomes["einsum"].durations


def test_ours_is_held_to_more_in_half_precision() -> None:
    def off() -> peers.Loss:
        return peers.loss_over(lambda f, s: peers.bmm_matrix(f, s) * 1.03)

    as_peer, as_ours = Contender("peer", off), Contender("ours", off, ours=True)
    outcomes = time_tiny(as_peer, as_ours, dtype=torch.bfloat16)
    assert outcomes["peer"].durations
    assert outcomes["ours"].reason == "wrong"


def test_a_queue_that_ran_dry_is_slept_for_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    ready = runner()
    cuda.sleep_cycles_per_second()
    slept: list[int] = []
    monkeypatch.setattr(torch.cuda, "_sleep", slept.append)
    monkeypatch.setattr(fake_gpu.Event, "finished", [True, False])
    _, in_time = ready.device_seconds()
    assert in_time
    assert len(slept) == 2
    assert slept[1] == pytest.approx(2 * slept[0], abs=1)


def test_a_queue_that_stays_dry_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    ready = runner()
    monkeypatch.setattr(fake_gpu.Event, "finished", [True] * cuda.RETRIES)
    assert not ready.device_seconds()[1]
    for _ in range(3):
        ready.take_turn()
    assert ready.outcome({}).facts["full_queue"]
    monkeypatch.setattr(fake_gpu.Event, "finished", [True] * cuda.RETRIES)
    ready.take_turn()
    assert not ready.outcome({}).facts["full_queue"]


def test_copies_do_not_fit_in_the_cache_together() -> None:
    student, teacher = feature_maps(TINY, 8)
    sets = cuda.rotating(student, teacher)
    size = sum(x.nbytes for x in leaves(student) + leaves(teacher))
    assert len(sets) == math.ceil(3 * fake_gpu.PROPERTIES.L2_cache_size / size)
    addresses = {x.data_ptr() for pair in sets for network in pair for x in leaves(network)}
    assert len(addresses) == len(sets) * 8


def test_copies_keep_strides_and_who_wants_gradients() -> None:
    tokens = Workload("tokens", 8, (((6, 10), (5, 10)),), tokens=True)
    sets = cuda.rotating(*feature_maps(tokens, 8))
    for student, teacher in sets:
        assert student[0][0].stride() == (60, 1, 6)
        assert all(x.is_leaf and x.requires_grad for x in leaves(student))
        assert not any(x.requires_grad for x in leaves(teacher))


def test_large_maps_are_rotated_too() -> None:
    workload = Workload("large", 8, (((64, 32), (64, 32)),))
    assert len(cuda.rotating(*feature_maps(workload, 8))) == 2


def test_steps_take_the_copies_in_turn() -> None:
    sets = cuda.rotating(*feature_maps(TINY, 8))
    seen: list[int] = []

    def loss(student: peers.Pairs, _: peers.Pairs) -> torch.Tensor:
        seen.append(student[0][0].data_ptr())
        return student[0][0].sum()

    for step in itertools.islice(cuda.rotating_steps(loss, sets), len(sets) + 1):
        step()
    assert len(set(seen)) == len(sets)
    assert seen[-1] == seen[0]


def test_only_kernels_count_as_launches() -> None:
    assert cuda.kernel_launches(lambda: None) == fake_gpu.KERNELS


@pytest.mark.parametrize(
    ("seconds", "launches", "steps"),
    [(1e-4, 4, 100), (1e-3, 4, 10), (1e-3, 100, 4), (1e-3, 1000, 1), (1.0, 4, 1), (1e-3, None, 4)],
)
def test_a_round_is_long_enough_and_fits_the_queue(
    monkeypatch: pytest.MonkeyPatch, seconds: float, launches: int | None, steps: int
) -> None:
    monkeypatch.setattr(cuda, "ROUND_SECONDS", 0.01)
    assert cuda.steps_per_round(seconds, launches) == steps


@pytest.mark.parametrize(("seconds", "rounds"), [(0.01, 15), (0.05, 3), (10.0, 3)])
def test_slow_contenders_get_fewer_rounds(
    monkeypatch: pytest.MonkeyPatch, seconds: float, rounds: int
) -> None:
    monkeypatch.setattr(cuda, "BUDGET_SECONDS", 0.3)
    assert cuda.affordable_rounds(seconds) == rounds


def test_the_floor_is_four_reads_and_two_writes_of_equal_maps() -> None:
    workload = Workload("equal", 8, (((6, 4), (6, 4)),))
    one = 8 * 6 * 16 * 2  # bytes in bf16
    assert floor.floor_bytes(*feature_maps(workload, 8, torch.bfloat16)) == 6 * one


def test_pooled_maps_are_read_and_their_gradients_written_at_full_size() -> None:
    pooled = Workload("pooled", 2, (((6, 8), (5, 4)),))
    assert floor.floor_bytes(*feature_maps(pooled, 2)) == 3 * 4 * 2 * (6 * 64 + 5 * 16)


def test_a_copy_counts_reads_and_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fake_gpu.Event, "elapsed_time", lambda *_: 2.0)  # ms
    size = fake_gpu.PROPERTIES.total_memory // 8
    assert floor.copy_rate() == pytest.approx(2 * size / 2e-3)
