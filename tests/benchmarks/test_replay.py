"""pytest-benchmark reports replayed durations as they were measured."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.replay import ReplayClock

ROOT = Path(__file__).resolve().parents[2]
# Binary fractions that sums and differences of a running clock would round.
DURATIONS = [0.1, 0.3, 1e-9, 0.2, 1234.5678]
BENCHMARK = f"""
import pytest
from benchmarks.replay import ReplayClock

clock = ReplayClock()

@pytest.mark.benchmark(timer=clock.now)
@pytest.mark.parametrize("factor", [1, 2])
def test_replay(benchmark, factor):
    benchmark.group = "replayed"
    clock.load([factor * x for x in {DURATIONS}])
    benchmark.pedantic(clock.step, setup=clock.rewind, rounds={len(DURATIONS)})
"""


def test_a_step_takes_the_next_duration() -> None:
    clock = ReplayClock()
    clock.load(DURATIONS)
    taken = []
    for _ in DURATIONS:
        clock.rewind()
        start = clock.now()
        clock.step()
        taken.append(clock.now() - start)
    assert taken == DURATIONS


def test_pytest_benchmark_reports_the_recorded_durations(tmp_path: Path) -> None:
    (tmp_path / "bench_replay.py").write_text(BENCHMARK)
    json_path = tmp_path / "replay.json"
    # Under xdist pytest-benchmark turns itself off; this pytest is not part of that run.
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-p", "no:cacheprovider", f"--rootdir={tmp_path}"),
            *(str(tmp_path / "bench_replay.py"), f"--benchmark-json={json_path}"),
        ],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    assert "benchmark 'replayed': 2 tests" in done.stdout
    once, twice = (b["stats"] for b in json.loads(json_path.read_text())["benchmarks"])
    assert once["data"] == DURATIONS
    assert once["median"] == statistics.median(DURATIONS)
    assert twice["median"] == pytest.approx(2 * once["median"])
