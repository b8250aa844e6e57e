"""Peak extra memory of a step on a CPU, from before its forward to the end of its backward.

It counts what the step allocates, its gradients included, and not the maps it is given.

PyTorch's CPU allocator keeps no statistics. On Linux the kernel's high-water mark of resident
memory is the true answer, since it also sees the scratch memory of a BLAS or of a C++ extension. It
is read in a fresh process that tells malloc to return freed blocks at once. By default malloc keeps
them, and a second step looks as if it needed no memory. A first, unmeasured step compiles and
starts threads. The kernel may count up to 64 pages of each thread late, so a result is good to
0.25 MiB a thread; mostly it is better.

Elsewhere the profiler's allocation events are summed, which see torch's own allocator alone.
"""

from __future__ import annotations

import gc
import json
import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.checks import Row, Step

Job = Callable[[], Step]  # makes a step in another process, to which it can be sent

CLEAR_REFS = Path("/proc/self/clear_refs")
STATUS = Path("/proc/self/status")
# Blocks of 64 KiB and more get a mapping of their own, unmapped when freed (glibc's mallopt(3)).
RETURN_FREED_MEMORY = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


def _resident(field: str) -> int:
    line = next(x for x in STATUS.read_text().splitlines() if x.startswith(field + ":"))
    return int(line.split()[1]) * 1024  # the kernel prints kB and means KiB


def resident_peak(step: Step) -> int:
    """Growth of the process's peak resident memory while ``step`` runs, in bytes (Linux)."""
    gc.collect()
    CLEAR_REFS.write_text("5")  # resets the high-water mark to the present, see proc(5)
    before = _resident("VmRSS")
    step()
    return max(0, _resident("VmHWM") - before)


def profiled_peak(step: Step) -> int:
    """Peak of what torch's allocator handed out and did not get back in ``step``, in bytes."""
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        step()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        recorded.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    events = [event for event in events if event.get("name") == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event["ts"]):
        held += event["args"]["Bytes"]
        peak = max(peak, held)
    return peak


def method() -> str:
    """``"resident"`` where the kernel can reset its high-water mark, else ``"profiler"``."""
    return "resident" if os.access(CLEAR_REFS, os.W_OK) else "profiler"


def peaks(jobs: Sequence[Job]) -> list[int | None]:
    """Peak extra bytes of each job's step, in this process; ``None`` where it fails."""
    return [_peak(job) for job in jobs]


def _peak(job: Job) -> int | None:
    peak = {"resident": resident_peak, "profiler": profiled_peak}[method()]
    try:
        step = job()
        step()
        return peak(step)
    except Exception:
        traceback.print_exc()
        return None


def peaks_in_fresh_process(jobs: Sequence[Job]) -> list[int | None]:
    """``peaks`` in a process where malloc returns what is freed, with as many threads as here."""
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    context = multiprocessing.get_context("spawn")
    with (
        _environment(RETURN_FREED_MEMORY | threads),  # malloc reads it when the process starts
        ProcessPoolExecutor(1, mp_context=context) as pool,
    ):
        return pool.submit(peaks, jobs).result()


def add_peaks(jobs: Sequence[tuple[Row, Job]]) -> None:
    """Add ``peak_bytes`` to each row, measured with its job; none where the process is killed."""
    try:
        found = peaks_in_fresh_process([job for _, job in jobs]) if jobs else []
    except BrokenProcessPool:
        traceback.print_exc()
        return
    for (row, _), peak in zip(jobs, found, strict=True):
        row["peak_bytes"] = peak


@contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.update(variables)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
