"""A case on its way into a race."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from benchmarks import cases, contenders
from benchmarks.measure import maps_of
from benchmarks.race import NotRun, Outcome, Rounds, on_cpu
from benchmarks.workloads import BY_NAME, FORWARD, TRAINING, Case, Workload

TINY = Workload("tiny", 8, (((4, 6), (3, 6)), ((3, 6), (5, 3))))
EAGER = [c for c in contenders.on("cpu") if c.name != "torch.compile"]
TWICE = Rounds(2, 2, 0.0)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # maps this small gain nothing from more
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("direction", [FORWARD, TRAINING])
@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_every_contender_is_checked_and_timed(dtype: str, layout: str, direction: str) -> None:
    case = Case(TINY, 8, dtype, layout, direction)
    outcomes = cases.measure(case, EAGER, "cpu", on_cpu, TWICE)
    assert list(outcomes) == ["ours (torch)", "einsum", "bmm", "broadcast"]
    for name, outcome in outcomes.items():
        assert len(outcome.durations) == 2, outcome
        assert outcome.facts["ours"] == (name == "ours (torch)")
        assert ("gradient_error" in outcome.facts) == (direction == TRAINING)


def test_facts_tell_batch_gradients_and_floor() -> None:
    outcome = cases.measure(Case(TINY, 3), EAGER[:1], "cpu", on_cpu, TWICE)["ours (torch)"]
    gradients = 4 * 3 * (4 * 36 + 3 * 36 + 3 * 36 + 5 * 9)
    assert outcome.facts["batch"] == 3
    assert outcome.facts["gradient_bytes"] == gradients
    assert outcome.facts["floor_bytes"] == 3 * gradients
    forward = cases.measure(Case(TINY, 3, direction=FORWARD), EAGER[:1], "cpu", on_cpu, TWICE)
    facts = forward["ours (torch)"].facts
    assert (facts["gradient_bytes"], facts["floor_bytes"]) == (0, 2 * gradients)


def test_a_product_too_large_for_a_cpu_is_not_run() -> None:
    broadcast = contenders.BY_NAME["broadcast"]
    case = Case(BY_NAME["segmentation"], 4)
    assert contenders.why_not(broadcast, case, "cpu") == "not run: holds 16.0 GiB"
    assert contenders.why_not(broadcast, case, "cuda") is None
    (entrant,) = cases.CaseRace(Case(TINY, 3), "cpu").entrants([broadcast])
    assert entrant.max_rounds == 2
    large = cases.CaseRace(Case(Workload("x", 4, (((512, 17), (512, 17)),)), 1), "cpu")
    with pytest.raises(NotRun, match=r"holds 0.3 GiB"):
        large.entrants([broadcast])[0].prepare()


def test_memory_formats_are_those_asked_for() -> None:
    student, teacher = Case(TINY, 3, layout="channels_last").maps("cpu")
    maps = [*maps_of(student), *maps_of(teacher)]
    assert all(x.is_contiguous(memory_format=torch.channels_last) for x in maps)


def test_tokens_have_a_layout_of_their_own() -> None:
    tokens = BY_NAME["tokens-vit-b"]
    assert tokens.layouts(["nchw", "channels_last"]) == ("tokens",)
    assert TINY.layouts(["channels_last"]) == ("channels_last",)


def test_peaks_are_those_of_a_fresh_process_which_sees_blocks_malloc_would_keep() -> None:
    case = Case(BY_NAME["wide-late-512"], 4)
    einsum, broadcast = contenders.BY_NAME["einsum"], contenders.BY_NAME["broadcast"]
    segmentation = Case(BY_NAME["segmentation"], 4)
    found = cases.peaks([case], [einsum])
    matrix = 4 * 4 * 512 * 512  # bytes; the naive op holds both and the squares of what differs
    assert found[case, "einsum"] >= 2.9 * matrix
    assert cases.peaks([segmentation], [broadcast]) == {}  # nothing that is not run


def test_a_peak_joins_the_facts() -> None:
    outcome = cases.with_peak(Outcome([1.0], {"ours": True}), 7)
    assert outcome.durations == [1.0]
    assert (outcome.facts["ours"], outcome.facts["peak_extra_bytes"]) == (True, 7)
