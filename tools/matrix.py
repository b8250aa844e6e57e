"""Run tests on each supported combination of versions, and print a row of a table for each.

A combination is a Python and what pip installs in a new environment of it, which is removed
afterwards: it takes 2 to 6 GB of disk, in TMPDIR. ``--row '3.12 torch==2.8.*'`` runs another one.
A row that is a Python alone, as ``--row .venv/bin/python``, runs there, and installs nothing. Name
triton if you name a CPU build of torch: tests import it, whichever version it is.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from xml.etree import ElementTree

from tools import pythons

ROOT = Path(__file__).parents[1]
ROWS = (
    "3.10 torch==2.6.* numpy==2.0.*",
    "3.12 torch==2.6.* numpy<2.4",
    # Triton 3.6's interpreter makes integers of arrays of one element, which NumPy 2.4 refuses.
    "3.12 torch==2.11.* triton==3.6.* numpy<2.4",
    *(f"{version} torch triton" for version in pythons.VERSIONS),
)
VERSIONS = """
import json, platform
from importlib import metadata
held = {x.name.lower(): x.version for x in metadata.distributions()}
print(json.dumps([platform.python_version(), *map(held.get, ("torch", "triton", "numpy"))]))
"""
MISSING = "no such Python was found"
HEAD = ("python", "torch", "triton", "numpy", "passed", "failed", "skipped", "seconds")


def run_row(row: str, tests: Sequence[str], jobs: str, folder: Path) -> list[str]:
    """The cells of a row. A row that cannot be run has the reason in its first cell."""
    name, *requirements = row.split()
    python = pythons.find(name)
    if python is None:
        return [f"{row}: {MISSING}"]
    if requirements:
        python = pythons.make_environment(python, folder / "environment")
        install = [python, "-m", "pip", "install", "--quiet", *requirements]
        # In place, so that the tests of the checkout find the CPU extension of this Python.
        command = [*install, "--editable", f"{ROOT}[test-core]"]
        switched = {"FSP_KERNELS_CUDA": os.environ.get("FSP_KERNELS_CUDA", "0")}
        if subprocess.run(command, env=os.environ | switched).returncode:
            return [f"{row}: pip failed"]
    versions = subprocess.run([python, "-c", VERSIONS], check=True, capture_output=True).stdout
    results = folder / "results.xml"
    command = [python, "-m", "pytest", "-q", "--crosses", "each", "-m", "not slow", "tests"]
    command += [f"--junit-xml={results}", *ignoring(tests), *(("-n", jobs) if jobs != "0" else ())]
    subprocess.run(command, cwd=ROOT)
    if not results.exists():
        return [f"{row}: pytest ended without results"]
    return [str(cell or "none") for cell in (*json.loads(versions), *counts(results))]


def ignoring(tests: Sequence[str]) -> Iterator[str]:
    """Options that leave ``tests`` of all files. Files that conftest.py leaves out stay out."""
    folder, chosen = ROOT / "tests", {ROOT / x for x in tests}
    used = {parent for path in chosen for parent in path.parents}
    # A folder of which nothing is chosen may have a conftest.py that needs more packages.
    unused = [path for path in folder.iterdir() if path.is_dir() and path not in used]
    for path in (*unused, *(x for x in folder.rglob("test_*.py") if x not in chosen)):
        yield f"--ignore={path}"


def counts(results: Path) -> list[str]:
    """How many tests passed, failed and were skipped, and the seconds that they took."""
    suite = next(ElementTree.parse(results).iter("testsuite"))
    tests, failures, errors, skipped = (
        int(suite.attrib[name]) for name in ("tests", "failures", "errors", "skipped")
    )
    failed = failures + errors
    seconds = f"{float(suite.attrib['time']):.0f}"
    return [*map(str, (tests - failed - skipped, failed, skipped)), seconds]


def fails(row: Sequence[str]) -> bool:
    """Whether a row shows a fault; a Python that this machine lacks is none."""
    if len(row) == 1:
        return not row[0].endswith(MISSING)
    return row[HEAD.index("failed")] != "0" or row[HEAD.index("passed")] == "0"


def table(rows: Sequence[Sequence[str]]) -> str:
    cells = [row for row in (HEAD, *rows) if len(row) > 1]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=False)).rstrip()
        if len(row) > 1
        else row[0]
        for row in (HEAD, *rows)
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("tests", nargs="+", help="files of tests, from the root of the checkout")
    parser.add_argument("--row", action="append", help="a Python and requirements; default: all")
    parser.add_argument("--jobs", default="auto", help="processes of pytest; default: auto")
    options = parser.parse_args()
    rows = []
    for row in options.row or ROWS:
        print(f"== {row}", flush=True)
        with tempfile.TemporaryDirectory() as folder:
            rows.append(run_row(row, options.tests, options.jobs, Path(folder)))
    print(table(rows))
    if any(map(fails, rows)):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
