"""The measurement on a GPU, as far as it can be followed without one (see ``fake_gpu.py``)."""

import math

import fake_gpu
import pytest
import torch

from benchmarks import checks, contenders, gpu_timing
from benchmarks.cases import Problem, measure_case
from benchmarks.checks import Prepared, maps_of
from benchmarks.contenders import Contender
from benchmarks.gpu_timing import GpuTimer, copies_beyond_cache
from benchmarks.measure import measure
from benchmarks.recording import COLUMNS
from benchmarks.workloads import Case, Workload, feature_maps

TINY = Workload("tiny", 8, (((4, 6), (3, 6)), ((3, 6), (5, 3))))
EINSUM = contenders.BY_NAME["einsum"]


@pytest.fixture(autouse=True)
def _fake_gpu(monkeypatch, one_thread):  # noqa: ARG001
    fake_gpu.install(monkeypatch)


def nothing():
    pass


def timer():
    return GpuTimer(Prepared([nothing], {}))


def row_of(*steps):
    prepared = Prepared(steps or [nothing], {})
    who = Contender("x", lambda: nothing)
    return measure([who], lambda _: prepared, "cuda", fake_gpu.ROUNDS)[0]


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_every_contender_is_checked_and_measured(dtype):
    eager = [c for c in contenders.on("cuda") if c.name != "torch.compile"]
    rows = measure_case(Case(TINY, 8, dtype), eager, "cuda", fake_gpu.ROUNDS)
    rounds = {row["contender"]: row["rounds"] for row in rows}
    assert rounds == {"ours (torch)": 4, "einsum": 4, "bmm": 4, "broadcast": 2}
    for row in rows:
        assert min(row[name] for name in ("median", "eager_median", "replay_median")) > 0
        assert row["launches"] == fake_gpu.KERNELS
        assert row["peak_bytes"] == fake_gpu.EXTRA
        assert row["full_queue"]
        assert row["no_replay"] is None
        assert row["gradient_error"] < 0.1
        assert set(row) <= set(COLUMNS)


def test_steps_are_replayed_from_graphs_in_turn():
    row = row_of(nothing, nothing)
    assert fake_gpu.Graph.replays == 1 + 4  # the first round warms up
    assert row["replay_median"] > 0
    assert row["replay_iqr"] >= 0


def test_a_step_that_cannot_be_captured_has_no_replay(monkeypatch):
    monkeypatch.setattr(fake_gpu.Graph, "reason", RuntimeError("not permitted"))
    row = row_of()
    assert row["median"] > 0
    assert row["no_replay"] == "not captured: RuntimeError"
    assert "replay_median" not in row


def test_graphs_are_captured_where_the_layers_before_the_maps_ran(monkeypatch):
    """Autograd would make the default stream wait for the capture, which CUDA does not allow."""
    default, of_layers, of_captures = torch.cuda.current_stream(), [], []
    as_results = checks.as_results

    def layers(pairs):
        of_layers.append(torch.cuda.current_stream())
        return as_results(pairs)

    def capture(graph, pool, stream):
        of_captures.append(stream)
        return fake_gpu.Capture(graph, pool, stream)

    prepare = Problem(Case(TINY, 8), "cuda").prepare
    monkeypatch.setattr(checks, "as_results", layers)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    measure([EINSUM], prepare, "cuda", fake_gpu.ROUNDS)
    assert len({*of_layers, *of_captures}) == 1
    assert of_captures[0] is not default
    assert torch.cuda.current_stream() is default


def test_a_sleep_that_was_too_short_is_doubled(monkeypatch):
    ready = timer()
    gpu_timing.sleep_cycles_per_second()
    slept = []
    monkeypatch.setattr(torch.cuda, "_sleep", slept.append)
    monkeypatch.setattr(fake_gpu.Event, "finished", [True, False])
    _, in_time = ready.device_seconds()
    assert in_time
    assert len(slept) == 2
    assert slept[1] == pytest.approx(2 * slept[0], abs=1)


@pytest.mark.parametrize(("late_turn", "full"), [(0, True), (1, False)])
def test_a_queue_that_ran_empty_is_told_unless_forgotten(monkeypatch, late_turn, full):
    ready = timer()
    for turn in range(3):
        late = [True] * gpu_timing.RETRIES if turn == late_turn else []
        monkeypatch.setattr(fake_gpu.Event, "finished", late)
        ready.turn()
        if turn == 0:
            ready.forget()
    assert ready.facts()["full_queue"] == full


@pytest.mark.parametrize("workload", [TINY, Workload("large", 8, (((64, 32), (64, 32)),))])
def test_copies_do_not_fit_in_the_cache_together(workload):
    student, teacher = feature_maps(workload, 8)
    sets = copies_beyond_cache(student, teacher)
    size = sum(x.nbytes for x in maps_of(student) + maps_of(teacher))
    assert len(sets) == max(2, math.ceil(3 * fake_gpu.PROPERTIES.L2_cache_size / size))
    addresses = {x.data_ptr() for pair in sets for network in pair for x in maps_of(network)}
    assert len(addresses) == len(sets) * 4 * len(workload.layers)


def test_copies_keep_strides_and_require_gradients_as_the_maps_do():
    tokens = Workload("tokens", 8, (((6, 10), (5, 10)),), tokens=True)
    sets = copies_beyond_cache(*feature_maps(tokens, 8))
    for student, teacher in sets:
        assert student[0][0].stride() == (60, 1, 6)
        assert all(x.requires_grad for x in maps_of(student))
        assert not any(x.requires_grad for x in maps_of(teacher))


def test_copies_of_a_map_with_itself_are_one_tensor_too():
    symmetric = Workload("symmetric", 8, (((6, 4), (6, 4)),), symmetric=True)
    for networks in copies_beyond_cache(*feature_maps(symmetric, 8)):
        assert all(first is second for network in networks for first, second in network)


def test_each_copy_has_a_step_of_its_own():
    seen = []

    def loss(student, teacher):
        seen.append(student)
        return EINSUM.build()(student, teacher)

    problem = Problem(Case(TINY, 8), "cuda")
    steps = problem.prepare(Contender("x", lambda: loss)).steps
    seen.clear()
    for step in steps:
        step()
    assert len({student[0][0].data_ptr() for student in seen}) == len(problem.maps) > 1


@pytest.mark.parametrize(
    ("seconds", "launches", "steps"),
    [(1e-4, 4, 100), (1e-3, 4, 10), (1e-3, 100, 4), (1e-3, 1000, 1), (1.0, 4, 1), (1e-3, None, 4)],
)
def test_a_round_is_long_enough_and_fits_the_queue(monkeypatch, seconds, launches, steps):
    monkeypatch.setattr(gpu_timing, "ROUND_SECONDS", 0.01)
    assert gpu_timing.steps_per_round(seconds, launches) == steps
