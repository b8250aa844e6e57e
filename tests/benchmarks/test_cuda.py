"""The measurement on a GPU, as far as it can be followed without one (see ``fake_gpu.py``)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import fake_gpu
import pytest
import torch

from benchmarks import cases, contenders, cuda, measure, peers
from benchmarks.measure import maps_of
from benchmarks.race import Entrant, Outcome, Prepared
from benchmarks.workloads import Case, Pairs, Workload, feature_maps

TINY = Workload("tiny", 8, (((4, 6), (3, 6)), ((3, 6), (5, 3))))
EINSUM = peers.loss_over(peers.einsum_matrix)


@pytest.fixture(autouse=True)
def _fake_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    fake_gpu.install(monkeypatch)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # maps this small gain nothing from more
    yield
    torch.set_num_threads(threads)


def nothing() -> None:
    pass


def entrant(name: str = "x", step: Callable[[], object] = nothing) -> Entrant:
    return Entrant(name, lambda: Prepared([step], {"who": name}))


def raising(error: Exception) -> Entrant:
    def prepare() -> Prepared:
        raise error

    return Entrant("raising", prepare)


def runner() -> cuda.Runner:
    return cuda.Runner(entrant(), fake_gpu.ROUNDS)


def race(*entrants: Entrant) -> dict[str, Outcome]:
    return cuda.on_cuda(entrants, fake_gpu.ROUNDS)


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_every_contender_is_checked_and_measured(dtype: str) -> None:
    eager = [c for c in contenders.on("cuda") if c.name != "torch.compile"]
    outcomes = cases.measure(Case(TINY, 8, dtype), eager, "cuda", cuda.on_cuda, fake_gpu.ROUNDS)
    assert list(outcomes) == ["ours (torch)", "einsum", "bmm", "broadcast"]
    for outcome in outcomes.values():
        facts = outcome.facts
        assert len(outcome.durations) == len(facts["eager_seconds"]) == 4
        assert len(facts["replay_seconds"]) == 4
        assert facts["kernel_launches"] == fake_gpu.KERNELS
        assert facts["peak_extra_bytes"] == fake_gpu.EXTRA
        assert facts["full_queue"]
        assert facts["replay_reason"] is None
        assert facts["gradient_error"] < 0.1


def test_who_runs_out_of_memory_says_so_and_the_others_are_measured() -> None:
    outcomes = race(raising(torch.OutOfMemoryError("no room")), entrant())
    assert outcomes["raising"] == Outcome(reason="out of memory")
    assert outcomes["x"].durations


def test_running_out_of_memory_late_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    def take_turn(_: cuda.Runner) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(cuda.Runner, "take_turn", take_turn)
    assert race(entrant()) == {"x": Outcome(reason="out of memory")}


@pytest.mark.parametrize(
    ("error", "reason"),
    [(ValueError("what"), "failed: ValueError"), (AssertionError("off"), "wrong")],
)
def test_a_defect_costs_one_contender_and_is_a_fault(error: Exception, reason: str) -> None:
    outcomes = race(raising(error), entrant())
    assert outcomes["raising"] == Outcome(reason=reason, fault=True)
    assert outcomes["x"].durations


def test_steps_are_replayed_from_graphs_in_turn() -> None:
    steps = [nothing, nothing]
    outcome = race(Entrant("x", lambda: Prepared(steps, {})))["x"]
    assert fake_gpu.Graph.replays == 4 + cuda.WARM_UP
    assert outcome.facts["replay_median"] > 0
    assert outcome.facts["replay_iqr"] >= 0


def test_what_cannot_be_captured_is_timed_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fake_gpu.Graph, "reason", RuntimeError("not permitted"))
    outcome = race(entrant())["x"]
    assert outcome.durations
    assert outcome.facts["replay_reason"] == "not captured: RuntimeError"
    assert outcome.facts["replay_median"] is None


def test_graphs_are_captured_where_the_layers_before_the_maps_ran(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Autograd would make the default stream wait for the capture, which CUDA does not allow."""
    default, of_layers, of_captures = torch.cuda.current_stream(), [], []
    as_results = measure.as_results

    def layers(pairs: Pairs) -> Pairs:
        of_layers.append(torch.cuda.current_stream())
        return as_results(pairs)

    def capture(graph: fake_gpu.Graph, pool: object, stream: fake_gpu.Stream) -> fake_gpu.Capture:
        of_captures.append(stream)
        return fake_gpu.Capture(graph, pool, stream)

    case_race = cases.CaseRace(Case(TINY, 8), "cuda")
    monkeypatch.setattr(measure, "as_results", layers)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    race(*case_race.entrants([contenders.BY_NAME["einsum"]]))
    assert len({*of_layers, *of_captures}) == 1
    assert of_captures[0] is not default
    assert torch.cuda.current_stream() is default


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
    assert ready.outcome().facts["full_queue"]
    monkeypatch.setattr(fake_gpu.Event, "finished", [True] * cuda.RETRIES)
    ready.take_turn()
    assert not ready.outcome().facts["full_queue"]


def test_copies_do_not_fit_in_the_cache_together() -> None:
    student, teacher = feature_maps(TINY, 8)
    sets = cases.rotating(student, teacher)
    size = sum(x.nbytes for x in maps_of(student) + maps_of(teacher))
    assert len(sets) == math.ceil(3 * fake_gpu.PROPERTIES.L2_cache_size / size)
    addresses = {x.data_ptr() for pair in sets for network in pair for x in maps_of(network)}
    assert len(addresses) == len(sets) * 8


def test_copies_keep_strides_and_who_wants_gradients() -> None:
    tokens = Workload("tokens", 8, (((6, 10), (5, 10)),), tokens=True)
    sets = cases.rotating(*feature_maps(tokens, 8))
    for student, teacher in sets:
        assert student[0][0].stride() == (60, 1, 6)
        assert all(x.requires_grad for x in maps_of(student))
        assert not any(x.requires_grad for x in maps_of(teacher))


def test_large_maps_are_rotated_too() -> None:
    workload = Workload("large", 8, (((64, 32), (64, 32)),))
    assert len(cases.rotating(*feature_maps(workload, 8))) == 2


def test_each_copy_has_a_step_of_its_own() -> None:
    seen: list[Pairs] = []

    def loss(student: Pairs, teacher: Pairs) -> torch.Tensor:
        seen.append(student)
        return EINSUM(student, teacher)

    race = cases.CaseRace(Case(TINY, 8), "cuda")
    (entrant,) = race.entrants([contenders.Contender("x", lambda: loss)])
    steps = entrant.prepare().steps
    seen.clear()
    for step in steps:
        step()
    assert len({student[0][0].data_ptr() for student in seen}) == len(race._sets) > 1


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
