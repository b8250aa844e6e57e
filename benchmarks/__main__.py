"""``python -m benchmarks``: the FSP loss beside its peers, as tables, figures and ``results.csv``.

Parts: ``loss`` times every workload, ``step`` a whole distillation step, ``scaling`` growing maps,
``plan`` every evaluation beside the one the planner chose; ``accuracy`` measures errors to float64.
``python -m benchmarks report DIR`` draws results again, ``report BEFORE AFTER`` compares two runs.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import traceback
from argparse import Namespace
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path

from benchmarks import environment
from benchmarks.options import add_options, why_impossible
from benchmarks.parts import PARTS, in_fresh_process
from benchmarks.recording import write_part
from fsp_kernels._machine import prepare_terminal

OUTPUT = Path("runs/benchmarks")
BUSY = 0.25  # load per core; one busy core of two makes every OpenMP barrier wait for the scheduler


def parser() -> argparse.ArgumentParser:
    """The options of a measurement."""
    options = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    options.add_argument(
        "part", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}; default: all"
    )
    add_options(options.add_argument)
    options.add_argument("--rounds", type=int, help="of each case; default: as there is time for")
    options.add_argument(
        "--output",
        type=Path,
        metavar="DIR",
        default=OUTPUT,
        help=f"results go into DIR/<device>; default: {OUTPUT}",
    )
    return options


def parse(arguments: Sequence[str]) -> Namespace:
    """The options, checked, with the parts in their order."""
    options = parser().parse_args(arguments)
    if unknown := [part for part in options.part if part not in PARTS]:
        parser().error(f"PART: {unknown[0]!r}, must be of {', '.join(PARTS)}, or report")
    options.part = [part for part in PARTS if not options.part or part in options.part]
    if options.rounds is not None and options.rounds < 1:
        parser().error(f"--rounds: {options.rounds}, must be at least 1")
    if reason := why_impossible(options, timed=options.part != ["accuracy"]):
        parser().error(reason)
    return options


def measure_all(options: Namespace, command: str, folder: Path) -> int:
    """Measure part after part and write their results; 1 where something failed or is wrong."""
    status = 0
    for part in options.part:
        print(f"{part}:", flush=True)
        # Taken first: a part takes long, and meanwhile someone may commit.
        facts = {
            "command": command,
            "commit": environment.commit(),
            "measured": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        }
        try:
            rows, machine = in_fresh_process(part, options)
        except Exception:  # a process that was killed is one too
            traceback.print_exc()
            status = 1
            continue
        write_part(folder, part, rows, facts | machine)
        status |= any(row.get("fault") for row in rows)
    return status


def draw(arguments: Sequence[str]) -> int:
    """``python -m benchmarks report``; 2 where a folder holds no results."""
    options = argparse.ArgumentParser(
        prog="python -m benchmarks report",
        description="Draw the report of a folder of results again, or compare two runs.",
    )
    options.add_argument("folder", nargs="+", type=Path, metavar="DIR", help="one, or two")
    folders = options.parse_args(arguments).folder
    if len(folders) > 2:
        options.error(f"DIR: {len(folders)} folders, must be one or two")
    from benchmarks import report, results  # these need pandas, Jinja2 and matplotlib

    try:
        found = [results.read(folder) for folder in folders]
    except results.Unreadable as error:
        print(error, file=sys.stderr)
        return 2
    if len(found) == 2:
        print(report.compare(*found))
    else:
        written = report.draw(folders[0])
        print(report.render(found[0], brief=True), *written, sep="\n")
    return 0


def main(arguments: Sequence[str]) -> int:
    """Measure, keep and draw the results, and print the main tables last."""
    if arguments and arguments[0] == "report":
        return draw(arguments[1:])
    options = parse(arguments)
    load, cores = environment.load(), environment.cores()
    if load > BUSY * cores:
        print(f"The machine is busy (load {load:.1f} on {cores} cores): timings will be off.")
    command = shlex.join(["python", "-m", "benchmarks", *arguments])
    folder = (options.output / environment.device_slug(options.device)).resolve()
    status = measure_all(options, command, folder)
    try:
        from benchmarks import report, results
    except ModuleNotFoundError as error:
        print(
            f"The results are in {folder}. To draw them, install {error.name} here or copy the "
            "folder to a machine that has it, then run python -m benchmarks report DIR."
        )
        return status
    try:
        written = report.draw(folder)
        text = report.render(results.read(folder), options.part, brief=True)
    except results.Unreadable as error:
        print(error, file=sys.stderr)
        return status or 2
    print("", text, *written, sep="\n")
    return status


if __name__ == "__main__":
    prepare_terminal()
    sys.exit(main(sys.argv[1:]))
