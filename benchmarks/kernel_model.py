"""What the machine code of a workload's launches says of their time, without a GPU.

    python -m benchmarks.kernels --workload tokens-vit-b [--dtype bf16] [--family sm_90] [--json -]

Of each launch it tells the programs and what they take, and of each loop what one step is made of.
From that it predicts a time, by a simple model. A step of a loop takes the longest of

* its instructions, one a cycle on each of an SM's four schedulers;
* its products, at the rate of the tensor cores; its traffic with shared memory;
* one warp's way through it: ``CYCLES_BETWEEN`` for each instruction, ``BARRIER`` for each barrier,
  and as much of ``MEMORY`` as nothing hides, which is all of it where loads are not asynchronous.

A launch takes the steps of all its programs, side by side as many as fit, or the bytes that it
moves to and from memory or the L2, whichever is longer, and ``LAUNCH`` besides.

A prediction ranks versions of a kernel. It is not a measurement, and may be off by a factor of 2.
It knows nothing of bank conflicts, of how well threads share cache lines, of what the compiler
reorders within a step, of clocks that power limits, or of what one launch overlaps with the next.
Instructions outside of loops count once a program, in equal parts for all pairs of a launch.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import triton
from torch import Tensor

from benchmarks.kernels import call_on, compiled, instead_of_launches, usage_of, workload_maps
from benchmarks.machine_code import Loop, loops_of, product_of
from benchmarks.tables import plain_table
from benchmarks.workloads import BY_NAME, DTYPES, Workload
from fsp_kernels.backends.triton.elementwise import BLOCK
from fsp_kernels.backends.triton.gram import COMBINED_ROWS
from fsp_kernels.backends.triton.launch import Launch
from fsp_kernels.loss_plan import MapSpec
from fsp_kernels.plan import fewest_flops

LANES, REGISTERS, MOST_WARPS, MOST_PROGRAMS, SCHEDULERS = 32, 65536, 64, 32, 4
SHARED_LINE = 128  # bytes that shared memory moves in a cycle
CYCLES_BETWEEN, BARRIER, MEMORY = 2, 30, 600  # cycles
LAUNCH = 2e-6  # seconds


class Chip(NamedTuple):
    """What the model knows of a chip; rates are of all of it, flops those of one SM in a cycle."""

    sms: int
    clock: float  # Hz
    memory: float  # bytes per second, of a copy
    l2: float  # bytes per second to the SMs
    l2_bytes: int
    shared: int  # bytes of an SM
    flops: dict[str, float]  # of HMMA and HGMMA, by what is multiplied
    product: dict[str, float]  # flops per second of a large product


# An A100 (SXM, 80 GB) and an H100 (SXM): NVIDIA's white papers; copies and L2 as others measured.
CHIPS = {
    "sm_80": Chip(
        *(108, 1.41e9, 1.7e12, 3.5e12, 40 << 20, 164 << 10),
        flops={"HMMA 16": 2048, "HMMA tf32": 1024},
        product={"half": 312e12, "fp32": 52e12},
    ),
    "sm_90": Chip(
        *(132, 1.75e9, 3.0e12, 5.5e12, 50 << 20, 228 << 10),
        flops={"HMMA 16": 2560, "HMMA tf32": 1280, "HGMMA 16": 4096, "HGMMA tf32": 2048},
        product={"half": 989e12, "fp32": 165e12},
    ),
}


# --- what a launch does ---------------------------------------------------------------------------


def _residual_steps(e: Any) -> int:
    return _cdiv(_cdiv(e.student_positions, e.block_k.value), e.parts.value)


def _gram_steps(e: Any) -> int:
    return _cdiv(_cdiv(max(e.m.value, e.n.value), e.block_m.value), e.parts.value)


_cdiv = triton.cdiv
# How many steps the loop of a function has for an entry of a launch.
STEPS = {
    "residual.residual_tile": _residual_steps,
    "one_pass._sweep": lambda e: _cdiv(e.student_positions, e.block_k.value),
    "gram._write_blocks": _gram_steps,
    "gram._total": lambda e: e.parts.value,
    "gram._total_of_columns": lambda e: e.parts.value,
    "gram._sweep": _gram_steps,
    "tiles._total": lambda e: e.parts.value,
    "tiles._combine_columns": lambda e: _cdiv(e.m.value, e.block_m.value),
    "tiles._gradient_tile": lambda e: _cdiv(e.other_channels.value, e.block_other.value),
    "elementwise.fsp_finish": lambda count: _cdiv(count, BLOCK),
}


def entries_of(launch: Launch) -> Sequence[Any]:
    first = launch.constants[0]
    return first if isinstance(first, tuple) else (first,)


def programs_of(kernel: str, entry: Any) -> int:
    """Programs of a launch that serve an entry."""
    if kernel == "fsp_finish":
        return 1
    if kernel == "fsp_one_pass":
        return entry.samples
    if kernel in ("fsp_gram", "fsp_gram_gradients"):
        return entry.samples * entry.parts.value * branches_of(kernel, entry)
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


def branches_of(kernel: str, entry: Any) -> int:
    """Ways through a kernel for an entry, each with code of its own; a program takes one."""
    wanted = sum(x is not None for x in getattr(entry, "gradients", ()))
    return {"fsp_gram": 2, "fsp_gram_gradients": wanted}.get(kernel, 1)


def touched_by(kernel: str, tensors: Sequence[Any]) -> tuple[list[Tensor], list[Tensor]]:
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


class Memory:
    """Which bytes of a call's launches come from and go to memory, and not only the L2."""

    def __init__(self, l2_bytes: int):
        self._l2_bytes = l2_bytes
        self._moved = 0
        self._last: dict[int, tuple[int, Tensor]] = {}  # by identity, which the tensor keeps

    def bytes_of(self, reads: Sequence[Tensor], writes: Sequence[Tensor]) -> int:
        """Of the next launch; what the L2 has moved more than it holds since is read again."""
        found = sum(x.nbytes for x in writes)
        touched = {id(x): x for x in (*reads, *writes)}
        for key, x in {id(x): x for x in reads}.items():
            before, _ = self._last.get(key, (-math.inf, x))
            found += x.nbytes if self._moved - before > self._l2_bytes else 0
        self._last |= {key: (self._moved, x) for key, x in touched.items()}
        self._moved += sum(x.nbytes for x in touched.values())
        return found


