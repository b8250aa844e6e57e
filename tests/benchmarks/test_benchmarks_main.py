"""``python -m benchmarks`` from its options to its files."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import contenders, workloads
from benchmarks.__main__ import QUICK_ROUNDS, parse
from benchmarks.environment import device_slug

ROOT = Path(__file__).resolve().parents[2]


def test_without_options_everything_runs() -> None:
    options = parse([])
    assert options.workload == list(workloads.BY_NAME)
    assert options.contender == list(contenders.BY_NAME)


def test_quick_only_changes_what_is_not_asked_for() -> None:
    options = parse(["--quick"])
    assert (options.workload, options.rounds) == (list(workloads.QUICK), QUICK_ROUNDS)
    options = parse(["--quick", "--workload", "segmentation", "--rounds", "2"])
    assert (options.workload, options.rounds) == (["segmentation"], 2)


@pytest.mark.slow
def test_a_quick_run_prints_a_table_and_writes_its_files(tmp_path: Path) -> None:
    # Under xdist pytest-benchmark turns itself off; the run below is not part of that one.
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    options = [
        "--quick",
        "--workload=cifar-resnet",
        "--contender=fsp_kernels",
        "--contender=einsum",
    ]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks", *options, f"--output={tmp_path}"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "geometric mean" in done.stdout
    folder = tmp_path / device_slug()
    assert "| cifar-resnet | 32 | 7.00 MiB |" in (folder / "loss.md").read_text()
    text = (folder / "loss.json").read_text()
    assert platform.node() not in text.split('"')
    found = {b["extra_info"]["contender"]: b for b in json.loads(text)["benchmarks"]}
    assert set(found) == {"fsp_kernels", "einsum"}
    for entry in found.values():
        assert len(entry["stats"]["data"]) == QUICK_ROUNDS
        assert (
            entry["extra_info"]["peak_extra_bytes"] >= 0.98 * entry["extra_info"]["gradient_bytes"]
        )
