"""Times a contender on an NVIDIA GPU, and counts the kernels and the memory of a step.

Either of these three times may be what a training loop waits for:

* *device*: the GPU's own time. Steps are queued behind a kernel that sleeps until the last step is
  queued, so the GPU never waits for a launch. Events before the first and after the last step tell
  how long they took.
* *eager*: the host's time from one synchronisation to the next, launches included.
* *replay*: the GPU's time of the same step recorded in a CUDA graph, which needs no host.
"""

from __future__ import annotations

import gc
import itertools
import json
import math
import statistics
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.checks import Prepared, Row, Step, maps_of, with_each
from benchmarks.workloads import Pairs

# Seconds of steps between two events: 1e4 times the events' resolution, and far more than the one
# synchronisation that an eager time includes.
ROUND_SECONDS = 0.01
# The driver queues about a thousand launches; the next one blocks the host until one is done.
QUEUED_LAUNCHES = 400
UNKNOWN_LAUNCHES = 100  # assumed of a step where the profiler sees none: the naive op's, four pairs
RETRIES = 4
L2_MULTIPLE = 3  # size of all copies of the maps, in sizes of the L2
UNKNOWN_L2 = 128 << 20  # as large as any so far


@lru_cache(maxsize=1)
def stream() -> torch.cuda.Stream:
    """The stream on which everything is measured: one, and not the default one.

    In backward, autograd makes the streams on which the loss and the layers before its maps ran
    wait for each other. A graph can be captured only where those are one stream, and none can be
    captured on the default stream.
    """
    return torch.cuda.Stream()


@contextmanager
def own_stream() -> Iterator[None]:
    """Run the block on ``stream``, after all that was queued on the default stream."""
    torch.cuda.synchronize()
    with torch.cuda.stream(stream()):
        yield


def l2_bytes() -> int:
    """The size of the GPU's last-level cache."""
    return getattr(torch.cuda.get_device_properties(), "L2_cache_size", 0) or UNKNOWN_L2


def copies_beyond_cache(student: Pairs, teacher: Pairs) -> Sequence[tuple[Pairs, Pairs]]:
    """Copies of the maps, strides included; the first are the maps themselves.

    Together they don't fit in the L2. Otherwise a small workload would be read from the cache,
    which no training loop can do.
    """
    size = sum(x.nbytes for x in maps_of(student) + maps_of(teacher))
    count = max(2, math.ceil(L2_MULTIPLE * l2_bytes() / size))

    def copied(x: torch.Tensor) -> torch.Tensor:
        return x.detach().clone().requires_grad_(x.requires_grad)

    def copy(pairs: Pairs) -> Pairs:
        return with_each(pairs, copied)

    return [(student, teacher), *((copy(student), copy(teacher)) for _ in range(count - 1))]


def kernels_run(step: Step) -> list[dict[str, Any]]:
    """The profiler's events of the kernels that a step runs on the GPU, in order."""
    with profile(activities=[ProfilerActivity.CUDA]) as recorded:
        step()
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        recorded.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    kernels = [event for event in events if event.get("cat") == "kernel"]
    return sorted(kernels, key=lambda event: event["ts"])


