"""What a workload launches on either fused backend, and how many steps each loop takes.

Needs no GPU. Triton's kernels are compiled for each launch, and the steps of a loop follow from the
function it is in.

A kernel of csrc/ holds the code of every way through it; the maps choose one at run time. Of its
innermost loops, those count that multiply, and those that copy in the widest units that the maps
allow. All loops of a kind count as one, with as many steps as the launch has to multiply or copy.
The stages of shared memory that are waited for are as many as the reads fill. Instructions outside
of loops are not counted, because most belong to ways that are not taken.
"""

from __future__ import annotations

import atexit
import math
import shutil
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
from torch import Tensor

from fsp_kernels.backends.cuda import extension as cuda_extension
from fsp_kernels.backends.cuda import loss as cuda_loss
from fsp_kernels.backends.tensors import partner_of, slots_of, tensors_at
from fsp_kernels.backends.triton import loss as triton_loss
from fsp_kernels.backends.triton.elementwise import BLOCK
from fsp_kernels.backends.triton.gram import COMBINED_ROWS
from fsp_kernels.backends.triton.launch import Launch
from fsp_kernels.loss_plan import LaunchGroup, LossPlan, PairPlan
from fsp_kernels.plan import GRAM_BLOCKS
from tools import compile_cuda
from tools.calls import ARCHITECTURES, call_on, instead_of_launches, planned
from tools.compile_triton import compiled
from tools.compile_triton import usage_of as triton_usage
from tools.machine_code import (
    Loop,
    disassembled,
    function_among,
    line_of_branch,
    loops_of,
    product_of,
)

LANES = 32
FP32_BYTES = torch.float32.itemsize
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


# --- Triton ---------------------------------------------------------------------------------------


def _residual_steps(e: Any) -> int:
    return _cdiv(_cdiv(e.student_positions, e.block_k.value), e.parts.value)


def _gram_steps(e: Any) -> int:
    return _cdiv(_cdiv(max(e.m.value, e.n.value), e.block_m.value), e.parts.value)


# How many steps the loop of a function has for an entry of a launch.
STEPS = {
    "residual.residual_tile": _residual_steps,
    "tiles.fsp_residual": _residual_steps,  # where no instruction of the loop says more
    "one_pass._write_gradient": lambda e: _cdiv(e.student_positions, e.block_k.value),
    "gram._write_block": _gram_steps,
    "gram._sum_of_parts": lambda e: e.parts.value,
    "gram._sum_of_parts_transposed": lambda e: e.parts.value,
    "gram._write_gradient": _gram_steps,
    "tiles._sum_of_parts": lambda e: e.parts.value,
    "tiles._combine_columns": lambda e: _cdiv(e.m.value, e.block_m.value),
    "tiles._gradient_tile": lambda e: _cdiv(e.other_channels.value, e.block_other.value),
    "elementwise.fsp_finish": lambda losses: _cdiv(losses[1] - losses[0], BLOCK),
}


def _entries_of(launch: Launch) -> Sequence[Any]:
    entries: Sequence[Any] = launch.constants[0]
    return entries


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
        reads = [x for p in pointers for x in p[2:] if x is not None]
        return reads, [p[1] for p in pointers]
    if kernel in ("fsp_combine", "fsp_gram_combine"):
        return [p[0] for p in pointers], [p[1] for p in pointers if p[1] is not None]
    reads = [x for p in pointers for x in p[:4]]
    writes = [x for p in pointers for x in p[4:8]]
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
    usage = triton_usage(code)
    (instructions,) = disassembled(code.asm["cubin"]).values()
    loops, outside = loops_of(instructions, function_among(STEPS))
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


def triton_launches(maps: list[Tensor], family: str) -> list[Launched]:
    """Those of Triton, and the products by BLAS between them."""
    found: list[Launched] = []

    def product(out: Tensor, x: Tensor, y: Tensor, *_: Any) -> None:
        flops = 2.0 * out.numel() * x.shape[2]
        found.append(Launched("bmm", 0, 0, 0, 0, 0, [], Counter(), [], [x, y], [out], flops=flops))

    with mock.patch.object(triton_loss, "bmm_into", product):
        instead_of_launches(
            lambda *launch: found.append(_traced(*launch)),
            lambda: call_on(maps)(),
            family,
            "tf32x3",
        )
    return found


# --- CUDA C++ -------------------------------------------------------------------------------------


@lru_cache
@lru_cache
def _extension() -> Path:
    """The extension of this checkout, compiled for this process alone."""
    folder = Path(tempfile.mkdtemp())  # another process may not write over what is loaded
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return compile_cuda.build(folder)


