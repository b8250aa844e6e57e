"""``python -m benchmarks.sanitize``: ``benchmarks.smoke`` under NVIDIA's compute-sanitizer.

*memcheck* looks for accesses out of bounds: every tensor gets an allocation of its own, padded,
since the neighbour in a block of PyTorch's allocator would hide one. *racecheck* looks for hazards
in shared memory, in our kernels alone, which is what makes it affordable; its releases before
2026.1 are known to report some that are none where Hopper's warpgroup instructions are waited for.
*initcheck* looks for reads of memory that nobody wrote. It has to follow all kernels, or whatever
PyTorch's wrote would count as unwritten, so its log is read here, and what PyTorch's own kernels
read is printed but does not fail.
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
from pathlib import Path

from fsp_kernels.backends import registered_backends

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
    "racecheck": {"kernel-name": f"kns={OURS}"},
    "initcheck": {"print-limit": "10000", "show-backtrace": "no"},
}


def find_sanitizer() -> str | None:
    """On PATH, else where CUDA toolkits put it."""
    places = [os.environ.get("CUDA_HOME"), "/usr/local/cuda"]
    search = [os.environ.get("PATH", ""), *(f"{place}/bin" for place in places if place)]
    return shutil.which("compute-sanitizer", path=os.pathsep.join(search))


def command_of(sanitizer: str, tool: str, log: Path, backend: str) -> list[str]:
    """The smoke test under one tool, in this very interpreter: a wrapper is what it would track."""
    settings = {"tool": tool, "log-file": str(log)} | COMMON | TOOLS[tool]
    options = [word for name, value in settings.items() for word in (f"--{name}", value)]
    return [sanitizer, *options, sys.executable, "-m", "benchmarks.smoke", "--backend", backend]


def reports_by_others(log: str) -> tuple[int, int]:
    """Of initcheck's reports, how many there are and how many are of kernels that are not ours.

    A report names its kernel in its second line. One without is of a copy to the host, which is
    how an element that we left unwritten shows.
    """
    reports = re.split(r"^=+ (?=\S)", log, flags=re.MULTILINE)[1:]
    reports = [report for report in reports if "uninitialized" in report.lower()]
    kernels = [re.search(r"^=+ +at (.+)", report, flags=re.MULTILINE) for report in reports]
    others = [found for found in kernels if found and OURS not in found[1]]
    return len(reports), len(others)


def clean(tool: str, status: int, log: str) -> bool:
    """Whether the smoke test passed and the tool found nothing that is ours."""
    if tool != "initcheck" or status != FOUND:
        return status == 0
    reports, others = reports_by_others(log)
    return reports == others > 0


def check(sanitizer: str, tool: str, backend: str) -> bool:
    """Run one tool and say what it found."""
    print(f"== {tool}, {backend}", flush=True)
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "log"
        command = command_of(sanitizer, tool, path, backend)
        status = subprocess.run(command, cwd=ROOT, env=environment).returncode
        log = path.read_text() if path.exists() else ""
    print(log)
    found_nothing = clean(tool, status, log)
    print(
        f"== {tool}, {backend}: {'clean' if found_nothing else f'FAILED, exit status {status}'}",
        flush=True,
    )
    return found_nothing


def working() -> list[str]:
    """The backends with kernels of their own that work here; says why others do not."""
    reasons = {
        name: backend.why_unavailable()
        for name, backend in registered_backends().items()
        if name != "torch"
    }
    for name, reason in reasons.items():
        if reason is not None:
            print(f"== {name} is not available: {reason}")
    return [name for name, reason in reasons.items() if reason is None]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run all tools, also after one found something."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sanitize", description=__doc__)
    parser.add_argument("--backend", nargs="+", help="whose kernels; of all that work by default")
    options = parser.parse_args(arguments)
    sanitizer = find_sanitizer()
    if sanitizer is None:
        print(
            "compute-sanitizer is neither on PATH nor in $CUDA_HOME/bin or /usr/local/cuda/bin; it "
            "is part of the CUDA toolkit."
        )
        return 1
    backends = options.backend or working()
    results = [check(sanitizer, tool, name) for name in backends for tool in TOOLS]
    return 0 if results and all(results) else 1


if __name__ == "__main__":
    sys.exit(main())