def peak_extra_bytes(step: Step) -> int:
    """Peak of what torch's allocator hands out during a step, beyond what it had before."""
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def steps_per_round(step_seconds: float, launches: int | None) -> int:
    """Steps that fill a round, but no more than the driver can queue."""
    filling = math.ceil(ROUND_SECONDS / step_seconds)
    return max(1, min(filling, QUEUED_LAUNCHES // (launches or UNKNOWN_LAUNCHES)))


@lru_cache(maxsize=1)
def sleep_cycles_per_second() -> float:
    """The rate at which ``torch.cuda._sleep`` counts, at the GPU's present clock."""
    cycles = 50_000_000
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(cycles)  # raises the clock
    start.record()
    torch.cuda._sleep(cycles)
    end.record()
    torch.cuda.synchronize()
    return cycles / (start.elapsed_time(end) / 1e3)


def captured(steps: Sequence[Step]) -> tuple[list[Step], str | None]:
    """The replay of a CUDA graph for each step; else none, and the reason."""
    graphs: list[torch.cuda.CUDAGraph] = []
    try:
        pool = torch.cuda.graph_pool_handle()  # replayed one after the other, they share memory
        for step in steps:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool, stream=stream()):
                step()
            graphs.append(graph)
        return [graph.replay for graph in graphs], None
    except Exception as error:
        traceback.print_exception(error)
        return [], f"not captured: {type(error).__name__}"
    finally:
        torch.cuda.synchronize()


class GpuTimer:
    """Times one contender on a GPU, several steps in each round."""

    def __init__(self, prepared: Prepared):
        self._steps = itertools.cycle(prepared.steps)
        self._enqueue(self._steps, len(prepared.steps))
        torch.cuda.synchronize()
        self._peak = peak_extra_bytes(next(self._steps))
        # None where the profiler has no access to the GPU.
        self._launches = len(kernels_run(next(self._steps))) or None
        self._count = 1
        step_seconds = statistics.median(self._eager_seconds() for _ in range(3))
        self._count = steps_per_round(step_seconds, self._launches)
        queueing = self._count * statistics.median(self._enqueue_seconds() for _ in range(3))
        self._sleep_seconds = 1e-3 + 2 * queueing  # twice: the GPU's clock may rise meanwhile
        replays, self._no_replay = captured(prepared.steps)
        self._replays = itertools.cycle(replays)
        self._in_time: list[bool] = []

    def turn(self) -> dict[str, float]:
        """Seconds of a step by each clock."""
        device, in_time = self.device_seconds()
        self._in_time.append(in_time)
        seconds = {"device": device, "eager": self._eager_seconds()}
        if self._no_replay is None:
            seconds["replay"] = self._queued_seconds(self._replays)[0]
        return seconds

    def forget(self) -> None:
        """Leave the rounds so far out of ``facts``."""
        self._in_time.clear()

    def facts(self) -> Row:
        """Memory and launches of a step. ``full_queue`` tells whether the device never waited."""
        return {
            "peak_bytes": self._peak,
            "launches": self._launches,
            "steps_per_round": self._count,
            "full_queue": all(self._in_time),
            "no_replay": self._no_replay,
        }

    def device_seconds(self) -> tuple[float, bool]:
        """Seconds a step takes the GPU, and whether all steps were queued in time.

        Where they were not, they are timed again behind a longer sleep.
        """
        for _ in range(RETRIES):
            seconds, in_time = self._queued_seconds(self._steps)
            if in_time:
                break
            self._sleep_seconds *= 2
        return seconds, in_time

    def _enqueue(self, steps: Iterator[Step], count: int) -> None:
        for step in itertools.islice(steps, count):
            step()

    def _enqueue_seconds(self) -> float:
        """Host time to queue one step."""
        start = time.perf_counter()
        self._enqueue(self._steps, 1)
        queued = time.perf_counter() - start
        torch.cuda.synchronize()
        return queued

    def _eager_seconds(self) -> float:
        """Host time of a step, with the wait for its end."""
        torch.cuda.synchronize()
        start = time.perf_counter()
        self._enqueue(self._steps, self._count)
        torch.cuda.synchronize()
        return (time.perf_counter() - start) / self._count

    def _queued_seconds(self, steps: Iterator[Step]) -> tuple[float, bool]:
        """Device time of a step queued behind a sleep, and whether the sleep was long enough."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        torch.cuda._sleep(int(self._sleep_seconds * sleep_cycles_per_second()))
        start.record()
        self._enqueue(steps, self._count)
        end.record()
        in_time = not start.query()  # still asleep: no step had to wait for the host
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1e3 / self._count, in_time
