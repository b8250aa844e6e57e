"""Time every contender on an NVIDIA GPU, turn by turn, and count what it launches and allocates.

Two times of a step are taken, since either may be what a training loop waits for. *Device* time
is the GPU's own: steps are queued behind a kernel that sleeps until the last of them is queued, so
no launch is waited for, and events before the first and after the last tell how long they took.
*Eager* time is the host's, from one synchronisation to the next, waits for launches included.

Steps take turns over copies of the maps that do not fit in L2 together. Otherwise a small workload
would be read from cache, where no training loop leaves it. A copy's gradients are dropped right
before its next step, so they rotate alike.
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
from functools import lru_cache
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.contenders import Contender
from benchmarks.floor import copy_rate, floor_bytes
from benchmarks.measure import (
    Check,
    Step,
    forget_gradients,
    gradient_step,
    leaves,
    turns,
    without_garbage_collection,
)
from benchmarks.outcome import Outcome
from benchmarks.peers import Loss
from benchmarks.workloads import Pairs, Workload, feature_maps

# Seconds of steps between two events: 1e4 times the events' resolution, and far more than the one
# synchronisation that an eager time includes.
ROUND_SECONDS = 0.01
# Seconds for one contender on one workload, both times together: six contenders on nine workloads
# in two dtypes then take half a minute, compilation aside.
BUDGET_SECONDS = 0.3
MIN_ROUNDS = 3  # however slow: a median and a spread need as many
WARM_UP = 1  # rounds that don't count: torch's allocator asks the driver for what it then keeps
# The driver queues about a thousand launches; the next one blocks the host until one is done.
QUEUED_LAUNCHES = 400
UNKNOWN_LAUNCHES = 100  # a step's, where the profiler sees none: the naive op's over four pairs
RETRIES = 4
L2_MULTIPLE = 3  # what the copies take together, in sizes of L2
UNKNOWN_L2 = 128 << 20  # as large as any so far
OUT_OF_MEMORY = "out of memory"

Sets = Sequence[tuple[Pairs, Pairs]]


def l2_bytes() -> int:
    """The size of the GPU's last-level cache."""
    return getattr(torch.cuda.get_device_properties(), "L2_cache_size", 0) or UNKNOWN_L2


def rotating(student: Pairs, teacher: Pairs) -> Sets:
    """Copies of the maps, strides included, the first being the maps themselves."""
    size = sum(x.nbytes for x in leaves(student) + leaves(teacher))
    count = max(2, math.ceil(L2_MULTIPLE * l2_bytes() / size))

    def copy(pairs: Pairs) -> Pairs:
        return [
            (
                first.detach().clone().requires_grad_(first.requires_grad),
                second.detach().clone().requires_grad_(second.requires_grad),
            )
            for first, second in pairs
        ]

    return [(student, teacher), *((copy(student), copy(teacher)) for _ in range(count - 1))]


def rotating_steps(loss: Loss, sets: Sets) -> Iterator[Step]:
    """Steps without end, each on the next copy of the maps."""

    def fresh(student: Pairs, teacher: Pairs) -> Step:
        step = gradient_step(loss, student, teacher)

        def run() -> None:
            forget_gradients(student)
            step()

        return run

    return itertools.cycle([fresh(student, teacher) for student, teacher in sets])


def kernel_launches(step: Step) -> int | None:
    """Kernels one step runs on the GPU; None where the profiler has no access to it."""
    with profile(activities=[ProfilerActivity.CUDA]) as recorded:
        step()
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        recorded.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    return sum(event.get("cat") == "kernel" for event in events) or None


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


def affordable_rounds(round_seconds: float) -> int:
    """Rounds that the budget has time for, each timed twice."""
    return max(MIN_ROUNDS, int(BUDGET_SECONDS / (2 * round_seconds)))


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


class Runner:
    """One contender, checked, warmed up and measured but for its times."""

    def __init__(self, contender: Contender, check: Check, sets: Sets):
        loss = contender.build()
        self.errors = check(contender, loss)
        self._steps = rotating_steps(loss, sets)
        self._enqueue(len(sets))
        torch.cuda.synchronize()
        for student, _ in sets:
            forget_gradients(student)
        self.peak = peak_extra_bytes(next(self._steps))
        self.launches = kernel_launches(next(self._steps))
        self.steps = 1
        step_seconds = statistics.median(self.eager_seconds() for _ in range(3))
        self.steps = steps_per_round(step_seconds, self.launches)
        self.rounds = WARM_UP + affordable_rounds(self.steps * step_seconds)
        queueing = self.steps * statistics.median(self._enqueue_seconds() for _ in range(3))
        self._sleep_seconds = 1e-3 + 2 * queueing  # twice: the GPU's clock may rise meanwhile
        self.device: list[float] = []
        self.in_time: list[bool] = []
        self.eager: list[float] = []

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

    def take_turn(self) -> None:
        """One round of each kind."""
        seconds, in_time = self.device_seconds()
        self.device.append(seconds)
        self.in_time.append(in_time)
        self.eager.append(self.eager_seconds())

    def outcome(self, floor: dict[str, float]) -> Outcome:
        """The rounds that count and what is recorded beside them."""
        eager = self.eager[WARM_UP:]
        facts = {
            "loss_error": self.errors[0],
            "gradient_error": self.errors[1],
            "peak_extra_bytes": self.peak,
            "peak_extra_method": "torch.cuda.max_memory_allocated",
            "kernel_launches": self.launches,
            "steps_per_round": self.steps,
            "full_queue": all(self.in_time[WARM_UP:]),
            "eager_median": statistics.median(eager),
            "eager_seconds": eager,
        }
        return Outcome(self.device[WARM_UP:], facts | floor)


def failure(error: Exception) -> Outcome:
    """A contender that cannot be timed costs its own row, never the others' results."""
    if isinstance(error, torch.OutOfMemoryError):
        return Outcome(reason=OUT_OF_MEMORY)
    traceback.print_exception(error)
    kind = "wrong" if isinstance(error, AssertionError) else f"failed: {type(error).__name__}"
    return Outcome(reason=kind, fault=True)


def prepare(
    contenders: Sequence[Contender], check: Check, sets: Sets
) -> tuple[dict[str, Runner], dict[str, Outcome]]:
    """Those who are ready to be timed, and what kept the others from it."""
    ready, failed = {}, {}
    for contender in contenders:
        try:
            ready[contender.name] = Runner(contender, check, sets)
        except Exception as error:
            failed[contender.name] = failure(error)
        for student, _ in sets:
            forget_gradients(student)
        gc.collect()
        torch.cuda.empty_cache()  # the next one finds the device as empty as the first did
    return ready, failed


def time_workload(
    workload: Workload, contenders: Sequence[Contender], rounds: int, dtype: torch.dtype
) -> dict[str, Outcome]:
    """Both times of every contender that works, on the same maps at the workload's full batch."""
    rate = copy_rate()
    student, teacher = feature_maps(workload, workload.batch, dtype, device="cuda")
    check = Check(workload, student, teacher)
    ready, failed = prepare(contenders, check, rotating(student, teacher))
    del check
    limits = {name: runner.rounds for name, runner in ready.items()}
    with without_garbage_collection():
        for name in turns(list(ready), WARM_UP + rounds, limits):
            if name in failed:
                continue
            try:
                ready[name].take_turn()
            except Exception as error:
                failed[name] = failure(error)
    floor = {"floor_bytes": floor_bytes(student, teacher), "copy_bytes_per_second": rate}
    done = {name: run.outcome(floor) for name, run in ready.items() if name not in failed}
    return done | failed
