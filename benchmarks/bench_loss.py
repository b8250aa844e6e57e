"""Loss forward + backward, every contender on every workload, in pytest-benchmark's hands.

``pytest benchmarks/bench_loss.py`` prints its comparison; ``python -m benchmarks`` runs this and
prints one table.
"""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks import contenders, memory
from benchmarks.measure import Timing, time_workload
from benchmarks.replay import ReplayClock
from benchmarks.workloads import Workload

clock = ReplayClock()


@pytest.fixture(scope="module")
def timings(workload: Workload, contender_names: list[str], rounds: int) -> dict[str, Timing]:
    """All contenders of a workload, timed together once."""
    print(f"\n{workload.name}: {rounds} rounds of {', '.join(contender_names)}", flush=True)
    return time_workload(workload, [contenders.BY_NAME[name] for name in contender_names], rounds)


@pytest.fixture(scope="module")
def peaks(workload: Workload, timings: dict[str, Timing]) -> dict[str, int]:
    """Peak extra bytes of each; after ``timings``, so that compiled code is found in its cache."""
    return memory.peaks_in_fresh_process(workload, list(timings))


@pytest.mark.benchmark(timer=clock.now)
def test_loss(
    benchmark: Any,
    workload: Workload,
    contender_name: str,
    timings: dict[str, Timing],
    peaks: dict[str, int],
) -> None:
    if contender_name not in timings:
        pytest.skip("does not fit")
    timing = timings[contender_name]
    benchmark.group = workload.name
    benchmark.extra_info.update(
        workload=workload.name,
        contender=contender_name,
        batch=workload.cpu_batch,
        peak_extra_bytes=peaks[contender_name],
        peak_extra_method=memory.method(),
        gradient_bytes=memory.gradient_bytes(workload),
        loss_error=timing.loss_error,
        gradient_error=timing.gradient_error,
    )
    clock.load(timing.durations)
    benchmark.pedantic(clock.step, setup=clock.rewind, rounds=len(timing.durations))
