"""What a workload launches on the Triton backend, and how many steps each loop takes.

Needs no GPU: the kernels are compiled, and a loop's steps follow from the function it is in.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple
from unittest import mock

import triton
from torch import Tensor

from fsp_kernels.backends.triton import loss as triton_loss
from fsp_kernels.backends.triton.elementwise import BLOCK
from fsp_kernels.backends.triton.gram import COMBINED_ROWS
from fsp_kernels.backends.triton.launch import Launch
from fsp_kernels.plan import GRAM_BLOCKS
from tools.calls import call_on, instead_of_launches
from tools.compile_triton import compiled, usage_of
from tools.machine_code import Loop, disassembled, loops_of

LANES = 32
_cdiv = triton.cdiv


class Part(NamedTuple):
    """Programs of a launch that do the same: the steps that each takes in each loop."""

    programs: int
    stages: float
    steps: Sequence[tuple[Loop, float]]


class Launched(NamedTuple):
    """A launch: what it takes, what its programs do, and what it reads and writes."""

    kernel: str
    programs: int
    warps: int
    registers: int
    stack: int
    shared: int
    loops: Sequence[Loop]
    outside: Counter[str]  # instructions in no loop
    parts: Sequence[Part]
    reads: Sequence[Tensor]
    writes: Sequence[Tensor]
    unknown: frozenset[str] = frozenset()  # loops whose steps nothing tells
    flops: float = 0.0  # of a product by BLAS, of whose code nothing is known


def unit_of(tensors: Sequence[Tensor]) -> int:
    """Bytes, at most 16, of which all lines of all these maps are multiples."""
    units = [16]
    for x in tensors:
        strides = x.flatten(2).stride() if x.dim() > 2 else x.stride()
        units += [t * x.element_size() for t in strides if t != 1]
    return math.gcd(*units)


def bytes_of(loop: Loop, *prefixes: str) -> float:
    """Of one thread in one step, by instructions that begin so."""
    return sum(n * int(x.split()[1]) for x, n in loop.counts.items() if x.startswith(prefixes))


def _residual_steps(e: Any) -> int:
    return _cdiv(_cdiv(e.student_positions, e.block_k.value), e.parts.value)


def _gram_steps(e: Any) -> int:
    return _cdiv(_cdiv(max(e.m.value, e.n.value), e.block_m.value), e.parts.value)


# How many steps the loop of a function has for an entry of a launch.
STEPS = {
    "residual.residual_tile": _residual_steps,
    "tiles.fsp_residual": _residual_steps,  # where no instruction of the loop says more
    "one_pass._sweep": lambda e: _cdiv(e.student_positions, e.block_k.value),
    "gram._write_block": _gram_steps,
    "gram._total": lambda e: e.parts.value,
    "gram._total_of_columns": lambda e: e.parts.value,
    "gram._sweep": _gram_steps,
    "tiles._total": lambda e: e.parts.value,
    "tiles._combine_columns": lambda e: _cdiv(e.m.value, e.block_m.value),
    "tiles._gradient_tile": lambda e: _cdiv(e.other_channels.value, e.block_other.value),
    "elementwise.fsp_finish": lambda count: _cdiv(count, BLOCK),
}


def _entries_of(launch: Launch) -> Sequence[Any]:
    first = launch.constants[0]
    return first if isinstance(first, tuple) else (first,)


def _programs_of(kernel: str, entry: Any) -> int:
    """Programs of a launch that serve an entry."""
    if kernel == "fsp_finish":
        return 1
    if kernel == "fsp_one_pass":
        return entry.samples
    if kernel in ("fsp_gram", "fsp_gram_gradients"):
        return entry.samples * entry.parts.value * _branches_of(kernel, entry)
    if kernel == "fsp_gram_combine":
        return entry.samples * entry.block_k.value // COMBINED_ROWS.value
    if kernel == "fsp_gradients":
        rows = _cdiv(entry.own_channels.value, entry.block_own.value)
        return entry.samples * rows * _cdiv(entry.positions, entry.block_k.value)
    rows = _cdiv(entry.m.value, entry.block_m.value)
    columns = _cdiv(entry.n.value, entry.block_n.value)
    return {
        "fsp_combine": entry.samples * columns * (1 if entry.norm.value == "column" else rows),
        "fsp_residual": entry.samples * rows * columns * entry.parts.value,
        "fsp_matrix_gradients": entry.samples * rows * columns,
    }[kernel]


def _branches_of(kernel: str, entry: Any) -> int:
    """Ways through a kernel for an entry, each with code of its own; a program takes one."""
    wanted = sum(x is not None for x in getattr(entry, "gradients", ()))
    return {"fsp_gram": GRAM_BLOCKS, "fsp_gram_gradients": wanted}.get(kernel, 1)


def _touched_by(kernel: str, tensors: Sequence[Any]) -> tuple[list[Tensor], list[Tensor]]:
    """What a launch reads and what it writes."""
    pointers = tensors[0]
    if kernel == "fsp_finish":
        return [pointers], [tensors[1]]
    if kernel == "fsp_gradients":
        return [x for p in pointers for x in p[2:]], [p[1] for p in pointers]
    if kernel in ("fsp_combine", "fsp_gram_combine"):
        return [parts for parts, _ in pointers], [x for _, x in pointers if x is not None]
    reads = [x for p in pointers for x in p[:4]]
    writes = [x for p in pointers for x in p[4:]]
    if kernel == "fsp_gram_gradients":
        reads += tensors[1]
    if kernel in ("fsp_residual", "fsp_gram"):
        writes = [*tensors[1]]
    return [x for x in reads if x is not None], [x for x in writes if x is not None]


def _steps_of(entry: Any, loops: Sequence[Loop]) -> Iterator[tuple[Loop, float]]:
    """Each loop of an entry, and how often a program of it takes a step."""
    for loop in loops:
        around = [x for x in loops if x.first <= loop.first and loop.last <= x.last]
        if all(x.function in STEPS for x in around):
            yield loop, math.prod(STEPS[x.function](entry) for x in around)


def loops_by_entry(loops: Sequence[Loop], entries: Sequence[Any]) -> list[Sequence[Loop]]:
    """The loops of each entry: a kernel has those of its entries one after the other."""
    each = len(loops) // len(entries)
    if each * len(entries) == len(loops):
        return [loops[i * each : (i + 1) * each] for i in range(len(entries))]
    # The compiler unrolled the shortest ones.
    steps = [STEPS[loops[0].function](entry) for entry in entries]
    longest = sorted(range(len(entries)), key=lambda i: -steps[i])[: len(loops)]
    left = iter(loops)
    return [[next(left)] if i in longest else [] for i in range(len(entries))]


def _traced(launch: Launch, tensors: tuple[Any, ...], *scalars: Any) -> Launched:
    kernel, entries = launch.kernel.__name__, _entries_of(launch)
    code = compiled(launch, tensors, *scalars)
    usage = usage_of(code)
    (instructions,) = disassembled(code.asm["cubin"]).values()
    loops, outside = loops_of(instructions, STEPS)
    share = Loop("in no loop", 0, 0, Counter({k: n / len(entries) for k, n in outside.items()}))
    parts = []
    for entry, own in zip(entries, loops_by_entry(loops, entries), strict=True):
        branches = _branches_of(kernel, entry)
        steps = [(loop, n / branches) for loop, n in (*_steps_of(entry, own), (share, 1))]
        stages = entry.stages.value if hasattr(entry, "stages") else 1
        parts.append(Part(_programs_of(kernel, entry), stages, steps))
    used = launch.warps, usage.registers, usage.stack, usage.shared
    touched = _touched_by(kernel, tensors)
    unknown = frozenset(x.function for x in loops if x.function not in STEPS)
    return Launched(kernel, launch.grid[0], *used, loops, outside, parts, *touched, unknown)


def launches_of_maps(maps: list[Tensor], family: str) -> list[Launched]:
    """The launches of a loss of these maps, and the products by BLAS between them."""
    found: list[Launched] = []

    def product(out: Tensor, x: Tensor, y: Tensor, *_: Any) -> None:
        nothing = (0, 0, 0, 0, 0, [], Counter(), [])
        flops = 2.0 * out.numel() * x.shape[2]
        found.append(Launched("bmm", *nothing, [x, y], [out], flops=flops))

    with mock.patch.object(triton_loss, "bmm_into", product):
        instead_of_launches(
            lambda *launch: found.append(_traced(*launch)),
            lambda: call_on(maps)(),
            family,
            "tf32x3",
        )
    return found
