"""Time every contender on an NVIDIA GPU, turn by turn, and count what it launches and allocates.

Three times of a step are taken, since either may be what a training loop waits for. *Device* time
is the GPU's own: steps are queued behind a kernel that sleeps until the last of them is queued, so
no launch is waited for, and events before the first and after the last tell how long they took.
*Eager* time is the host's, from one synchronisation to the next, waits for launches included.
*Replay* time is that of the same step recorded in a CUDA graph, which has no host work at all.
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
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.race import (
    Entrant,
    Outcome,
    Prepared,
    Rounds,
    Step,
    failure,
    turns,
    without_garbage_collection,
)

# Seconds of steps between two events: 1e4 times the events' resolution, and far more than the one
# synchronisation that an eager time includes.
ROUND_SECONDS = 0.01
WARM_UP = 1  # rounds that don't count: torch's allocator asks the driver for what it then keeps
# The driver queues about a thousand launches; the next one blocks the host until one is done.
QUEUED_LAUNCHES = 400
UNKNOWN_LAUNCHES = 100  # a step's, where the profiler sees none: the naive op's over four pairs
RETRIES = 4


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


def kernel_launches(step: Step) -> int | None:
    """Kernels one step runs on the GPU; None where the profiler has no access to it."""
    return len(kernels_run(step)) or None


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
    """As many as fill a round, but none whose launch would wait for room in the queue."""
    filling = math.ceil(ROUND_SECONDS / step_seconds)
    return max(1, min(filling, QUEUED_LAUNCHES // (launches or UNKNOWN_LAUNCHES)))


@lru_cache(maxsize=1)
def sleep_cycles_per_second() -> float:
    """How fast ``torch.cuda._sleep`` counts, which is as the clock of the moment goes."""
    cycles = 50_000_000
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(cycles)  # wakes the clock up
    start.record()
    torch.cuda._sleep(cycles)
    end.record()
    torch.cuda.synchronize()
    return cycles / (start.elapsed_time(end) / 1e3)


@lru_cache(maxsize=1)
def stream() -> torch.cuda.Stream:
    """The stream on which everything is measured: one, and not the default one.

    In backward, autograd makes the streams wait for each other on which the loss and the layers
    before its maps ran. A graph can be captured only where those are one stream, and on the default
    stream none can be.
    """
    return torch.cuda.Stream()


def spread(seconds: Sequence[float]) -> float:
    """The interquartile range, as pytest-benchmark computes it of what it is given."""
    if len(seconds) < 2:
        return 0.0
    lower, _, upper = statistics.quantiles(seconds, method="inclusive")
    return upper - lower


class Graphs:
    """One CUDA graph for each step, replayed in turn; ``reason`` says why there are none."""

    def __init__(self, prepared: Prepared):
        self.reason: str | None = None
        self._graphs: list[torch.cuda.CUDAGraph] = []
        try:
            self._capture(prepared)
        except Exception as error:
            traceback.print_exception(error)
            self._graphs.clear()
            self.reason = f"not captured: {type(error).__name__}"
        finally:
            torch.cuda.synchronize()

    def _capture(self, prepared: Prepared) -> None:
        pool = torch.cuda.graph_pool_handle()  # replayed one after the other, they share memory
        for step in prepared.steps:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool, stream=stream()):
                step()
            self._graphs.append(graph)

    @property
    def steps(self) -> list[Step]:
        """What to call in place of the steps."""
        return [graph.replay for graph in self._graphs]


class Runner:
    """One contender, warmed up and measured but for its times."""

    def __init__(self, entrant: Entrant, rounds: Rounds):
        self._prepared = prepared = entrant.prepare()
        self._steps = itertools.cycle(prepared.steps)
        self._enqueue(len(prepared.steps))
        torch.cuda.synchronize()
        self.peak = peak_extra_bytes(next(self._steps))
        self.launches = kernel_launches(next(self._steps))
        self.steps = 1
        step_seconds = statistics.median(self.eager_seconds() for _ in range(3))
        self.steps = steps_per_round(step_seconds, self.launches)
        self.rounds = WARM_UP + rounds.affordable(3 * self.steps * step_seconds)
        queueing = self.steps * statistics.median(self._enqueue_seconds() for _ in range(3))
        self._sleep_seconds = 1e-3 + 2 * queueing  # twice: the GPU's clock may rise meanwhile
        self._graphs = Graphs(prepared)
        self._replays = itertools.cycle(self._graphs.steps)
        self.device: list[float] = []
        self.in_time: list[bool] = []
        self.eager: list[float] = []
        self.replay: list[float] = []

    def _enqueue(self, steps: int) -> None:
        for step in itertools.islice(self._steps, steps):
            step()

    def _enqueue_seconds(self) -> float:
        """Host time to queue one step."""
        start = time.perf_counter()
        self._enqueue(1)
        queued = time.perf_counter() - start
        torch.cuda.synchronize()
        return queued

    def eager_seconds(self) -> float:
        """Seconds a step takes from the host's point of view."""
        torch.cuda.synchronize()
        start = time.perf_counter()
        self._enqueue(self.steps)
        torch.cuda.synchronize()
        return (time.perf_counter() - start) / self.steps

    def device_seconds(self) -> tuple[float, bool]:
        """Seconds a step takes the GPU, and whether all steps were queued in time.

        Where they were not, it is measured again behind a longer sleep.
        """
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        for _ in range(RETRIES):
            torch.cuda.synchronize()
            torch.cuda._sleep(int(self._sleep_seconds * sleep_cycles_per_second()))
            start.record()
            self._enqueue(self.steps)
            end.record()
            in_time = not start.query()  # still asleep: nothing after it waited for the host
            torch.cuda.synchronize()
            if in_time:
                break
            self._sleep_seconds *= 2
        return start.elapsed_time(end) / 1e3 / self.steps, in_time

    def replay_seconds(self) -> float:
        """Seconds a replayed step takes the GPU."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        torch.cuda._sleep(int(self._sleep_seconds * sleep_cycles_per_second()))
        start.record()
        for replay in itertools.islice(self._replays, self.steps):
            replay()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1e3 / self.steps

    def take_turn(self) -> None:
        """One round of each kind."""
        seconds, in_time = self.device_seconds()
        self.device.append(seconds)
        self.in_time.append(in_time)
        self.eager.append(self.eager_seconds())
        if self._graphs.reason is None:
            self.replay.append(self.replay_seconds())

    def outcome(self) -> Outcome:
        """The rounds that count and what is recorded beside them."""
        facts = {
            "peak_extra_bytes": self.peak,
            "peak_extra_method": "torch.cuda.max_memory_allocated",
            "kernel_launches": self.launches,
            "steps_per_round": self.steps,
            "full_queue": all(self.in_time[WARM_UP:]),
            **_summary("eager", self.eager[WARM_UP:]),
            **_summary("replay", self.replay[WARM_UP:]),
            "replay_reason": self._graphs.reason,
        }
        return Outcome(self.device[WARM_UP:], self._prepared.facts | facts)


def _summary(kind: str, seconds: list[float]) -> dict[str, Any]:
    if not seconds:
        return {f"{kind}_median": None, f"{kind}_iqr": None, f"{kind}_seconds": None}
    return {
        f"{kind}_median": statistics.median(seconds),
        f"{kind}_iqr": spread(seconds),
        f"{kind}_seconds": seconds,
    }


def _prepare(
    entrants: Sequence[Entrant], rounds: Rounds
) -> tuple[dict[str, Runner], dict[str, Outcome]]:
    """Those who are ready to be timed, and what kept the others from it."""
    ready: dict[str, Runner] = {}
    failed: dict[str, Outcome] = {}
    for entrant in entrants:
        try:
            ready[entrant.name] = Runner(entrant, rounds)
        except Exception as error:
            failed[entrant.name] = failure(error)
        gc.collect()
        torch.cuda.empty_cache()  # the next one finds the device as empty as the first did
    return ready, failed


def on_cuda(entrants: Sequence[Entrant], rounds: Rounds) -> dict[str, Outcome]:
    """All times of every contender that works; ``rounds.seconds`` is for each of them."""
    torch.cuda.synchronize()  # the inputs were made on the default stream
    with torch.cuda.stream(stream()), without_garbage_collection():
        ready, failed = _prepare(entrants, rounds)
        limits = {name: runner.rounds for name, runner in ready.items()}
        for name in turns(list(ready), WARM_UP + rounds.most, limits):
            if name in failed:
                continue
            try:
                ready[name].take_turn()
            except Exception as error:
                failed[name] = failure(error)
    done = {name: runner.outcome() for name, runner in ready.items() if name not in failed}
    return {x.name: (done | failed)[x.name] for x in entrants}
