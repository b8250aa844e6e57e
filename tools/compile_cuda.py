"""What each kernel of csrc/ takes of a chip: registers, stack and shared memory. Needs no GPU.

    python -m tools.compile_cuda

compiles the CUDA extension for every generation of chips (``CUDAARCHS=90`` narrows them) and prints
a row for each kernel. It fails where one spills registers to the stack, or wants more shared memory
than the chip has and nothing stands in for it.
"""

from __future__ import annotations

import argparse
import atexit
import fcntl
import importlib.machinery
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
# What a block may have, in KiB: CUDA C++ Programming Guide, "Technical Specifications per Compute
# Capability".
SHARED_MEMORY = {75: 64, 80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}
ASYNCHRONOUS = 80  # the first chip on which a second stage is loaded while one is computed on
OPERANDS = {"f": "fp32", "6__half": "fp16", "13__nv_bfloat16": "bf16"}
WIDE_TILE = 128  # of the one-pass kernel that has only one
# Pairs that these have no room for go by stored tiles.
REPLACEABLE = ("fsp_one_pass", "fsp_gram")


class Usage(NamedTuple):
    """What a kernel takes on one chip, by thread (registers, stack) and block (shared memory)."""

    architecture: int
    kernel: str
    operand: str
    tile: int
    registers: int
    stack: int  # bytes
    stages: int
    shared: int  # bytes

    def complaints(self) -> list[str]:
        """Why this cannot be shipped: nothing, if all is well."""
        found = []
        if self.stack:
            found.append(f"spills {self.stack} bytes to the stack")
        if not self.fits and self.kernel not in REPLACEABLE:
            limit = SHARED_MEMORY[self.architecture]
            found.append(f"wants {self.shared} bytes of shared memory, the chip has {limit} KiB")
        return found

    @property
    def fits(self) -> bool:
        return self.shared <= SHARED_MEMORY[self.architecture] << 10


@lru_cache
def build() -> Path:
    """The extension of this checkout, as an installation would build it, for this process alone.

    It is compiled in the checkout, by one process at a time: only what has changed.
    """
    folder = Path(tempfile.mkdtemp())  # nobody else may write over what is loaded
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    command = [sys.executable, "setup.py", "--quiet", "build_ext", "--build-lib", str(folder)]
    # With lines, by which launches.py names loops; the code is the same.
    environment = os.environ | {"FSP_KERNELS_CUDA": "1", "CUDAFLAGS": "-lineinfo"}
    (ROOT / "build").mkdir(exist_ok=True)
    with (ROOT / "build" / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if result.returncode != 0:
        raise SystemExit(f"The kernels of csrc/ are not compiled:\n{result.stdout}{result.stderr}")
    (module,) = (folder / "fsp_kernels").glob("_cuda*")
    return module


@lru_cache
def load(path: Path) -> Any:
    """The extension; to import it takes neither a GPU nor torch."""
    loader = importlib.machinery.ExtensionFileLoader("_cuda", str(path))
    spec = importlib.util.spec_from_file_location("_cuda", path, loader=loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


def cuobjdump() -> str:
    """CUDA's disassembler: on PATH, or the one that Triton brings along."""
    found = shutil.which("cuobjdump")
    if found is None:
        triton = importlib.util.find_spec("triton")
        if triton is None or triton.origin is None:
            raise SystemExit("cuobjdump is not on PATH, and Triton, which has one, not installed")
        found = str(Path(triton.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump")
    return found


def usages(path: Path) -> Iterator[Usage]:
    """Every kernel in the machine code of every chip."""
    command = [cuobjdump(), "--dump-resource-usage", str(path)]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    shared = load(path).shared_bytes()
    architecture = 0
    for line in text.splitlines():
        if found := re.search(r"arch = sm_(\d+)", line):
            architecture = int(found[1])
        if found := re.search(r"Function (\S+):", line):
            symbol = found[1]
        if "REG:" in line:
            fields = {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", line)}
            kernel, operand, tile = described(symbol)
            for name, of, size, one, two in shared:
                # A kernel that has no tile of its own runs with all but the widest.
                if (name, of) == (kernel, operand) and (tile or size % WIDE_TILE) == size:
                    yield _usage(architecture, (name, of, size), (one, two), fields)


def described(symbol: str) -> tuple[str, str, int]:
    """Name, operand and tile of a kernel by its mangled name; "" and 0 where that does not tell."""
    kernel = re.search(
        r"\d+(fsp_[a-z_]+)(?:I(?:(f|6__half|13__nv_bfloat16)|Li(\d+)E)(Lb1)?)?", symbol
    )
    assert kernel is not None, symbol
    name, operand, size, wide = kernel.groups()
    return name, OPERANDS.get(operand, ""), int(size or 0) or (WIDE_TILE if wide else 0)


def _usage(
    architecture: int,
    kernel: tuple[str, str, int],
    shared: tuple[int, int],
    fields: dict[str, int],
) -> Usage:
    two = architecture >= ASYNCHRONOUS and shared[1] <= SHARED_MEMORY[architecture] << 10
    stack = fields["STACK"] + fields["LOCAL"]
    return Usage(architecture, *kernel, fields["REG"], stack, 1 + two, shared[two])


_LINE = "{:<8}{:<22}{:<9}{:<6}{:<11}{:<7}{:<8}{:<8}{}"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tools.compile_cuda",
        description="Registers, stack and shared memory of every kernel of csrc/; needs no GPU.",
    )
    parser.parse_args(arguments)
    print(
        _LINE.format(
            *("chip", "kernel", "operand", "tile", "registers", "stack", "stages", "shared"), ""
        )
    )
    failures = 0
    for usage in usages(build()):
        bad = usage.complaints()
        failures += bool(bad)
        note = "; ".join(bad) or ("" if usage.fits else "no room: stored tiles in its place")
        row = (f"sm_{usage.architecture}", *usage[1:])
        print(_LINE.format(*row, note).rstrip(), flush=True)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