# --- the model ------------------------------------------------------------------------------------


def step_cycles(loop: Loop, warps: int, stages: int, beside: float, chip: Chip) -> dict[str, float]:
    """What one step takes, of ``beside`` programs on an SM, by what it could be bound by."""
    counts = loop.counts
    products = [(product_of(x), n) for x, n in counts.items() if "MMA" in x]
    shared = LANES * bytes_of(loop, "LDS", "STS")
    alone = CYCLES_BETWEEN * counts["instructions"] + BARRIER * counts["BAR"]
    if any(x.startswith("LDG ") for x in counts):
        alone += MEMORY
    elif any(x.startswith("LDGSTS") for x in counts):
        alone += max(0.0, MEMORY - (stages - 1) * alone)
    return {
        "instructions": counts["instructions"] * warps * beside / SCHEDULERS,
        "products": sum(n * flops / chip.flops[unit] for (unit, flops), n in products)
        * warps
        * beside,
        "shared memory": shared * warps * beside / SHARED_LINE,
        "latency": alone,
    }


def bytes_of(loop: Loop, *prefixes: str) -> float:
    """Of one thread in one step, by instructions that begin so."""
    return sum(n * int(x.split()[1]) for x, n in loop.counts.items() if x.startswith(prefixes))


def steps_of(entry: Any, loops: Sequence[Loop]) -> Iterator[tuple[Loop, int]]:
    """Each loop of an entry, and how often a program of it takes a step."""
    for loop in loops:
        around = [x for x in loops if x.first <= loop.first and loop.last <= x.last]
        yield loop, math.prod(STEPS[x.function](entry) for x in around)


