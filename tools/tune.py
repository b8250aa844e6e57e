"""Find the fastest configuration of each Triton kernel on this GPU and write it into the table.

    python -m tools.tune [--seconds 540] [--kernel one_pass] [--kind half] [--table PATH]

Rows that workloads use come first. For each row the candidates are compiled side by side; one that
fails, spills registers or asks for more than the chip has is dropped, and so is one whose results
differ from those of the configuration in force. The others are timed against it (``trials.py`` says
how). A row changes where a candidate is faster by more than 3 %. Either way it then says on which
chip it was measured.

The table is written after each row, so it is complete whenever the run ends: at ``--seconds``, by
Ctrl-C or by SIGTERM. Call it again to go on: rows measured on this chip with these versions of
torch and triton are left out, unless ``--again``. Run ``python -m tools.compile_triton`` and the
tests afterwards.
"""

from __future__ import annotations

import argparse
import datetime
import math
import os
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import triton

from fsp_kernels.backends.triton import configurations
from fsp_kernels.backends.triton.configurations import Configuration, Row, family_of, replaced
from tools.trials import Situation, candidates, compile_trial, measure, situations
from tools.workers import Workers

GAIN = 1.03  # what a change must bring, above the noise of a round
KINDS = ("half", "tf32x3", "tf32")  # those that users get by default first
# Seconds: what a row needs at least, what of the time left is kept for its measurement, and what
# compiling a candidate may take.
LEAST, FOR_MEASURING, FOR_COMPILING = 20.0, 10.0, 120.0
GRACE = 5.0  # after the deadline a candidate that is being timed may still end
QUIET = 90.0  # seconds for one candidate: a kernel may never end
INTERRUPTED = 130  # exit status


@dataclass
class Trial:
    """A row on trial, and the outcome of each candidate so far."""

    row: Row
    used: list[Situation]
    todo: list[Configuration]
    in_force: float = math.nan  # milliseconds, the sum over all situations
    ratios: dict[Configuration, float] = field(default_factory=dict)
    dropped: dict[Configuration, str] = field(default_factory=dict)
    trying: Configuration | None = None
    reason: str | None = None  # why the configuration in force could not be timed

    def record(self, message: tuple[Any, ...]) -> None:
        """Note a message of ``trials.measure``."""
        kind, *what = message
        if kind == "trying":
            (self.trying,) = what
        elif kind == "in force":
            self.in_force = sum(what[0])
        elif kind == "skipped":
            print("  skipped {}: {}".format(*what), flush=True)
        else:
            self.trying = None
            if kind == "timed":
                self.ratios[what[0]] = what[1]
            else:
                self.drop(*what)

    def drop(self, candidate: Configuration, reason: str) -> None:
        self.dropped[candidate] = reason
        print(f"  dropped {tuple(candidate)}: {reason}", flush=True)

    @property
    def left(self) -> list[Configuration]:
        """Candidates with no outcome yet."""
        return [c for c in self.todo if c not in self.ratios and c not in self.dropped]

    @property
    def best(self) -> tuple[Configuration, float]:
        """The fastest configuration and its time in times of the one in force."""
        fastest = min(self.ratios, key=self.ratios.__getitem__, default=None)
        if fastest is not None and self.ratios[fastest] * GAIN < 1:
            return fastest, self.ratios[fastest]
        return self.row.configuration, 1.0

    def outcome(self, chip: str, date: str) -> Row:
        """The row as the table is to have it; unchanged where nothing was timed."""
        if not self.ratios:
            return self.row
        measured = f"{chip}, {date}"
        if self.left:
            measured += f", {len(self.todo) - len(self.left)} of {len(self.todo)} candidates"
        return self.row._replace(configuration=self.best[0], measured=measured)

    def __str__(self) -> str:
        row, (configuration, ratio) = self.row, self.best
        head = f"{row.kernel} {row.kind} {row.access}, limit {row.limit}"
        if not self.ratios:
            return f"{head}: not measured, {self.reason or 'no time left'}"
        return (
            f"{head}: {tuple(configuration)}, {ratio:.3f} of {self.in_force:.4f} ms in force; "
            f"{len(self.ratios)} timed, {len(self.dropped)} dropped, {len(self.left)} left"
        )


def is_measured(row: Row, chip: str) -> bool:
    """Whether all candidates of a row were tried on this chip with these versions."""
    text = row.measured or ""
    return text.startswith(f"{chip}, ") and not text.endswith(" candidates")


