"""Contenders on a case: checked, timed, and what is recorded of them."""

import pytest
import torch

from benchmarks import cases, contenders, memory
from benchmarks.cases import Problem, measure_case
from benchmarks.checks import maps_of
from benchmarks.measure import NotRun, Rounds
from benchmarks.recording import COLUMNS
from benchmarks.workloads import BY_NAME, FORWARD, TRAINING, Case, Workload

TINY = Workload("tiny", 8, (((4, 6), (3, 6)), ((3, 6), (5, 3))))
EAGER = [c for c in contenders.on("cpu") if c.name != "torch.compile"]
EINSUM, BROADCAST = contenders.BY_NAME["einsum"], contenders.BY_NAME["broadcast"]
OURS = [f"ours ({name})" for name in contenders.backends_on("cpu")]
pytestmark = pytest.mark.usefixtures("one_thread")


def rows_of(case):
    return measure_case(case, EAGER, "cpu", Rounds(2, 2, 0.0), axis="size", value=6)


@pytest.mark.parametrize("direction", [FORWARD, TRAINING])
@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_every_contender_is_checked_and_timed(dtype, layout, direction):
    rows = rows_of(Case(TINY, 8, dtype, layout, direction))
    assert [row["contender"] for row in rows] == [*OURS, "einsum", "bmm", "broadcast"]
    for row in rows:
        assert (row["workload"], row["dtype"]) == ("tiny", dtype)
        assert (row["layout"], row["pass"]) == (layout, direction)
        assert (row["axis"], row["value"], row["rounds"]) == ("size", 6, 2)
        assert row["ours"] == (row["contender"] in OURS)
        assert ("gradient_error" in row) == (direction == TRAINING)
        assert set(row) <= set(COLUMNS)


def test_a_row_tells_batch_gradients_and_floor():
    row = rows_of(Case(TINY, 3))[0]
    gradients = 4 * 3 * (4 * 36 + 3 * 36 + 3 * 36 + 5 * 9)
    assert (row["batch"], row["gradient_bytes"]) == (3, gradients)
    assert row["floor_bytes"] == 3 * gradients
    forward = rows_of(Case(TINY, 3, direction=FORWARD))[0]
    assert (forward["gradient_bytes"], forward["floor_bytes"]) == (0, 2 * gradients)


def test_a_product_too_large_for_a_cpu_is_not_run():
    case = Case(BY_NAME["segmentation"], 4)
    assert contenders.why_not_run(BROADCAST, case, "cpu") == "not run: holds 16.0 GiB"
    assert contenders.why_not_run(BROADCAST, case, "cuda") is None
    large = Problem(Case(Workload("x", 4, (((512, 17), (512, 17)),)), 1), "cpu")
    with pytest.raises(NotRun, match=r"holds 0.3 GiB"):
        large.prepare(BROADCAST)


def test_memory_formats_are_those_asked_for():
    student, teacher = Case(TINY, 3, layout="channels_last").maps("cpu")
    maps = [*maps_of(student), *maps_of(teacher)]
    assert all(x.is_contiguous(memory_format=torch.channels_last) for x in maps)


def test_tokens_have_a_layout_of_their_own():
    tokens = BY_NAME["tokens-vit-b"]
    assert tokens.layouts(["nchw", "channels_last"]) == ("tokens",)
    assert TINY.layouts(["channels_last"]) == ("channels_last",)


def test_peaks_are_measured_where_malloc_returns_what_is_freed():
    timed = {"contender": "einsum", "median": 1.0}
    not_run = {"contender": "broadcast", "reason": "not run: holds 16.0 GiB"}
    jobs = cases.memory_jobs(Case(BY_NAME["wide-late-512"], 4), [timed, not_run])
    memory.add_peaks(jobs)
    matrix = 4 * 4 * 512 * 512  # bytes; the naive op holds both and the squares of the difference
    assert timed["peak_bytes"] >= 2.9 * matrix
    assert "peak_bytes" not in not_run