def residency(warps: int, registers: int, shared: int, chip: Chip) -> int:
    """Programs that an SM holds at a time."""
    by_registers = REGISTERS // (_cdiv(registers, 8) * 8 * LANES * warps)
    by_shared = chip.shared // (shared + 1024)
    return min(by_registers, by_shared, MOST_WARPS // warps, MOST_PROGRAMS)


def facts_of(
    launch: Launch, tensors: Sequence[Any], kernel_of: Any, memory: Memory, chip: Chip
) -> dict[str, Any]:
    """A launch: what it takes, its loops, and the prediction."""
    kernel, warps, usage = launch.kernel.__name__, launch.warps, usage_of(kernel_of)
    entries = entries_of(launch)
    loops, rest = loops_of(kernel_of.asm["cubin"], STEPS)
    fits = residency(warps, usage.registers, usage.shared, chip)
    grid = launch.grid[0]
    beside = min(fits, max(1.0, grid / chip.sms))
    once = Loop("in no loop", 0, 0, Counter({k: n / len(entries) for k, n in rest.items()}))
    cycles: Counter[str] = Counter()
    longest = l2 = 0.0
    for entry, own in zip(entries, loops_by_entry(loops, entries), strict=True):
        programs, program = programs_of(kernel, entry), 2.0 * MEMORY  # to begin and to end
        branches = branches_of(kernel, entry)
        stages = entry.stages.value if hasattr(entry, "stages") else 1
        for loop, steps in [*steps_of(entry, own), (once, 1)]:
            step = step_cycles(loop, warps, stages, beside, chip)
            binds = max(step, key=lambda name: step[name])
            steps /= branches
            program += steps * step[binds]
            cycles[binds] += steps * step[binds] * programs / (chip.sms * beside)
            l2 += steps * programs * warps * LANES * bytes_of(loop, "LDG", "STG")
        cycles["latency"] += 2 * MEMORY * programs / (chip.sms * beside)
        longest = max(longest, program)
    reads, writes = touched_by(kernel, tensors)
    from_memory = memory.bytes_of(reads, writes)
    if kernel == "fsp_one_pass":
        # The second sweep finds in the L2 what the programs that run beside it leave there.
        under_way = min(grid, fits * chip.sms) / grid * sum(x.nbytes for x in reads)
        if under_way > chip.l2_bytes:
            from_memory += sum(x.nbytes for x in reads) // 2
    times = {name: count / chip.clock for name, count in cycles.items()}
    work = max(sum(times.values()), longest / chip.clock)
    bounds = {
        max(times, key=lambda name: times[name]): work,
        "memory": from_memory / chip.memory,
        "L2": l2 / chip.l2,
    }
    binds = max(bounds, key=lambda name: bounds[name])
    return {
        "kernel": kernel,
        "programs": grid,
        "warps": warps,
        "registers": usage.registers,
        "stack": usage.stack,
        "shared": usage.shared,
        "beside": fits,
        "waves": grid / (fits * chip.sms),
        "loops": [
            {"function": x.function, "steps": [STEPS[x.function](e) for e in entries], **x.counts}
            for x in loops
        ]
        + [{"function": "in no loop", "steps": [1], **rest}],
        "predicted_us": 1e6 * (bounds[binds] + LAUNCH),
        "binds": binds,
    }


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


def workload_facts(workload: Workload, dtype: str, family: str) -> dict[str, Any]:
    """Every launch of a workload at full batch, and the time that its bytes and flops take."""
    chip = CHIPS[family]
    maps = workload_maps(workload, workload.batch, DTYPES[dtype], "meta")
    memory = Memory(chip.l2_bytes)

    def facts(launch: Launch, tensors: tuple[Any, ...], *scalars: Any) -> dict[str, Any]:
        return facts_of(launch, tensors, compiled(launch, tensors, *scalars), memory, chip)

    launches = instead_of_launches(facts, lambda: call_on(maps)(), family, "tf32x3")
    specs = [MapSpec.of(x)._replace(requires_grad=i % 4 < 2) for i, x in enumerate(maps)]
    pairs = [specs[i : i + 4] for i in range(0, len(specs), 4)]
    flops = sum(fewest_flops((a, b), (c, d)) for a, b, c, d in pairs)
    moved = sum(x.nbytes * (2 if i % 4 < 2 else 1) for i, x in enumerate(maps))
    floor = max(moved / chip.memory, flops / chip.product["fp32" if dtype == "fp32" else "half"])
    return {
        "workload": workload.name,
        "dtype": dtype,
        "family": family,
        "launches": launches,
        "predicted_us": sum(x["predicted_us"] for x in launches),
        "floor_us": 1e6 * floor,
    }


# --- printing -------------------------------------------------------------------------------------

_LAUNCH = (
    "launch",
    "programs",
    "warps",
    "registers",
    "shared",
    "beside",
    "waves",
    "us",
    "bound by",
)
_LOOP = ("loop", "steps", "instructions", "BAR", "products", "reads", "stores", "shared")


def launch_table(facts: dict[str, Any]) -> str:
    """The launches of a workload, and under them the loops."""
    launches = [
        (
            *(x["kernel"], x["programs"], x["warps"], x["registers"], x["shared"], x["beside"]),
            *(f"{x['waves']:.2f}", f"{x['predicted_us']:.1f}", x["binds"]),
        )
        for x in facts["launches"]
    ]
    loops = [
        (
            *(loop["function"], ",".join(map(str, dict.fromkeys(loop["steps"])))),
            *(loop["instructions"], loop.get("BAR", 0), _some(loop, "H"), _some(loop, "LDG")),
            *(_some(loop, "STG"), _some(loop, "LDS", "STS")),
        )
        for x in facts["launches"]
        for loop in x["loops"]
    ]
    return "\n\n".join(
        plain_table(head, [[str(x) for x in row] for row in rows])
        for head, rows in ((_LAUNCH, launches), (_LOOP, loops))
    )


def _some(loop: dict[str, Any], *prefixes: str) -> str:
    """Counts of some instructions: ``8 LDGSTS 16`` are eight asynchronous copies of 16 bytes."""
    return ", ".join(f"{n} {x}" for x, n in loop.items() if x.startswith(prefixes)) or "-"


def summary(found: Sequence[dict[str, Any]]) -> str:
    """A row for each workload."""
    head = ("workload", "dtype", "chip", "floor us", "predicted us", "of the floor", "launches")
    rows = [
        (
            *(x["workload"], x["dtype"], x["family"], f"{x['floor_us']:.1f}"),
            *(f"{x['predicted_us']:.1f}", f"{x['predicted_us'] / x['floor_us']:.1f}x"),
            ", ".join(
                f"{y['kernel']} {y['predicted_us']:.0f} ({y['binds']})" for y in x["launches"]
            ),
        )
        for x in found
    ]
    return plain_table(head, rows)


def report(workload: str, dtype: str | None, family: str, path: str | None) -> int:
    """Print the launches of a workload, or a row for each of ``all``; or write them as JSON."""
    names = list(BY_NAME) if workload == "all" else [workload]
    dtypes = [dtype] if dtype else ["bf16", "fp32"]
    found = [workload_facts(BY_NAME[name], d, family) for d in dtypes for name in names]
    if path is not None:
        text = json.dumps(found, indent=1)
        print(text) if path == "-" else Path(path).write_text(text + "\n")
        return 0
    for facts in found if workload != "all" else []:
        print(launch_table(facts), end="\n\n")
    print(summary(found))
    print("Predicted by a model, measured nowhere: see benchmarks/kernel_model.py.")
    return 0
