"""``python -m benchmarks``: time and memory of the FSP loss beside its peers, as one table."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import pytest
from rich.console import Console

from benchmarks import contenders, report, workloads
from benchmarks.conftest import DEFAULT_ROUNDS
from benchmarks.environment import cores, device_slug, load

HERE = Path(__file__).parent
QUICK_ROUNDS = 5
BUSY = 0.25  # load per core; one busy core of two makes every OpenMP barrier wait for the scheduler


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The options; ``--quick`` only changes defaults."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument(
        "--workload", action="append", choices=workloads.BY_NAME, help="only this one; repeatable"
    )
    parser.add_argument(
        "--contender", action="append", choices=contenders.BY_NAME, help="only this; repeatable"
    )
    parser.add_argument("--rounds", type=int, help=f"default {DEFAULT_ROUNDS}")
    parser.add_argument(
        "--quick",
        action="store_true",
        help=f"{QUICK_ROUNDS} rounds of {', '.join(workloads.QUICK)}, a first impression",
    )
    parser.add_argument(
        "--output", type=Path, metavar="DIR", help="write loss.json and loss.md into DIR/<device>"
    )
    options = parser.parse_args(arguments)
    options.rounds = options.rounds or (QUICK_ROUNDS if options.quick else DEFAULT_ROUNDS)
    options.workload = options.workload or list(
        workloads.QUICK if options.quick else workloads.BY_NAME
    )
    options.contender = options.contender or list(contenders.BY_NAME)
    return options


def run(options: argparse.Namespace, json_path: Path) -> int:
    """Run ``bench_loss.py`` under pytest, whatever the project's own pytest options are."""
    chosen = [f"--workload={name}" for name in options.workload]
    chosen += [f"--contender={name}" for name in options.contender]
    return pytest.main(
        [
            str(HERE / "bench_loss.py"),
            f"--rounds={options.rounds}",
            *chosen,
            f"--benchmark-json={json_path}",
            "--override-ini=addopts=",
            "-p",
            "no:cacheprovider",
            "--quiet",
            "--capture=no",  # says which workload is running
        ]
    )


def main(arguments: Sequence[str]) -> int:
    """Measure, print the table last, and keep it where asked."""
    options = parse(arguments)
    if load() > BUSY * cores():
        print(f"The machine is busy (load {load():.1f} on {cores()} cores): timings will be off.")
    command = shlex.join(["python", "-m", "benchmarks", *arguments])
    with tempfile.TemporaryDirectory() as scratch:
        json_path = Path(scratch) / "loss.json"
        status = run(options, json_path)
        if status != 0:
            return status
        text = json_path.read_text()
    results = json.loads(text)
    if options.output:
        folder = options.output / device_slug()
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "loss.json").write_text(text)
        (folder / "loss.md").write_text(report.markdown(results, command))
    # A pipe has no width; rich would take 80 columns and cut the table.
    console = Console() if sys.stdout.isatty() else Console(width=report.WIDTH)
    console.print(report.rich_table(report.rows_of(results)))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
