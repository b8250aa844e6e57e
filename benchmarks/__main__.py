"""``python -m benchmarks``: time and memory of the FSP loss beside its peers, as a table."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import contenders, figure, report, workloads
from benchmarks.conftest import DEFAULT_ROUNDS
from benchmarks.environment import cores, device_slug, load
from benchmarks.rows import rows_of

HERE = Path(__file__).parent
QUICK_ROUNDS = 5
DEFAULT_DTYPES = {"cpu": ["fp32"], "cuda": ["bf16", "fp32"]}
BUSY = 0.25  # load per core; one busy core of two makes every OpenMP barrier wait for the scheduler


def parser() -> argparse.ArgumentParser:
    """The options; what is not asked for is filled in by ``parse``."""
    options = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    options.add_argument(
        "--device", choices=DEFAULT_ROUNDS, help="default: cuda where there is a GPU, else cpu"
    )
    options.add_argument(
        "--dtype",
        nargs="+",
        choices=workloads.DTYPES,
        help="of the maps; default: bf16 and fp32 on a GPU, fp32 on a CPU",
    )
    options.add_argument(
        "--workload", action="append", choices=workloads.BY_NAME, help="only this one; repeatable"
    )
    options.add_argument("--contender", action="append", help="only this; repeatable")
    defaults = " and ".join(f"{rounds} on {name}" for name, rounds in DEFAULT_ROUNDS.items())
    options.add_argument(
        "--rounds",
        type=int,
        help=f"default {defaults}; on a GPU slow contenders get as many as a budget allows",
    )
    options.add_argument(
        "--quick",
        action="store_true",
        help=f"{QUICK_ROUNDS} rounds of {', '.join(workloads.QUICK)}, a first impression",
    )
    options.add_argument(
        "--output",
        type=Path,
        metavar="DIR",
        help="write loss.json and loss.md, on a GPU also loss.png, into DIR/<device>",
    )
    return options


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The options, complete; ``--quick`` only changes defaults."""
    options = parser().parse_args(arguments)
    options.device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser().error("--device cuda: torch sees no GPU here")
    options.dtype = options.dtype or DEFAULT_DTYPES[options.device]
    default_rounds = QUICK_ROUNDS if options.quick else DEFAULT_ROUNDS[options.device]
    options.rounds = options.rounds or default_rounds
    options.workload = options.workload or list(
        workloads.QUICK if options.quick else workloads.BY_NAME
    )
    competing = [contender.name for contender in contenders.on(options.device)]
    unknown = set(options.contender or ()) - set(competing)
    if unknown:
        parser().error(f"--contender: on {options.device} there are {', '.join(competing)}")
    options.contender = options.contender or competing
    return options


def run(options: argparse.Namespace, json_path: Path) -> int:
    """Run ``bench_loss.py`` under pytest, whatever the project's own pytest options are."""
    chosen = [f"--dtype={name}" for name in options.dtype]
    chosen += [f"--workload={name}" for name in options.workload]
    chosen += [f"--contender={name}" for name in options.contender]
    return pytest.main(
        [
            str(HERE / "bench_loss.py"),
            f"--device={options.device}",
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


def write(results: dict[str, Any], text: str, folder: Path, command: str) -> None:
    """The files of a run."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "loss.json").write_text(text)
    (folder / "loss.md").write_text(report.markdown(results, command))
    if report.on_gpu(results):
        figure.draw(rows_of(results), results["machine_info"]["gpu"], folder / "loss.png")


def main(arguments: Sequence[str]) -> int:
    """Measure, keep it where asked, and print the table last, also where one contender failed."""
    options = parse(arguments)
    if options.output and options.device == "cuda":
        figure.matplotlib_figure()  # raises before minutes are spent
    if load() > BUSY * cores():
        print(f"The machine is busy (load {load():.1f} on {cores()} cores): timings will be off.")
    command = shlex.join(["python", "-m", "benchmarks", *arguments])
    with tempfile.TemporaryDirectory() as scratch:
        json_path = Path(scratch) / "loss.json"
        status = run(options, json_path)
        if not json_path.exists():
            return status or 1
        text = json_path.read_text()
    results = json.loads(text)
    if options.output:
        write(results, text, options.output / device_slug(options.device), command)
    print(f"\n{report.plain(results)}")
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
