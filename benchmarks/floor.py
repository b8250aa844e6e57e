"""The least time a step can take on a device: the bytes it must move, at the rate of a copy."""

from __future__ import annotations

import statistics
from functools import lru_cache
from itertools import pairwise

import torch

from benchmarks.measure import leaves
from benchmarks.workloads import Pairs

COPY_BYTES = 1 << 30  # twenty times the largest L2, so that next to nothing is found there
COPIES = 20
# Long enough that all copies are queued before the first one starts.
SLEEP_CYCLES = 20_000_000


def floor_bytes(student: Pairs, teacher: Pairs) -> int:
    """Every map read once, and the gradient of each that wants one written once."""
    maps = leaves(student) + leaves(teacher)
    return sum(x.nbytes for x in maps) + sum(x.nbytes for x in maps if x.requires_grad)


@lru_cache(maxsize=1)
def copy_rate() -> float:
    """Bytes per second, read and written, of a large ``copy_`` on the GPU: the median of twenty."""
    size = min(COPY_BYTES, torch.cuda.get_device_properties().total_memory // 8)
    source = torch.ones(size, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    events = [torch.cuda.Event(enable_timing=True) for _ in range(COPIES + 1)]
    target.copy_(source)  # warms up
    torch.cuda._sleep(SLEEP_CYCLES)
    for event in events:
        event.record()
        target.copy_(source)
    torch.cuda.synchronize()
    milliseconds = [start.elapsed_time(end) for start, end in pairwise(events)]
    return 2 * size / (statistics.median(milliseconds) / 1e3)