def _kernels(path: Path, architecture: int) -> dict[Any, tuple[compile_cuda.Usage, list[Loop]]]:
    """What each kernel of csrc/ takes, and its loops, by name, operand and tile."""
    loops = {}
    with tempfile.TemporaryDirectory() as folder:
        command = [compile_cuda.cuobjdump(), "--extract-elf", f"sm_{architecture}.", str(path)]
        subprocess.run(command, cwd=folder, check=True, capture_output=True)
        for cubin in Path(folder).iterdir():
            for symbol, code in disassembled(cubin.read_bytes()).items():
                loops[compile_cuda.described(symbol)], _ = loops_of(code, line_of_branch)
    usages = {x[1:4]: x for x in compile_cuda.usages(path) if x.architecture == architecture}
    if not usages:
        raise SystemExit(f"csrc/ is not compiled for sm_{architecture}: CUDAARCHS leaves it out")
    # Some tiles share a kernel, which is named after none of them.
    return {k: (x, loops.get(k) or loops[(*k[:2], 0)]) for k, x in usages.items()}


class Work(NamedTuple):
    """What a launch does for an entry: flops as tensor cores do them, bytes as blocks copy them."""

    flops: float
    read: float
    written: float


def _tile(size: int) -> int:
    """What is multiplied of so many channels, or positions, where one tile holds them."""
    return max(32, 1 << (size - 1).bit_length())


def work_of(kernel: str, pair: PairPlan, own: int, blocks: int, precision: str) -> Work:
    """Of one sample, by so many blocks; ``own`` is the map of a gradient.

    How often blocks read the same bytes is told as if a sample's tiles were a square of them.
    """
    (m, n), k = pair.channels, pair.positions
    if kernel == "one_pass":
        m = n = _tile(max(m, n))
    terms = 1 if pair.halves or precision == "tf32" else 3  # products that make one of two maps
    product, stored = 2.0 * m * n * k, FP32_BYTES * m * n
    maps = sum(x.bytes for x in pair.maps) / pair.batch
    written = pair.gradient_bytes / pair.batch
    wanted = sum(x.gradient_dtype is not None for x in pair.maps)
    if kernel == "one_pass":
        flops = product * (2 * terms + wanted * terms)
        return Work(flops, maps * (1 + wanted / 4), written)
    if kernel == "gram":
        flops = pair.flops / pair.batch * (_tile(k) / k) ** 2 * terms
        return Work(flops, maps * (1 + wanted / 2), written)
    if kernel == "residual":
        again = math.sqrt(blocks / pair.parts)
        return Work(
            2 * product * terms, maps * again, stored * pair.parts * (pair.scratch_bytes > 0)
        )
    if kernel == "combine":
        return Work(0, stored * pair.parts, stored)
    read = pair.maps[partner_of(own)].bytes / pair.batch + stored
    written = pair.maps[own].gradient_bytes / pair.batch
    return Work(product * terms, read * math.sqrt(blocks), written)


def _innermost(loops: Sequence[Loop]) -> list[Loop]:
    return [x for x in loops if not any(x.first < y.first and y.last < x.last for y in loops)]


def in_units(loops: Sequence[Loop], kind: str, unit: int) -> list[Loop]:
    """Those that copy in the widest units that lines of so many bytes allow.

    Narrower copies in them are of what is left over at the end of a line.
    """
    by_width: dict[int, list[Loop]] = {}
    for x in loops:
        widths = [int(name.split()[1]) for name in x.counts if name.startswith(kind)]
        if widths:
            name = f" {max(widths)}"
            kept = {k: n for k, n in x.counts.items() if kind not in k or k.endswith(name)}
            by_width.setdefault(max(widths), []).append(x._replace(counts=Counter(kept)))
    allowed = [width for width in by_width if width <= unit] or sorted(by_width)[:1]
    return by_width[max(allowed)] if allowed else []


def taken(loops: Sequence[Loop], unit: int) -> dict[str, list[Loop]]:
    """The loops of a kernel of csrc/ that multiply, that read and that write."""
    inner = _innermost(loops)
    return {
        "products": [x for x in inner if any("MMA" in name for name in x.counts)],
        "reads": in_units(inner, "LDG", unit),
        "writes": in_units(inner, "STG", unit),
    }


def waiting(loops: Sequence[Loop]) -> list[Loop]:
    """Those over stages of shared memory, without the copies and products in them."""
    kept = "instructions", "BAR"
    waits = [x for x in loops if x.counts["BAR"]]
    return [x._replace(counts=Counter({k: x.counts[k] for k in kept})) for x in waits]


