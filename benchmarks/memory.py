"""Peak extra memory of a step on a CPU: from before its forward to the end of its backward.

It counts what the step allocates, its gradients included, never the maps it is given.

PyTorch's CPU allocator keeps no statistics. On Linux the kernel's high-water mark of resident
memory is the true answer, since it also sees what never passes through that allocator, such as
scratch of a BLAS or of a C++ extension. It is read in a fresh process that tells malloc to return
freed blocks at once: by default malloc keeps them, and the second step looks as if it needed
nothing. A first, unmeasured step compiles and starts threads. Pages count, so a result is good to
about 0.1 MiB; on the naive op it agrees with the profiler to that.

Elsewhere the profiler's allocation events are summed: exact, but only for torch's own allocator.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks import contenders, workloads
from benchmarks.measure import Step, forget_gradients, gradient_step
from benchmarks.workloads import DTYPES, Workload, feature_maps

ROOT = Path(__file__).resolve().parents[1]
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
    """Peak of what torch's allocator handed out and not yet got back during ``step``, in bytes."""
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


def gradient_bytes(workload: Workload, batch: int, dtype: torch.dtype) -> int:
    """What the gradients of the student's maps take: no implementation can use less."""
    shapes = [workload.shape(x, batch) for pair in workload.layers for x in pair]
    return sum(dtype.itemsize * math.prod(shape) for shape in shapes)


def peaks(workload: Workload, names: Sequence[str], dtype: torch.dtype) -> dict[str, int]:
    """Peak extra bytes of each contender that fits, in this process."""
    student, teacher = feature_maps(workload, workload.cpu_batch, dtype)
    peak = {"resident": resident_peak, "profiler": profiled_peak}[method()]
    found = {}
    for name in names:
        contender = contenders.BY_NAME[name]
        if not contender.fits(workload, workload.cpu_batch):
            continue
        step = gradient_step(contender.build(), student, teacher)
        step()
        forget_gradients(student)
        found[name] = peak(step)
        forget_gradients(student)
    return found


def peaks_in_fresh_process(
    workload: Workload, names: Sequence[str], dtype_name: str
) -> dict[str, int]:
    """``peaks`` where malloc returns what is freed, which must be said before a process starts."""
    command = [sys.executable, "-m", "benchmarks.memory", workload.name, dtype_name, *names]
    environment = os.environ | RETURN_FREED_MEMORY
    environment["OMP_NUM_THREADS"] = str(torch.get_num_threads())
    done = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Print ``{contender: peak extra bytes}`` of one workload as JSON."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("workload", choices=workloads.BY_NAME)
    parser.add_argument("dtype", choices=DTYPES)
    parser.add_argument("contender", nargs="+", choices=contenders.BY_NAME)
    options = parser.parse_args()
    workload = workloads.BY_NAME[options.workload]
    print(json.dumps(peaks(workload, options.contender, DTYPES[options.dtype])))


if __name__ == "__main__":
    main()
