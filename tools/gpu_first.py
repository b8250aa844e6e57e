"""``python -m tools.gpu_first``: what to run first on a machine with a GPU, in one short command.

Installs this checkout with the CUDA extension for the GPU at hand, runs the smoke test of both
backends, memcheck over it, and times a few workloads beside the peers. Each step has a time limit
of its own and runs whatever became of the steps before it. ``OUTPUT/<device>/`` is brought up to
date after each step, so that it holds what was finished whenever the run ends:

* ``first.md``: each step's outcome and duration, and the machine;
* ``first.log``: what the steps printed;
* ``first-<workload>.csv``: the times, as ``python -m benchmarks loss`` writes them.

The exit status is 0 if every step went well.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from benchmarks.environment import commit, device_slug, machine

ROOT = Path(__file__).resolve().parents[1]
OUTPUT = Path("benchmarks/results")
SECONDS = 480.0  # of the whole run
WORKLOADS = ("tokens-vit-b", "torchdistill-resnet34-18", "wide-late-512", "wide-late-2048")
GRACE = 1.0  # seconds that a step which was told to end has for it
INTERRUPTED = 130  # exit status


@dataclass(frozen=True)
class Step:
    """A command of this interpreter and its time limit."""

    name: str
    arguments: tuple[str, ...]
    seconds: float
    environment: Mapping[str, str] = field(default_factory=dict)
    written: Path | None = None  # a file to keep, where the command writes it
    kept_as: str = ""  # its name in the results folder


@dataclass(frozen=True)
class Outcome:
    """What became of a step."""

    name: str
    words: str
    seconds: float

    @property
    def good(self) -> bool:
        return self.words == "ok"


def steps(scratch: Path, slug: str, jobs: int) -> list[Step]:
    """All steps, in order; ``scratch`` takes what is kept only in part."""
    smoke = ("-m", "tools.smoke", "--backend")
    sanitize = ("-m", "tools.sanitize", "--tool", "memcheck", "--jobs", str(jobs))
    found = [
        Step(
            "install",
            ("-m", "pip", "install", "--no-build-isolation", "--no-deps", "--editable", "."),
            180,
            {
                "CUDAARCHS": os.environ.get("CUDAARCHS", "native"),
                "FSP_KERNELS_CPU": os.environ.get("FSP_KERNELS_CPU", "0"),
            },
        ),
        Step("smoke, triton", (*smoke, "triton", "--jobs", str(jobs)), 100),
        Step("smoke, cuda", (*smoke, "cuda"), 60),
        Step("memcheck", sanitize, 120),
    ]
    for name in WORKLOADS:
        written = scratch / name
        asked = f"--device cuda --workload {name} --dtype bf16 --dtype fp32 --layout nchw"
        arguments = ("-m", "benchmarks", "loss", *asked.split(), "--pass", "forward+backward")
        found.append(
            Step(
                f"times, {name}",
                (*arguments, "--output", str(written)),
                100,
                written=written / slug / "results.csv",
                kept_as=f"first-{name}.csv",
            )
        )
    return found


def run(step: Step, seconds: float, log: Path) -> Outcome:
    """Run a step for at most so long; what it prints is added to ``log`` as it prints it."""
    command = [sys.executable, *step.arguments]
    start = time.monotonic()
    with log.open("a") as file:
        print(f"\n== {step.name}: {shlex.join(command)}", file=file, flush=True)
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=os.environ | {"PYTHONUNBUFFERED": "1"} | dict(step.environment),
            stdout=file,
            stderr=subprocess.STDOUT,
            preexec_fn=os.setpgrp,  # so that all it has started can be ended with it
        )
        try:
            status = process.wait(seconds)
            words = "ok" if status == 0 else f"FAILED, exit status {status}"
        except subprocess.TimeoutExpired:
            words = f"STOPPED at its limit of {seconds:.3g} s"
        finally:
            _end(process)
    return Outcome(step.name, words, time.monotonic() - start)


def _end(process: subprocess.Popen[bytes]) -> None:
    """End what is left of a process and of all that it has started."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
            process.wait(GRACE)
        except (ProcessLookupError, subprocess.TimeoutExpired):
            continue


def report(folder: Path, outcomes: Sequence[Outcome], facts: Mapping[str, object]) -> None:
    """Write ``first.md``."""
    lines = ["# First run", "", "| step | outcome | seconds |", "|---|---|---:|"]
    lines += [f"| {x.name} | {x.words} | {x.seconds:.0f} |" for x in outcomes]
    lines += ["", "| | |", "|---|---|", *(f"| {k} | {v} |" for k, v in facts.items()), ""]
    (folder / "first.md").write_text("\n".join(lines))


def run_all(chosen: Sequence[Step], folder: Path, seconds: float) -> list[Outcome]:
    """Run steps one after the other until there is no time left; keep what each one leaves."""
    found = {name: value for name, value in machine("cuda").items() if "after_the_run" not in name}
    facts = {"commit": commit(), **found}
    log = folder / "first.log"
    log.write_text("")
    deadline = time.monotonic() + seconds
    outcomes: list[Outcome] = []
    for step in chosen:
        left = deadline - time.monotonic()
        begin = log.stat().st_size
        if left > 0:
            outcome = run(step, min(step.seconds, left), log)
        else:
            outcome = Outcome(step.name, "NOT STARTED, no time left", 0.0)
        with log.open() as file:
            file.seek(begin)
            print(file.read(), flush=True)
        if step.written is not None and step.written.exists():
            shutil.move(step.written, folder / step.kept_as)
        outcomes.append(outcome)
        report(folder, outcomes, facts)
        print(f"== {outcome.name}: {outcome.words}, {outcome.seconds:.0f} s", flush=True)
    return outcomes


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tools.gpu_first",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--output", type=Path, default=OUTPUT, metavar="DIR")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="for the whole run")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="of the smoke tests")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("tools.gpu_first is for a machine with an NVIDIA GPU, and PyTorch sees none here")
        return 1
    slug = device_slug("cuda")
    folder = (options.output / slug).resolve()
    scratch = folder / "unfinished"
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("first*"):
        old.unlink()
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        outcomes = run_all(steps(scratch, slug, options.jobs), folder, options.seconds)
    except KeyboardInterrupt:
        print(f"interrupted: {folder} holds what was finished")
        return INTERRUPTED
    finally:
        signal.signal(signal.SIGTERM, before)
        shutil.rmtree(scratch, ignore_errors=True)
    bad = [outcome.name for outcome in outcomes if not outcome.good]
    print(f"{folder}: " + (f"not well: {', '.join(bad)}" if bad else "all went well"))
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