def a_stage(waits: Sequence[Loop], stages: int) -> Loop:
    """One step of such loops; copies are waited for where there is a single stage."""
    total = sum((x.counts for x in waits), Counter())
    counts = Counter({k: n / len(waits) for k, n in total.items()})
    return Loop("stages", 0, 0, counts + Counter({"LDG 0": 2 - stages}))


def steps_by_work(
    kinds: dict[str, list[Loop]], work: Work, threads: int
) -> Iterator[tuple[Loop, float]]:
    """The loops of each kind as one, and the steps of it that so many threads take for the work."""
    for (name, some), amount in zip(kinds.items(), work, strict=True):
        loop = Loop(name, 0, 0, sum((x.counts for x in some), Counter()))
        flops = sum(n * product_of(x)[1] for x, n in loop.counts.items() if "MMA" in x) / LANES
        done = flops if name == "products" else bytes_of(loop, "LDG", "STG")
        if done:
            yield loop, amount / (threads * done)


def _entries_in(name: str, group: LaunchGroup, plan: LossPlan) -> list[tuple[int, int]]:
    """The pairs of a launch; and the map, in a launch with an entry for each gradient."""
    pairs = [(i, plan.pairs[i]) for i in group.pairs]
    if name == "gradients":
        wanted = [(i, j, x) for i, p in pairs for j, x in enumerate(p.maps)]
        return [(i, j) for i, j, x in wanted if x.gradient_dtype is not None]
    return [(i, 0) for i, p in pairs if name != "combine" or not p.finishes]


def cuda_launches(maps: list[Tensor], family: str) -> list[Launched]:
    path, architecture = _extension(), ARCHITECTURES[family]
    module, kernels = compile_cuda.load(path), _kernels(path, architecture)
    shared = compile_cuda.SHARED_MEMORY[architecture] << 10
    module.assume_chip(major=architecture // 10, most_shared_bytes=shared)
    with mock.patch.object(cuda_extension, "extension", return_value=module):
        plan, tensors = planned(maps, backend="cuda")
        facts = cuda_loss.PreparedLoss(plan, tensors)._launches.launches
    slots = [tensors_at(x, tensors) for x in slots_of(plan)]
    stored = [torch.empty(p.scratch_bytes, dtype=torch.uint8, device="meta") for p in plan.pairs]

    def launched(x: Any, name: str, group: LaunchGroup) -> Launched:
        usage, loops = kernels[x.kernel, x.operand, x.tile]
        parts: list[Part] = []
        reads: list[Tensor] = []
        writes: list[Tensor] = []
        waits = waiting(loops)
        shown = {y.first: y for y in waits}
        for (i, own), blocks in zip(_entries_in(name, group, plan), x.blocks, strict=True):
            pair, of = plan.pairs[i], slots[i]
            touched = [y for y in of if y is not None]
            # Elements of pooled maps are read one by one.
            pooled = any(y.pooled_size is not None for y in pair.maps)
            kinds = taken(loops, touched[0].element_size() if pooled else unit_of(touched))
            samples = min(pair.samples, pair.batch - group.chunk * pair.samples)
            each = blocks // samples
            work = work_of(name, pair, own, each, plan.precision)
            steps = [*steps_by_work(kinds, work, each * x.threads)]
            if waits:
                filled = work.read / each / (x.shared_bytes / x.stages)
                steps.append((a_stage(waits, x.stages), filled))
            # Copies of a loop are all under way at a time, and waited for where a stage begins.
            parts.append(Part(blocks, math.inf, steps))
            read, written = {
                "residual": (of[:4], (stored[i],)),
                "combine": ((stored[i],), (stored[i],)),
                "gradients": ((of[partner_of(own)], stored[i]), (of[4 + own],)),
            }.get(name, (of[:4], of[4:]))
            reads += [y for y in read if y is not None]
            writes += [y for y in written if y is not None]
            shown |= {y.first: y for some in kinds.values() for y in some}
        return _launched(x, usage, [shown[i] for i in sorted(shown)], parts, reads, writes)

    named = [(name, group) for group in plan.launch_groups for name in group.launches]
    *others, last = facts
    found = [launched(x, *of) for x, of in zip(others, named, strict=True)]
    return [*found, _launched(last, kernels[last.kernel, "", 0][0], [], [Part(1, 1, [])], [], [])]


def _launched(x: Any, usage: compile_cuda.Usage, loops: list[Loop], *others: Any) -> Launched:
    used = usage.registers, usage.stack, x.shared_bytes
    return Launched(x.kernel, sum(x.blocks), x.threads // LANES, *used, loops, Counter(), *others)
