"""Compile every Triton kernel for every chip, and keep what each one takes. Needs no GPU.

    python -m tools.compile_triton                     # all; writes tools/records/triton.csv
    python -m tools.compile_triton --family sm_90 --kernel gram
    python -m tools.compile_triton --sample            # a few, compared with the record

Each kernel is compiled in every configuration of the table, for maps whose rows are multiples of 16
bytes, for 7 x 7 ones and for pooled ones; and for rarer calls, which no row of the table is for.
A row is printed for each compiled kernel. The command fails where a kernel spills registers to the
stack, or wants more shared memory than the chip has. Kernels of the rarer calls may spill. A Triton
that the table was not made with may put a few bytes on the stack, and writes no record.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from fsp_kernels.backends import registered_backends
from fsp_kernels.backends.triton import configurations
from fsp_kernels.backends.triton.configurations import FAMILIES, KERNELS
from fsp_kernels.backends.triton.launch import Launch
from fsp_kernels.loss_plan import MaskIndices, Scaling
from tools import record
from tools.calls import ARCHITECTURES, Case, call_of, call_on, cases, instead_of_launches

RECORD = record.FOLDER / "triton.csv"
COMPILER = f"triton {triton.__version__}"
HEADER = ("family", "case", "kernel", "registers", "stack", "shared")
# What a program may have: CUDA C++ Programming Guide, "Technical Specifications per Compute
# Capability".
SHARED_MEMORY = {80: 163, 89: 99, 90: 227, 100: 227, 120: 99}  # KiB
TENSOR_MEMORY = 512  # columns
# The Triton that the table was made with: there, no kernel uses the stack. Another one divides the
# registers otherwise, and some kernels keep a value or two on the stack.
TABLE_TRITON = "3.8"
IS_OF_TABLE = triton.__version__.startswith(f"{TABLE_TRITON}.")
MOST_STACK = 0 if IS_OF_TABLE else 128  # bytes


class Usage(NamedTuple):
    """What a compiled kernel takes, by thread (registers, stack) and by program (the others)."""

    kernel: str
    registers: int
    stack: int  # bytes
    shared: int  # bytes
    tensor_memory: int = 0  # columns, of 512 that a chip of family sm_100 has


def usage_of(compiled: Any) -> Usage:
    """Ask the disassembler that Triton brings along."""
    cuobjdump = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [str(cuobjdump), "--dump-resource-usage", file.name]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    return Usage(
        compiled.metadata.name,
        found["REG"],
        found["STACK"] + found["LOCAL"],
        compiled.metadata.shared,
        getattr(compiled.metadata, "tmem_size", None) or 0,
    )


def compiled(launch: Launch, tensors: tuple[Any, ...], *scalars: Any) -> Any:
    """The kernel of a launch."""
    arguments = (*tensors, *launch.constants, *scalars)
    return launch.kernel.warmup(*arguments, grid=launch.grid, num_warps=launch.warps)


def compile_case(case: Case) -> list[Usage]:
    """What the kernels of a row of the table take."""
    # A lambda: even preparing a call asks the chip.
    found = instead_of_launches(
        compiled, lambda: call_of(case, batch=8, device="meta")(), case.family, case.row.kind
    )
    # The row of "gram" is that of all launches of that form.
    ours = (x for x in found if x.metadata.name.startswith("fsp_" + case.row.kernel))
    return [usage_of(x) for x in ours]


class Variant(NamedTuple):
    """A call that reaches code of the kernels that no row of the table reaches."""

    name: str
    dtype: torch.dtype
    shapes: tuple[tuple[int, ...], ...]
    wanted: tuple[bool, ...] = (True, True, False, False)
    pool: str = "max"
    norm: str = "frobenius"
    cropped: bool = False
    channels_last: bool = False
    masks: MaskIndices = (None, None)  # of student and teacher: which mask, or none
    family: str = ""

    def __str__(self) -> str:
        return f"variant: {self.name}"


def _square(channels: int, side: int, batch: int = 128) -> tuple[int, ...]:
    """By default a batch that takes one pass where channels are few."""
    return (batch, channels, side, side)


_ALL, _NONE, _READY = (True,) * 4, (False,) * 4, (True,) * 3
_FP32, _BF16, _FP16 = torch.float32, torch.bfloat16, torch.float16
VARIANTS = (
    Variant("averages", _BF16, (_square(64, 32), _square(64, 16)) * 2, pool="avg"),
    Variant("apart", _FP32, (_square(64, 32),) * 2 + (_square(64, 16),) * 2),
    Variant("ready", _BF16, (_square(64, 32),) * 2 + ((128, 64, 64),), _READY),
    Variant("ready by tiles", _FP32, (_square(256, 32),) * 2 + ((128, 256, 256),), _READY),
    Variant("columns", _FP32, (_square(64, 32),) * 4, norm="column"),
    Variant("columns by tiles", _BF16, (_square(256, 32),) * 4, norm="column"),
    Variant("parts", _FP32, (_square(256, 64, batch=1),) * 4),
    Variant("teacher", _FP32, (_square(64, 32),) * 4, _ALL),
    Variant("teacher in Gram form", _BF16, (_square(512, 7),) * 4, _ALL),
    Variant("teacher by tiles", _BF16, (_square(256, 32),) * 4, _ALL),
    Variant("no gradients", _FP32, (_square(64, 32),) * 4, _NONE),
    Variant("no gradients in Gram form", _FP32, (_square(512, 7),) * 4, _NONE),
    Variant("no gradients by tiles", _BF16, (_square(256, 32),) * 4, _NONE),
    Variant("cropped", _FP32, (_square(64, 34),) * 4, cropped=True),
    Variant("rows of 4 bytes", _BF16, ((8, 64, 7, 14),) * 4),
    Variant("rows of 4 bytes by tiles", _BF16, ((8, 256, 7, 14),) * 4),
    Variant("rows of 4 bytes in Gram form", _FP32, (_square(512, 7),) * 4),
    Variant("one element", _FP16, ((1, 1, 1),) * 4),
    Variant("64-bit offsets", _BF16, (_square(16, 20000),) * 4),
    Variant("masked", _BF16, ((128, 64, 256),) * 4, channels_last=True, masks=(0, 0)),
    Variant("masked in Gram form", _FP32, ((128, 512, 49),) * 4, channels_last=True, masks=(0, 0)),
    Variant("masked rows", _FP32, (_square(64, 32),) * 4, masks=(0, 0)),
    Variant(
        *("masks of both by tiles", _BF16, ((128, 256, 196),) * 4, _ALL),
        norm="column",
        channels_last=True,
        masks=(0, 1),
    ),
    Variant(
        *("masked beside ready", _FP32, (_square(256, 32),) * 2 + ((128, 256, 256),), _READY),
        masks=(0, None),
    ),
)
# Kernels without a configuration of their own, which may not spill in any variant either.
UNCONFIGURED = ("fsp_combine", "fsp_matrix_gradients", "fsp_finish", "fsp_scale")
SAMPLED = "ready by tiles"  # which launches most kinds of kernels
REMEDY = "run `python -m tools.compile_triton` and commit what it writes"


def compile_variant(variant: Variant) -> list[Usage]:
    """What each kernel of a variant takes, those that scale gradients included."""
    maps = [torch.empty(shape, dtype=variant.dtype, device="meta") for shape in variant.shapes]
    if variant.cropped:
        maps = [x[..., 1:-1, 1:-1] for x in maps]
    if variant.channels_last:
        maps = [x.movedim(1, -1).contiguous().movedim(-1, 1) for x in maps]

    def call() -> None:
        call_on(maps, variant.wanted, variant.pool, variant.norm, variant.masks)()
        factor, gradients = torch.empty((), device="meta"), [x.float() for x in maps]
        held, dtypes = (tuple(x.dtype for x in some) for some in (gradients, maps))
        scaling = Scaling(tuple(map(Tensor.numel, maps)), held, dtypes, (0,) * len(maps))
        for in_place in (True, False):
            registered_backends()["triton"].scale(gradients, scaling, factor, in_place)

    found = instead_of_launches(compiled, call, variant.family, "tf32x3")
    return list(dict.fromkeys(map(usage_of, found)))  # two launches can have the same code


def variants(family: str | None = None) -> Iterator[Variant]:
    """Every variant on every family of chips, or on one."""
    for name in FAMILIES if family is None else (family,):
        for variant in VARIANTS:
            yield variant._replace(family=name)


def faults(case: Case | Variant, usage: Usage) -> list[str]:
    """Why this kernel cannot be shipped."""
    limit = SHARED_MEMORY[ARCHITECTURES[case.family]] << 10
    may_spill = isinstance(case, Variant) and usage.kernel not in UNCONFIGURED
    found = []
    if usage.stack > MOST_STACK and not may_spill:
        found.append(f"spills {usage.stack} bytes to the stack")
    if usage.shared > limit:
        found.append(f"wants {usage.shared} bytes of shared memory, the chip has {limit}")
    if usage.tensor_memory > TENSOR_MEMORY:
        found.append(f"wants {usage.tensor_memory} columns of tensor memory of {TENSOR_MEMORY}")
    return found


def sample() -> list[Case | Variant]:
    """A case of each kernel, each on another family of chips, and a variant."""
    found: list[Case | Variant] = []
    for kernel, family in zip(KERNELS, FAMILIES, strict=True):
        some = list(cases(family, kernel))
        found.append(some[len(some) // 2])
    return [*found, next(x for x in variants("sm_90") if x.name == SAMPLED)]


def digest() -> str:
    """Of all kernels and of the table."""
    files = configurations.TABLE.parent.glob("*.py")
    kernels = [path for path in files if "triton.language" in path.read_text()]
    return record.digest_of([*kernels, configurations.TABLE])


def _rows(case: Case | Variant) -> list[tuple[list[str], list[str]]]:
    """For each kernel of a case, its row of the record and its faults."""
    try:
        found = compile_variant(case) if isinstance(case, Variant) else compile_case(case)
    except RuntimeError as error:  # of Triton, which may crash
        return [([case.family, str(case)], [f"does not compile: {error}"])]
    return [
        ([case.family, str(case), *map(str, usage[:4])], faults(case, usage)) for usage in found
    ]


def _recorded(case: Case | Variant) -> list[list[str]]:
    return [row for row in record.read(RECORD).rows if row[:2] == [case.family, str(case)]]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tools.compile_triton",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--family", choices=tuple(FAMILIES), help="one family of chips only")
    parser.add_argument("--kernel", choices=KERNELS, help="one kernel only")
    parser.add_argument("--sample", action="store_true", help="compare a few with the record")
    parser.add_argument("--jobs", type=int, default=None, help="processes; default one a core")
    chosen = parser.parse_args(arguments)
    wanted: list[Case | Variant] = sample() if chosen.sample else []
    if not chosen.sample:
        wanted += cases(chosen.family, chosen.kernel)
        wanted += [] if chosen.kernel else variants(chosen.family)
    compare = chosen.sample and record.read(RECORD).compiler == COMPILER
    found, failures = [], 0
    print(",".join(HEADER))
    with ProcessPoolExecutor(chosen.jobs) as pool:
        for case, rows in zip(wanted, pool.map(_rows, wanted), strict=True):
            for row, bad in rows:
                failures += bool(bad)
                print(",".join(row), *bad, sep="  ", flush=True)
            found += [row for row, _ in rows]
            if compare and [row for row, _ in rows] != (kept := _recorded(case)):
                failures += 1
                print(f"{RECORD.name} has other numbers: {kept}; {REMEDY}")
    complete = not (chosen.sample or chosen.family or chosen.kernel)
    if complete and not failures and IS_OF_TABLE:
        record.write(RECORD, record.Record(COMPILER, digest(), found), HEADER)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
