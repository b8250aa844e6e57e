"""Peak extra memory finds what a step really allocates."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from benchmarks import memory
from benchmarks.measure import Step
from benchmarks.workloads import BY_NAME, Workload

MIB = 1 << 20
# malloc gives a block this large a mapping of its own whatever its settings.
BLOCK = 64 * MIB
# Beside the block a step touches pages of code and small objects.
TOLERANCE = 2 * MIB

Peak = Callable[[Step], int]

needs_linux = pytest.mark.skipif(
    memory.method() != "resident", reason="needs /proc/self/clear_refs"
)
methods = pytest.mark.parametrize(
    "peak", [pytest.param(memory.resident_peak, marks=needs_linux), memory.profiled_peak]
)


def block() -> torch.Tensor:
    return torch.ones(BLOCK, dtype=torch.uint8)


@methods
def test_an_allocation_is_found(peak: Peak) -> None:
    assert peak(block) == pytest.approx(BLOCK, abs=TOLERANCE)


@methods
def test_blocks_held_together_add_up(peak: Peak) -> None:
    assert peak(lambda: (block(), block())) == pytest.approx(2 * BLOCK, abs=TOLERANCE)


@methods
def test_blocks_held_one_after_the_other_do_not(peak: Peak) -> None:
    def step() -> None:
        block()
        block()

    assert peak(step) == pytest.approx(BLOCK, abs=TOLERANCE)


@methods
def test_memory_held_before_does_not_count(peak: Peak) -> None:
    held = block()
    assert peak(lambda: held.add_(1)) == pytest.approx(0, abs=TOLERANCE)


def test_gradients_take_what_the_maps_of_the_student_take() -> None:
    tiny = Workload("tiny", 8, (((4, 6), (3, 2)),))
    assert memory.gradient_bytes(tiny, 4, torch.float32) == 4 * 4 * (144 + 12)
    assert memory.gradient_bytes(tiny, 8, torch.bfloat16) == 4 * 4 * (144 + 12)


def test_a_fresh_process_sees_blocks_malloc_would_keep() -> None:
    workload = BY_NAME["wide-late-512"]
    found = memory.peaks_in_fresh_process(workload, ["einsum"], "fp32")
    matrix = 4 * workload.cpu_batch * 512 * 512  # bytes; the naive op holds both and their squares
    assert found["einsum"] >= 3 * matrix
