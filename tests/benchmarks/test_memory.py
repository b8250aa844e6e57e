"""Peak extra memory finds what a step really allocates."""

import os

import pytest
import torch

from benchmarks import memory

MIB = 1 << 20
# Larger than what earlier tests leave free on malloc's heap, so it gets a mapping of its own.
BLOCK = 256 * MIB
# Beside the block a step touches pages of code and small objects.
TOLERANCE = 2 * MIB

needs_linux = pytest.mark.skipif(
    memory.method() != "resident", reason="needs /proc/self/clear_refs"
)
methods = pytest.mark.parametrize(
    "peak", [pytest.param(memory.resident_peak, marks=needs_linux), memory.profiled_peak]
)


def block():
    return torch.ones(BLOCK, dtype=torch.uint8)


STEPS = {
    "one": (block, 1),
    "together": (lambda: (block(), block()), 2),
    "one after the other": (lambda: [None for _ in range(2) if block().numel()], 1),
}


@methods
@pytest.mark.parametrize("name", STEPS)
def test_blocks_that_are_held_together_add_up(peak, name):
    step, blocks = STEPS[name]
    assert peak(step) == pytest.approx(blocks * BLOCK, abs=TOLERANCE)


@methods
def test_memory_held_before_does_not_count(peak):
    held = block()
    assert peak(lambda: held.add_(1)) == pytest.approx(0, abs=TOLERANCE)


def job():
    return block


def broken_job():
    raise ValueError("what")


def test_what_fails_costs_no_other_its_peak(capfd):
    first, second = memory.peaks([broken_job, job])
    assert first is None
    assert "ValueError: what" in capfd.readouterr().err
    assert second == pytest.approx(BLOCK, abs=TOLERANCE)


def environment():
    wanted = memory.RETURN_FREED_MEMORY
    assert {name: os.environ.get(name) for name in wanted} == wanted
    assert torch.get_num_threads() == 1
    return lambda: None


def test_a_fresh_process_returns_freed_memory_and_has_as_many_threads():
    threads, before = torch.get_num_threads(), dict(os.environ)
    torch.set_num_threads(1)
    try:
        assert memory.peaks_in_fresh_process([environment]) != [None]
    finally:
        torch.set_num_threads(threads)
    assert dict(os.environ) == before
