"""A row on trial: its candidates, where it is timed, and how, on a GPU that is not there."""

from __future__ import annotations

import itertools
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import fake_gpu
import pytest
import torch

pytest.importorskip("triton")

from benchmarks.workloads import Workload
from fsp_kernels.backends.triton import configurations
from fsp_kernels.backends.triton.configurations import (
    Configuration,
    Row,
    configuration_of,
    replaced,
    rows,
    using,
)
from tools import trials
from tools.calls import DTYPES, Case, call_on, launches_of, maps_of
from tools.trials import SMALL_BATCH, Bench, Situation, candidates, measure, situations

ROOT = Path(__file__).resolve().parents[2]
FAMILY = "sm_100"  # whose table Triton's interpreter follows
ROWS = [row for row in rows() if row.family == FAMILY]
# One row of each kernel and access, of every kind in turn: others differ in numbers alone.
ALIKE = {
    key: [row for row in ROWS if (row.kernel, row.access) == key]
    for key in dict.fromkeys((row.kernel, row.access) for row in ROWS)
}
every_row = pytest.mark.parametrize(
    "row",
    [found[7 * i % len(found)] for i, found in enumerate(ALIKE.values())],
    ids=lambda r: "-".join(map(str, r[1:5])),
)
ROW = Row("sm_90", "one_pass", "half", "aligned", 64, Configuration(64, 64, 64, 4, 3), None)
FASTER, SLOWER, WRONG, BROKEN = (
    ROW.configuration._replace(stages=stages) for stages in (2, 4, 5, 6)
)
SECONDS = {ROW.configuration: 1.0, FASTER: 0.5, SLOWER: 3.0, WRONG: 0.1}
BYTES = 4096  # of the maps of a situation of the fake GPU


SMALL = ((5, 3, 7), (6, 3, 7), (5, 6))  # of a product


def on_cpu(make):
    """Maps on the CPU, wherever they are asked for."""
    return lambda workload, batch, dtype, _: make(workload, batch, dtype, "cpu")


# --- candidates -----------------------------------------------------------------------------------


@every_row
def test_the_configuration_in_force_is_tried_first_and_none_twice(row):
    found = candidates(row)
    assert found[0] == row.configuration
    assert len(set(found)) == len(found)
    assert 1 < len(found) <= trials.MOST


@every_row
def test_nearer_candidates_come_first(row):
    steps = [trials._steps(row.configuration, c) for c in candidates(row)]
    assert steps == sorted(steps)
    assert steps[:2] == [0, 1]
    assert steps[-1] <= trials.STEPS


@every_row
def test_blocks_that_a_shape_gives_stay(row):
    found = candidates(row)
    if row.kernel == "one_pass":
        assert {c[:2] for c in found} == {row.configuration[:2]}
    if row.kernel == "gram":
        assert all(c.block_m == c.block_n and c.block_k == row.configuration.block_k for c in found)


def test_of_equally_near_candidates_the_ones_with_most_in_flight_come_first():
    found = candidates(ROW)[1:4]
    assert [(c.block_k, c.stages) for c in found] == [(128, 3), (64, 4), (64, 3)]


# --- situations -----------------------------------------------------------------------------------


def launched(maps, row, table):
    with using(table):
        return launches_of(lambda: call_on(maps)(), row.family, row.kind)


def follow(maps, row):
    """Whether the launches of maps change with the row."""
    changed = row._replace(configuration=row.configuration._replace(stages=6))
    before, after = (launched(maps, row, t) for t in (rows(), replaced(rows(), row, changed)))
    return before != after


@every_row
def test_the_pair_made_for_a_row_launches_what_its_row_says(row):
    """And so would a candidate in its place: no other row is timed instead."""
    assert follow(maps_of(Case(row, DTYPES[row.kind][0]), SMALL_BATCH, "meta"), row)


def test_a_row_is_timed_on_whole_workloads_in_every_batch():
    (row,) = (r for r in ROWS if r[1:5] == ("one_pass", "half", "aligned", 16))
    found = situations(row, rows())
    assert [(s.workload, s.batch) for s in found] == [
        ("cifar-resnet", batch) for batch in (32, 64, 256)
    ]
    assert len(found[0].maps("meta")) == 12  # three pairs in one launch
    assert {x.shape[0] for x in found[2].maps("meta")} == {256}


@pytest.mark.parametrize("kernel", ["product", "one_pass"])
def test_a_row_that_no_workload_uses_is_timed_on_a_pair_of_its_own(kernel):
    row = next(r for r in ROWS if r.kernel == kernel and r.access == "odd")
    found = situations(row, rows())
    assert [(s.workload, s.batch) for s in found] == [(None, batch) for batch in (8, 32, 64, 256)]


