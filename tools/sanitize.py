"""``python -m tools.sanitize``: run ``tools.smoke`` under NVIDIA's compute-sanitizer.

*memcheck* looks for accesses out of bounds. Every tensor gets an allocation of its own, padded:
in a block of PyTorch's allocator, an access beyond a tensor would hit its neighbour unseen.
*racecheck* looks for hazards in shared memory, in our kernels alone, since it is slow. Its releases
before 2026.1 report hazards that ``racecheck.py`` calls unclear; these are printed and do not fail.
*initcheck* looks for reads of memory that nobody wrote. It has to follow all kernels, or whatever
PyTorch's wrote would count as unwritten. What PyTorch's own kernels read does not fail.

``--tool`` and ``--backend`` choose; ``--jobs`` runs shares of the cases side by side.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from subprocess import PIPE, STDOUT

from fsp_kernels.backends import registered_backends
from tools.racecheck import (
    Race,
    disassembled,
    displayed,
    races_of,
    reports_of,
    split,
    version_of,
)

ROOT = Path(__file__).resolve().parents[1]
OURS = "fsp_"  # what the names of our kernels start with
FOUND = 99  # exit status where a tool found something, unlike any of the smoke test's own
COMMON = {
    "error-exitcode": str(FOUND),
    "target-processes": "application-only",  # not the compilers it starts
    "launch-timeout": "120",  # seconds; importing torch can outlast the default, ten
}
TOOLS = {
    # PyTorch and Triton provoke API errors to find out what a driver can do; real ones raise.
    "memcheck": {"padding": "32", "report-api-errors": "no"},
    "racecheck": {"kernel-name": f"kns={OURS}", "print-limit": "10000"},
    "initcheck": {"print-limit": "10000", "show-backtrace": "no"},
}


def find(program: str) -> str | None:
    """On PATH, else where CUDA toolkits put it."""
    places = [os.environ.get("CUDA_HOME"), "/usr/local/cuda"]
    search = [os.environ.get("PATH", ""), *(f"{place}/bin" for place in places if place)]
    return shutil.which(program, path=os.pathsep.join(search))


def command_of(sanitizer: str, tool: str, log: Path, backend: str, share: str = "1/1") -> list[str]:
    """The smoke test under one tool, in this very interpreter: a wrapper is what it would track."""
    settings = {"tool": tool, "log-file": str(log)} | COMMON | TOOLS[tool]
    options = [word for name, value in settings.items() for word in (f"--{name}", value)]
    smoke = [sys.executable, "-m", "tools.smoke", "--backend", backend, "--share", share]
    return [sanitizer, *options, *smoke]


def reports_by_others(log: str) -> tuple[int, int]:
    """Of initcheck's reports, how many there are and how many are of kernels that are not ours.

    A report names its kernel in its second line. One without is of a copy to the host, which is
    how an element that we left unwritten shows.
    """
    reports = [report for report in reports_of(log) if "uninitialized" in report.lower()]
    kernels = [re.search(r"^=+ +at (.+)", report, flags=re.MULTILINE) for report in reports]
    others = [found for found in kernels if found and OURS not in found[1]]
    return len(reports), len(others)


@dataclass(frozen=True)
class Run:
    """What a tool found in a share of the cases."""

    tool: str
    status: int
    output: str  # of the smoke test
    log: str  # of the tool
    races: Sequence[Race] = ()  # of racecheck alone
    unclear: Sequence[Race] = ()  # hazards that are unclear in this release

    @property
    def clean(self) -> bool:
        """Whether the smoke test passed and the tool found nothing that is ours."""
        if self.tool == "racecheck":
            told = displayed(self.log) == len(self.unclear)
            return not self.races and (self.status == 0 or (self.status == FOUND and told))
        if self.tool != "initcheck" or self.status != FOUND:
            return self.status == 0
        reports, others = reports_by_others(self.log)
        return reports == others > 0


def run(sanitizer: str, tool: str, backend: str, share: str) -> Run:
    """The smoke test under one tool."""
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "log"
        if tool == "racecheck":  # so that Triton's cache holds the kernels of this run alone
            environment["TRITON_CACHE_DIR"] = folder
        command = command_of(sanitizer, tool, path, backend, share)
        done = subprocess.run(
            command, cwd=ROOT, env=environment, stdout=PIPE, stderr=STDOUT, text=True
        )
        log = path.read_text() if path.exists() else ""
        races, unclear = _races(sanitizer, Path(folder), log) if tool == "racecheck" else ([], [])
    return Run(tool, done.returncode, done.stdout, log, races, unclear)


def _races(sanitizer: str, folder: Path, log: str) -> tuple[list[Race], list[Race]]:
    """The races of a log, and its unclear hazards."""
    cuobjdump = find("cuobjdump")
    named = {name for race in races_of(log) for name, _ in race.accesses}
    cubins = [path for path in folder.glob("**/*.cubin") if path.stem in named]
    kernels = disassembled(cubins, cuobjdump) if cuobjdump else {}
    version = subprocess.run([sanitizer, "--version"], capture_output=True, text=True)
    return split(log, kernels, version_of(version.stdout))


def check(sanitizer: str, tool: str, backend: str, jobs: int = 1) -> bool:
    """Run one tool, on shares of the cases side by side, and say what it found."""
    print(f"== {tool}, {backend}", flush=True)
    runs = []
    with ThreadPoolExecutor(jobs) as pool:
        shares = [f"{i}/{jobs}" for i in range(1, jobs + 1)]
        for found in pool.map(partial(run, sanitizer, tool, backend), shares):
            print(found.output + found.log, flush=True)
            runs.append(found)
    for race in [race for found in runs for race in found.unclear]:
        print(f"unclear, this version also reports what is no race: {race.text}")
    failed = [found.status for found in runs if not found.clean]
    verdict = f"FAILED, exit status {', '.join(map(str, failed))}" if failed else "clean"
    unclear = sum(len(found.unclear) for found in runs)
    print(
        f"== {tool}, {backend}: {verdict}" + (f"; unclear hazards: {unclear}" if unclear else ""),
        flush=True,
    )
    return not failed


def working() -> list[str]:
    """The backends with kernels for GPUs that work here; says why others do not."""
    reasons = {
        name: backend.why_unavailable()
        for name, backend in registered_backends().items()
        if name not in ("cpu", "torch")
    }
    for name, reason in reasons.items():
        if reason is not None:
            print(f"== {name} is not available: {reason}")
    return [name for name, reason in reasons.items() if reason is None]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run all tools, also after one found something."""
    parser = argparse.ArgumentParser(prog="python -m tools.sanitize", description=__doc__)
    parser.add_argument("--tool", nargs="+", choices=TOOLS, default=list(TOOLS), help="or all")
    parser.add_argument("--backend", nargs="+", help="whose kernels; of all that work by default")
    parser.add_argument("--jobs", type=int, default=1, help="processes, each with a share of cases")
    options = parser.parse_args(arguments)
    sanitizer = find("compute-sanitizer")
    if sanitizer is None:
        print(
            "compute-sanitizer is neither on PATH nor in $CUDA_HOME/bin or /usr/local/cuda/bin; it "
            "is part of the CUDA toolkit."
        )
        return 1
    backends = options.backend or working()
    results = [
        check(sanitizer, tool, name, options.jobs) for name in backends for tool in options.tool
    ]
    return 0 if results and all(results) else 1


if __name__ == "__main__":
    sys.exit(main())
