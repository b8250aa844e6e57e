"""``python -m benchmarks``: the FSP loss beside its peers, as tables, figures and JSON.

Parts: ``loss`` times every workload, ``step`` a whole distillation step, ``scaling`` growing maps,
``plan`` what the planner chose against what it could have; ``accuracy`` is errors to float64.
``python -m benchmarks report PATH...`` draws results again, or compares them.
"""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks import contenders, report, workloads
from benchmarks.environment import cores, device_slug, load
from benchmarks.options import DEFAULT_DTYPES, ROUNDS
from fsp_kernels._machine import prepare_terminal

ROOT = Path(__file__).resolve().parents[1]
PARTS = ("loss", "step", "scaling", "plan", "accuracy")
OUTPUT = Path("runs/benchmarks")
BUSY = 0.25  # load per core; one busy core of two makes every OpenMP barrier wait for the scheduler


def parser() -> argparse.ArgumentParser:
    """The options; what is not asked for is filled in by ``parse``."""
    options = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    options.add_argument(
        "part", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}; default: all"
    )
    options.add_argument(
        "--device", choices=list(ROUNDS), help="default: cuda where there is a GPU, else cpu"
    )
    repeatable = {"action": "append", "default": []}
    dtypes = "; ".join(f"{' and '.join(names)} on {x}" for x, names in DEFAULT_DTYPES.items())
    options.add_argument(
        "--dtype", choices=list(workloads.DTYPES), **repeatable, help=f"default: {dtypes}"
    )
    options.add_argument("--layout", choices=list(workloads.LAYOUTS), **repeatable)
    options.add_argument(
        "--pass", choices=list(workloads.DIRECTIONS), dest="direction", **repeatable
    )
    options.add_argument("--workload", choices=list(workloads.BY_NAME), **repeatable)
    options.add_argument("--contender", metavar="NAME", **repeatable)
    options.add_argument("--rounds", type=int, help="of every race; default: as there is time for")
    options.add_argument(
        "--quick", action="store_true", help="less of everything, for a first impression"
    )
    options.add_argument(
        "--output",
        type=Path,
        metavar="DIR",
        default=OUTPUT,
        help=f"results go into DIR/<device>; default: {OUTPUT}",
    )
    return options


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The options, complete and checked."""
    options = parser().parse_args(arguments)
    if unknown := [part for part in options.part if part not in PARTS]:
        parser().error(f"PART: {unknown[0]!r}, must be of {', '.join(PARTS)}, or report")
    options.part = [part for part in PARTS if not options.part or part in options.part]
    options.device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser().error("--device cuda: torch sees no GPU here")
    timed = options.part != ["accuracy"]
    competing = [contender.name for contender in contenders.on(options.device, timed)]
    if not set(options.contender) <= set(competing):
        parser().error(f"--contender: on {options.device} there are {', '.join(competing)}")
    if options.rounds is not None and options.rounds < 1:
        parser().error(f"--rounds: {options.rounds}, must be at least 1")
    return options


def run(part: str, options: argparse.Namespace, json_path: Path, command: str) -> int:
    """Run ``bench_<part>.py`` under pytest, in a process of its own, whatever pytest's options.

    So a part that brings its process down takes no other with it.
    """
    named = {
        "--dtype": options.dtype,
        "--layout": options.layout,
        "--pass": options.direction,
        "--workload": options.workload,
        "--contender": options.contender,
        "--rounds": [options.rounds] if options.rounds else [],
    }
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", f"benchmarks/bench_{part}.py"),
            f"--device={options.device}",
            *(f"{name}={value}" for name, values in named.items() for value in values),
            *(["--quick"] if options.quick else []),
            f"--written-as={command}",
            f"--benchmark-json={json_path}",
            "--override-ini=addopts=",
            "--override-ini=filterwarnings=",
            *("-p", "no:cacheprovider", "-p", "no:terminal", "-p", "benchmarks.progress"),
            "--capture=no",
        ],
        cwd=ROOT,
    )
    return done.returncode


def main(arguments: Sequence[str]) -> int:
    """Measure part after part, keep and draw the results, and print the tables last."""
    if arguments and arguments[0] == "report":
        return report.main(arguments[1:])
    options = parse(arguments)
    report.require_matplotlib()  # before minutes are spent
    if load() > BUSY * cores():
        print(f"The machine is busy (load {load():.1f} on {cores()} cores): timings will be off.")
    command = shlex.join(["python", "-m", "benchmarks", *arguments])
    folder = (options.output / device_slug(options.device)).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    status = 0
    for part in options.part:
        print(f"{part}:", flush=True)
        status |= run(part, options, folder / f"{part}.json", command)
    try:
        written = report.draw(folder)
        print(f"\n{report.plain(folder, options.part)}\n")
    except report.Unreadable as error:
        print(error, file=sys.stderr)
        return status or 2
    print("\n".join(map(str, written)))
    return status


if __name__ == "__main__":
    prepare_terminal()
    sys.exit(main(sys.argv[1:]))
