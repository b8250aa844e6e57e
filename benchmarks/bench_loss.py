"""Loss forward + backward, every contender on every workload, in pytest-benchmark's hands.

``pytest benchmarks/bench_loss.py`` prints its comparison; ``python -m benchmarks`` runs this and
prints one table for each dtype.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from benchmarks import contenders, cuda, measure, memory
from benchmarks.contenders import Contender
from benchmarks.outcome import Outcome
from benchmarks.replay import ReplayClock
from benchmarks.workloads import DTYPES, Workload

clock = ReplayClock()


def on_cpu(
    workload: Workload, chosen: Sequence[Contender], rounds: int, dtype_name: str
) -> dict[str, Outcome]:
    """Times in this process, then peaks in a fresh one, which finds compiled code in its cache."""
    timings = measure.time_workload(workload, chosen, rounds, DTYPES[dtype_name])
    peaks = memory.peaks_in_fresh_process(workload, list(timings), dtype_name)
    outcomes = {c.name: Outcome(reason="does not fit") for c in chosen}
    for name, timing in timings.items():
        memory_facts = {
            "peak_extra_bytes": peaks[name],
            "peak_extra_method": memory.method(),
        }
        outcomes[name] = Outcome(timing.durations, memory_facts | timing.facts())
    return outcomes


def on_cuda(
    workload: Workload, chosen: Sequence[Contender], rounds: int, dtype_name: str
) -> dict[str, Outcome]:
    """Times, launches and peaks, all in this process."""
    return cuda.time_workload(workload, chosen, rounds, DTYPES[dtype_name])


@pytest.fixture(scope="module")
def outcomes(
    workload: Workload, dtype_name: str, device: str, contender_names: list[str], rounds: int
) -> dict[str, Outcome]:
    """All contenders of a workload, measured together once."""
    print(
        f"\n{workload.name}, {dtype_name}: {rounds} rounds of {', '.join(contender_names)}",
        flush=True,
    )
    chosen = [contenders.BY_NAME[name] for name in contender_names]
    run = on_cpu if device == "cpu" else on_cuda
    return run(workload, chosen, rounds, dtype_name)


@pytest.mark.benchmark(timer=clock.now)
def test_loss(
    benchmark: Any,
    workload: Workload,
    dtype_name: str,
    device: str,
    contender_name: str,
    outcomes: dict[str, Outcome],
    not_measured: list[dict[str, Any]],
) -> None:
    outcome = outcomes[contender_name]
    identity = {"workload": workload.name, "dtype": dtype_name, "contender": contender_name}
    if outcome.reason is not None:
        not_measured.append(identity | {"reason": outcome.reason})
        give_up = pytest.fail if outcome.fault else pytest.skip
        give_up(outcome.reason)
    batch = workload.batch_on(device)
    benchmark.group = f"{workload.name}, {dtype_name}"
    benchmark.extra_info.update(
        identity,
        device=device,
        batch=batch,
        gradient_bytes=memory.gradient_bytes(workload, batch, DTYPES[dtype_name]),
        **outcome.facts,
    )
    clock.load(outcome.durations)
    benchmark.pedantic(clock.step, setup=clock.rewind, rounds=len(outcome.durations))