def in_order(rows: Sequence[Row], table: Sequence[Row]) -> list[tuple[Row, list[Situation]]]:
    """The rows with their situations, the ones that matter to most users first."""
    found = [(row, situations(row, table)) for row in rows]
    return sorted(found, key=lambda x: (x[1][0].workload is None, KINDS.index(x[0].kind)))


def try_out(trial: Trial, table: Sequence[Row], workers: Workers, deadline: float) -> None:
    """Compile and time the candidates of a row, and record the outcomes in ``trial``."""
    calls = []
    for candidate in trial.todo:
        changed = trial.row._replace(configuration=candidate)
        calls.append((replaced(table, trial.row, changed), changed, trial.used))
    together = deadline - FOR_MEASURING - time.time()
    compiled = workers.run_all(compile_trial, calls, FOR_COMPILING, together)
    ready = [trial.row.configuration]  # which is timed, whatever a compiler says of it
    for candidate, result in list(zip(trial.todo, compiled, strict=True))[1:]:
        if result is not None and (result.reason or result.value):
            trial.drop(candidate, result.reason or result.value)
        elif result is not None:
            ready.append(candidate)
    while (left := [c for c in ready if c in trial.left]) and time.time() < deadline:
        result = workers.run(
            measure,
            *(list(table), trial.row, trial.used, left, deadline),
            seconds=deadline + GRACE - time.time(),
            quiet=QUIET,
            on_message=trial.record,
        )
        if result.reason is None:
            return
        if trial.trying is not None and time.time() < deadline:
            trial.drop(trial.trying, result.reason)
        trial.trying = None
        if not set(left) - set(trial.left):  # not a candidate's fault
            trial.reason = result.reason
            return


def run(
    rows: Sequence[Row], table: list[Row], path: Path, chip: str, deadline: float, jobs: int
) -> tuple[int, int]:
    """Try out rows until the deadline; how many were measured, and how many could not be.

    The table in ``path`` is replaced as a whole after each row.
    """
    today = datetime.date.today().isoformat()
    measured = failed = 0
    with Workers(jobs) as workers:
        for row, used in in_order(rows, table):
            if deadline - time.time() < LEAST:
                break
            trial = Trial(row, used, candidates(row))
            print(f"{row.kernel} {row.kind} {row.access}, limit {row.limit}, timed at", flush=True)
            print("  " + "; ".join(map(str, used)), flush=True)
            try:
                try_out(trial, table, workers, deadline)
            finally:  # an interrupted row keeps what is known of it
                table[:] = replaced(table, row, trial.outcome(chip, today))
                configurations.write(table, path)
                print(trial, flush=True)
            measured += bool(trial.ratios)
            failed += trial.reason is not None
    return measured, failed


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tools.tune",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--kernel", choices=configurations.KERNELS, help="one kernel only")
    parser.add_argument("--kind", choices=configurations.KINDS, help="one kind of product only")
    parser.add_argument("--seconds", type=float, default=540, help="for the whole run")
    parser.add_argument("--again", action="store_true", help="measured rows, too")
    parser.add_argument(
        "--table",
        type=Path,
        default=configurations.TABLE,
        help="file to write, and to go on from where it exists; default: the package's own",
    )
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="compilers side by side")
    chosen = parser.parse_args(arguments)
    deadline = time.time() + chosen.seconds
    if not torch.cuda.is_available():
        print("tools.tune times kernels on an NVIDIA GPU, and PyTorch sees none here")
        return 1
    major, minor = torch.cuda.get_device_capability()
    family = family_of(10 * major + minor)
    versions = f"torch {torch.__version__}, triton {triton.__version__}"
    chip = f"{torch.cuda.get_device_name()}, {versions}"
    start = chosen.table if chosen.table.exists() else configurations.TABLE
    table = list(configurations.read(start))
    rows = [
        row
        for row in table
        if row.family == family
        and chosen.kernel in (None, row.kernel)
        and chosen.kind in (None, row.kind)
        and (chosen.again or not is_measured(row, chip))
    ]
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        measured, failed = run(rows, table, chosen.table, chip, deadline, chosen.jobs)
    except KeyboardInterrupt:
        print(f"interrupted: {chosen.table} has the best that is known so far")
        return INTERRUPTED
    finally:
        signal.signal(signal.SIGTERM, before)
    print(f"of {len(rows)} rows {measured} measured, {failed} failed; {chosen.table} is complete")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
