"""Compile every kernel of csrc/ for every chip, and keep what each one takes. Needs no GPU.

    python -m tools.compile_cuda             # all; writes tools/records/cuda.csv
    python -m tools.compile_cuda --sample    # a few, compared with the record

A row is printed for each kernel. The command fails where a kernel spills registers to the stack, or
wants more shared memory than the chip has and no other kernel takes its place. ``CUDAARCHS=90``
narrows the chips; then nothing is written.
"""

from __future__ import annotations

import argparse
import importlib.machinery
import importlib.util
import os
import re
import runpy
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from tools import record

ROOT = Path(__file__).resolve().parents[1]
RECORD = record.FOLDER / "cuda.csv"
HEADER = ("chip", "kernel", "operand", "tile", "registers", "stack", "stages", "shared")
REMEDY = "run `python -m tools.compile_cuda` and commit what it writes"
SAMPLED, SAMPLED_CHIPS = "elementwise.cu", (80, 90)  # compiles in seconds
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

    def faults(self) -> list[str]:
        """Why this kernel cannot be shipped."""
        limit = SHARED_MEMORY[self.architecture]
        found = []
        if self.stack:
            found.append(f"spills {self.stack} bytes to the stack")
        if self.shared > limit << 10 and self.kernel not in REPLACEABLE:
            found.append(f"wants {self.shared} bytes of shared memory, the chip has {limit} KiB")
        return found


def nvcc() -> str | None:
    """The compiler that an installation would take, where it is recent enough."""
    setup = runpy.run_path(str(ROOT / "setup.py"), run_name="setup")
    found = setup["find_nvcc"]()
    return found if found and setup["is_recent"](found) else None


def compiler() -> str:
    """Name and version of nvcc, as the record has it."""
    text = subprocess.run([nvcc() or "nvcc", "--version"], capture_output=True, text=True).stdout
    release = re.search(r"V([\d.]+)", text)
    return f"nvcc {release[1] if release else '?'}"


def digest() -> str:
    """Of all sources with kernels, and of what they include."""
    return record.digest_of([*(ROOT / "csrc").glob("*.cu*"), *(ROOT / "csrc").glob("*.h")])


def build(folder: Path) -> Path:
    """The extension of this checkout, as an installation would build it."""
    command = [sys.executable, "setup.py", "--quiet", "build_ext", "--build-lib", str(folder)]
    # With source lines, by which launches.py names loops. The machine code is the same.
    chosen = {"FSP_KERNELS_CUDA": "1", "FSP_KERNELS_CPU": "0", "CUDAFLAGS": "-lineinfo"}
    environment = os.environ | chosen
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if result.returncode != 0:
        raise SystemExit(f"The kernels of csrc/ do not compile:\n{result.stdout}{result.stderr}")
    (module,) = (folder / "fsp_kernels").glob("_cuda*")
    return module


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


def resources(path: Path) -> Iterator[tuple[int, str, int, int]]:
    """Chip, symbol, registers and bytes of stack of every kernel in a compiled file."""
    command = [cuobjdump(), "--dump-resource-usage", str(path)]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    architecture, symbol = 0, ""
    for line in text.splitlines():
        if found := re.search(r"arch = sm_(\d+)", line):
            architecture = int(found[1])
        if found := re.search(r"Function (\S+):", line):
            symbol = found[1]
        if "REG:" in line:
            fields = {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", line)}
            yield architecture, symbol, fields["REG"], fields["STACK"] + fields["LOCAL"]


def usages(path: Path) -> Iterator[Usage]:
    """Every kernel of the extension on every chip."""
    shared = load(path).shared_bytes()
    for architecture, symbol, registers, stack in resources(path):
        kernel, operand, tile = described(symbol)
        for name, of, size, one, two in shared:
            # A kernel that has no tile of its own runs with all but the widest.
            if (name, of) == (kernel, operand) and (tile or size % WIDE_TILE) == size:
                has_room = two <= SHARED_MEMORY[architecture] << 10
                stages = 2 if architecture >= ASYNCHRONOUS and has_room else 1
                used = registers, stack, stages, two if stages == 2 else one
                yield Usage(architecture, name, of, size, *used)


def described(symbol: str) -> tuple[str, str, int]:
    """Name, operand and tile of a kernel by its mangled name; "" and 0 where that does not tell."""
    kernel = re.search(
        r"\d+(fsp_[a-z_]+)(?:I(?:(f|6__half|13__nv_bfloat16)|Li(\d+)E)(Lb1)?)?", symbol
    )
    assert kernel is not None, symbol
    name, operand, size, wide = kernel.groups()
    return name, OPERANDS.get(operand, ""), int(size or 0) or (WIDE_TILE if wide else 0)


def compare_sample() -> list[str]:
    """Compile a few kernels; how they differ from the record of the same nvcc."""
    kept = record.read(RECORD)
    known = {(row[0], row[1]): (int(row[4]), int(row[5])) for row in kept.rows}
    chips = [f"--generate-code=arch=compute_{x},code=sm_{x}" for x in SAMPLED_CHIPS]
    found = []
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "sample.o"
        command = [str(nvcc()), "-std=c++17", "-c", f"csrc/{SAMPLED}", *chips, "-o", str(target)]
        subprocess.run(command, cwd=ROOT, check=True)
        for chip, symbol, *used in resources(target):
            row = f"sm_{chip}", described(symbol)[0]
            if tuple(used) != known[row] if kept.compiler == compiler() else used[1]:
                found.append(f"{row}: {used}, {RECORD.name} has {known[row]}; {REMEDY}")
    return found


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tools.compile_cuda",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--sample", action="store_true", help="compare a few with the record")
    if parser.parse_args(arguments).sample:
        differences = compare_sample()
        print("\n".join(differences))
        return 1 if differences else 0
    failures, rows = 0, []
    print(",".join(HEADER))
    with tempfile.TemporaryDirectory() as folder:
        for usage in sorted(usages(build(Path(folder)))):
            bad = usage.faults()
            failures += bool(bad)
            rows.append([f"sm_{usage.architecture}", *map(str, usage[1:])])
            print(",".join(rows[-1]), *bad, sep="  ", flush=True)
    if not failures and "CUDAARCHS" not in os.environ:
        record.write(RECORD, record.Record(compiler(), digest(), rows), HEADER)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