@every_row
def test_every_situation_launches_what_the_row_says(row):
    assert all(follow(situation.maps("meta"), row) for situation in situations(row, rows()))


def test_equal_workloads_are_timed_once_and_too_large_ones_not_at_all():
    row = next(r for r in ROWS if r[1:4] == ("gradients", "tf32x3", "aligned"))
    found = situations(row, rows())
    names = {s.workload for s in found}
    assert "imagenet-resnet18" in names
    assert "torchdistill-resnet34-18" not in names  # the same maps in the same batches
    assert ("segmentation", 256) not in {(s.workload, s.batch) for s in found}
    assert all(sum(x.nbytes for x in s.maps("meta")) <= trials.LARGEST for s in found)


# --- timing ---------------------------------------------------------------------------------------


class Pair(Situation):
    """Small maps on the CPU, in place of a GPU's."""

    def maps(self, device):
        assert device == "cuda"
        return [torch.ones(BYTES // 4)]


def work(maps):
    """A call of the kernel: how long it takes is the configuration's."""
    c = configuration_of(ROW.kernel, ROW.kind, ROW.family, ROW.access, ROW.limit)

    def call():
        if c not in SECONDS:
            raise RuntimeError("out of resource: shared memory")
        fake_gpu.work(SECONDS[c])
        return [maps[0] * (1.5 if c == WRONG else 1.0)]

    return call


@pytest.fixture
def gpu(monkeypatch):
    fake_gpu.install(monkeypatch)
    # No time of the host counts, however busy it is.
    monkeypatch.setattr(fake_gpu.Clock, "now", classmethod(lambda clock: clock.worked))
    monkeypatch.setattr(trials, "call_on", work)
    return monkeypatch


def heard_of(chosen, used=None, deadline=math.inf):
    heard: list = []
    used = used or [Pair(Case(ROW, torch.float32), None, 32)]
    measure(heard.append, [ROW], ROW, used, chosen, deadline)
    return heard


def test_copies_of_the_maps_exceed_the_l2_several_times(gpu):  # noqa: ARG001
    bench = Bench(Pair(Case(ROW, torch.float32), None, 32), [ROW])
    copies = [maps[0] for maps in bench.copies]
    assert len({x.data_ptr() for x in copies}) == len(copies)
    assert sum(x.nbytes for x in copies) >= 3 * fake_gpu.PROPERTIES.L2_cache_size
    # One replay goes over all copies, and the time of one call is told.
    assert bench.milliseconds == pytest.approx(1e3, rel=1e-3)


def test_large_maps_have_two_copies(gpu):
    gpu.setattr(fake_gpu.PROPERTIES, "L2_cache_size", 16)
    assert len(Bench(Pair(Case(ROW, torch.float32), None, 32), [ROW]).copies) == 2


def test_candidates_are_timed_against_the_configuration_in_force(gpu):  # noqa: ARG001
    heard = heard_of([ROW.configuration, FASTER])
    assert [message[:2] for message in heard[1:]] == [
        ("trying", ROW.configuration),
        ("timed", ROW.configuration),
        ("trying", FASTER),
        ("timed", FASTER),
    ]
    assert heard[0] == ("in force", [pytest.approx(1e3, rel=1e-3)])
    assert heard[2][2] == pytest.approx(1.0, rel=1e-3)
    assert heard[4][2] == pytest.approx(0.5, rel=1e-3)


def test_a_wrong_and_a_failing_candidate_are_dropped_and_the_next_is_timed(gpu):  # noqa: ARG001
    heard = heard_of([WRONG, BROKEN, FASTER])
    (_, wrong, why_wrong), (_, broken, why_broken) = (x for x in heard if x[0] == "dropped")
    assert (wrong, broken) == (WRONG, BROKEN)
    assert "wrong: 5.0e-01 from the results" in why_wrong
    assert "out of resource: shared memory" in why_broken
    assert heard[-1][:2] == ("timed", FASTER)


def test_an_error_that_ends_the_gpus_use_ends_the_process(gpu):
    def broken_context():
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    def call(maps):
        if configuration_of(*ROW[1:3], ROW.family, ROW.access, ROW.limit) == BROKEN:
            gpu.setattr(torch.cuda, "synchronize", broken_context)
        return work(maps)

    gpu.setattr(trials, "call_on", call)
    heard: list = []
    with pytest.raises(RuntimeError, match="illegal memory access"):
        measure(
            heard.append, [ROW], ROW, [Pair(Case(ROW, torch.float32), None, 32)], [BROKEN], math.inf
        )
    assert heard[-1][:2] == ("dropped", BROKEN)


def test_a_hopeless_candidate_is_not_timed_everywhere(gpu):
    timed: list = []
    ratio = Bench.ratio
    gpu.setattr(Bench, "ratio", lambda bench, table: timed.append(bench) or ratio(bench, table))
    used = [Pair(Case(ROW, torch.float32), None, batch) for batch in (32, 64, 256)]
    for candidate, times in ((SLOWER, 1), (FASTER, 3)):
        timed.clear()
        heard_of([candidate], used)
        assert len(timed) == times


def test_a_situation_without_room_is_skipped(gpu):  # noqa: ARG001
    class Large(Pair):
        def maps(self, device):  # noqa: ARG002
            raise torch.OutOfMemoryError

    large = Large(Case(ROW, torch.float32), None, 256)
    heard = heard_of([FASTER], [large, Pair(Case(ROW, torch.float32), None, 32)])
    assert heard[0] == ("skipped", "a pair of its own, batch 256", "out of memory")
    assert heard[-1][:2] == ("timed", FASTER)
    with pytest.raises(RuntimeError, match="no situation fits"):
        heard_of([FASTER], [large])


def test_at_the_deadline_no_other_candidate_is_tried(gpu):  # noqa: ARG001
    assert [x[0] for x in heard_of([FASTER, SLOWER], deadline=time.time() - 1)] == ["in force"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="Triton's interpreter is not in use")
@pytest.mark.parametrize("kind", ["half", "tf32x3"])
def test_the_backend_itself_is_timed_and_candidates_agree(monkeypatch, kind):
    """In Triton's interpreter: two pairs in one launch, and other blocks sum in another order."""
    fake_gpu.install(monkeypatch)
    monkeypatch.setattr(fake_gpu.PROPERTIES, "L2_cache_size", 1)
    monkeypatch.setattr(trials, "workload_maps", on_cpu(trials.workload_maps))
    monkeypatch.setattr(trials, "maps_of", lambda *_: [torch.randn(2, *x) for x in SMALL])
    tiny = Workload("tiny", 2, (((16, 6), (16, 6)), ((5, 6), (16, 6))))
    monkeypatch.setitem(trials.BY_NAME, "tiny", tiny)
    (row,) = (r for r in ROWS if r[1:5] == ("one_pass", kind, "odd", 16))
    product = next(r for r in ROWS if r[1:4] == ("product", kind, "odd"))
    for tried, workload in ((row, "tiny"), (product, None)):
        other = tried.configuration._replace(block_k=16, warps=1)
        used = [Situation(Case(tried, DTYPES[kind][0]), workload, 2)]
        heard: list = []
        measure(heard.append, rows(), tried, used, [tried.configuration, other], math.inf)
        assert [x[:2] for x in heard if x[0] != "trying"][1:] == [
            ("timed", tried.configuration),
            ("timed", other),
        ], heard


# --- compiling ------------------------------------------------------------------------------------


def test_what_spills_or_fails_with_any_dtype_is_refused(monkeypatch):
    seen: list = []

    def compile_case(case):
        assert rows()[0].configuration == FASTER
        seen.append(case.dtype)
        return ["usage"]

    found = itertools.cycle([[], ["spills 8 bytes to the stack"]])
    monkeypatch.setattr(trials, "compile_case", compile_case)
    monkeypatch.setattr(trials, "faults", lambda *_: next(found))
    changed = ROW._replace(configuration=FASTER)
    assert trials.compile_trial(None, [changed], changed, []) == "spills 8 bytes to the stack"
    assert seen == [torch.bfloat16, torch.float16]


def test_all_that_is_going_to_be_timed_is_compiled(monkeypatch):
    (row,) = (r for r in ROWS if r[1:5] == ("one_pass", "half", "aligned", 16))
    seen: list = []
    monkeypatch.setattr(trials, "compile_case", lambda _: [])
    monkeypatch.setattr(trials, "instead_of_launches", lambda _, __, *where: seen.append(where))
    used = situations(row, configurations.rows())
    assert trials.compile_trial(None, rows(), row, used) == ""
    assert seen == [(FAMILY, "half")] * len(used)


COMPILED = """
from tools.calls import DTYPES, Case
from tools.trials import Situation, compile_trial
from fsp_kernels.backends.triton.configurations import rows

row = next(r for r in rows() if r[:5] == ("sm_90", "one_pass", "tf32x3", "aligned", 16))
used = [Situation(Case(row, DTYPES["tf32x3"][0]), "cifar-resnet", 32)]
print("refused:", repr(compile_trial(None, rows(), row, used)))
"""


@pytest.mark.slow
def test_merged_kernels_are_compiled_into_tritons_cache(tmp_path):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", COMPILED],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert "refused: ''" in done.stdout, done.stderr
    names = {path.stem for path in tmp_path.glob("*/*.cubin")}
    assert {"fsp_one_pass", "fsp_finish"} <= names
