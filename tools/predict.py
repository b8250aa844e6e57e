"""Predict what a workload takes on the Triton backend, from its machine code. Needs no GPU.

    python -m tools.predict tokens-vit-b [--dtype bf16] [--family sm_90] [--strict]

Prints the programs of each launch with what they take, and what one step of each loop is made of.
From that a simple model predicts a time. A step of a loop takes the longest of

* its instructions, one a cycle on each of an SM's four schedulers;
* its products, at the rate of the tensor cores; its traffic with shared memory;
* one warp's way through it: ``CYCLES_BETWEEN`` for each instruction, ``BARRIER`` for each barrier,
  and the part of ``MEMORY`` that nothing hides, which is all of it where loads are synchronous.

A launch takes the steps of all its programs, as many side by side as fit, or the bytes that it
moves to and from memory or the L2, whichever is longer; and ``LAUNCH`` besides. A product of BLAS
takes its bytes, or its flops at ``BLAS_SHARE`` of the rate of a large one.

A prediction ranks versions of a kernel. It is not a measurement, and may be off by a factor of 2.
It leaves out bank conflicts, how threads share cache lines, what the compiler reorders within a
step, clocks that power limits, and what one launch overlaps with the next. Instructions outside of
loops count once a program, in equal parts for all pairs of a launch.

A launch *misses* where a loop copies 2 bytes at a time though all lines allow 4, waits at more than
``MOST_BARRIERS`` barriers a step or has steps that are not counted, and where a launch that touches
``HEAVY`` bytes has fewer programs than the chip has SMs. ``--strict`` fails on a miss.

Conversions of layouts through shared memory are the stores to it in loops whose loads do not pass
through registers.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import triton
from torch import Tensor

from benchmarks.tables import plain_table
from benchmarks.workloads import BY_NAME, DTYPES, Workload
from fsp_kernels.loss_plan import MapSpec
from fsp_kernels.plan import fewest_flops
from tools.calls import workload_maps
from tools.launches import LANES, Launched, bytes_of, launches_of_maps, unit_of
from tools.machine_code import Loop, product_of

REGISTERS, MOST_WARPS, MOST_PROGRAMS, SCHEDULERS = 65536, 64, 32, 4
SHARED_LINE = 128  # bytes that shared memory moves in a cycle
CYCLES_BETWEEN, BARRIER, MEMORY = 2, 30, 600  # cycles
LAUNCH = 2e-6  # seconds
BLAS_SHARE = 0.7  # of what a large product reaches, for one between two launches
MOST_BARRIERS, HEAVY = 4, 1 << 20


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


def step_cycles(
    loop: Loop, warps: int, stages: float, beside: float, chip: Chip
) -> dict[str, float]:
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


def residency(warps: int, registers: int, shared: int, chip: Chip) -> int:
    """Programs that an SM holds at a time."""
    by_registers = REGISTERS // (triton.cdiv(registers, 8) * 8 * LANES * warps)
    by_shared = chip.shared // (shared + 1024)
    return min(by_registers, by_shared, MOST_WARPS // warps, MOST_PROGRAMS)


def facts_of(launch: Launched, memory: Memory, chip: Chip) -> dict[str, Any]:
    """A launch: what it takes, its loops, what they miss, and the prediction."""
    # BLAS does not tell how it launches.
    fits = residency(launch.warps, launch.registers, launch.shared, chip) if launch.warps else 1
    grid = launch.programs
    beside = min(fits, max(1.0, grid / chip.sms))
    product = launch.flops / (BLAS_SHARE * chip.product["half"])
    cycles: Counter[str] = Counter({"products": product * chip.clock})
    longest = l2 = 0.0
    for programs, stages, steps in launch.parts:
        program = 2.0 * MEMORY  # to begin and to end
        for loop, count in steps:
            step = step_cycles(loop, launch.warps, stages, beside, chip)
            binds = max(step, key=lambda name: step[name])
            program += count * step[binds]
            cycles[binds] += count * step[binds] * programs / (chip.sms * beside)
            l2 += count * programs * launch.warps * LANES * bytes_of(loop, "LDG", "STG")
        cycles["latency"] += 2 * MEMORY * programs / (chip.sms * beside)
        longest = max(longest, program)
    from_memory = memory.bytes_of(launch.reads, launch.writes)
    if launch.kernel == "fsp_one_pass":
        # What the L2 does not hold of the student's half is read twice, but for the end of the map
        # that the second sweep begins with.
        read = sum(x.nbytes for x in launch.reads)
        held = chip.l2_bytes / (min(grid, fits * chip.sms) / grid * read)
        from_memory += int((1 - held / 2) * read / 2) if held < 1 else 0
    times = {name: count / chip.clock for name, count in cycles.items()}
    work = max(sum(times.values()), longest / chip.clock)
    bounds = {
        max(times, key=lambda name: times[name]): work,
        "memory": from_memory / chip.memory,
        "L2": l2 / chip.l2,
    }
    binds = max(bounds, key=lambda name: bounds[name])
    outside = [Loop("in no loop", 0, 0, launch.outside)] if launch.outside else []
    counted = [x for part in launch.parts for x in part.steps]
    return {
        "kernel": launch.kernel,
        "programs": grid,
        "warps": launch.warps,
        "registers": launch.registers,
        "stack": launch.stack,
        "shared": launch.shared,
        "beside": fits,
        "waves": grid / (fits * chip.sms),
        "converted": sum(conversions(x) for x in launch.loops),
        "loops": [
            {"function": x.function, "steps": [n for y, n in counted if y == x], **x.counts}
            for x in (*launch.loops, *outside)
        ],
        "misses": misses(launch, chip),
        "predicted_us": 1e6 * (bounds[binds] + LAUNCH),
        "binds": binds,
    }


def conversions(loop: Loop) -> int:
    """Stores to shared memory in a step that are not of what the step loaded."""
    loads = any(kind.startswith("LDG ") for kind in loop.counts)
    return 0 if loads else sum(n for kind, n in loop.counts.items() if kind.startswith("STS"))


def misses(launch: Launched, chip: Chip) -> list[str]:
    """What a launch does that a good one does not."""
    touched = {id(x): x for x in (*launch.reads, *launch.writes)}.values()
    unit = unit_of([x for x in touched if x.element_size() == 2])
    found = []
    for loop in launch.loops:
        narrow = sum(loop.counts[kind] for kind in ("LDG 2", "STG 2"))
        if narrow and unit >= 4:
            found.append(f"{loop.function} copies 2 bytes {narrow} times a step")
        if loop.counts["BAR"] > MOST_BARRIERS:
            found.append(f"{loop.function} has {loop.counts['BAR']} barriers a step")
        if loop.function in launch.unknown:
            found.append(f"{loop.function} has a loop whose steps are not counted")
    heavy = launch.warps and sum(x.nbytes for x in touched) >= HEAVY
    if heavy and launch.programs < chip.sms:
        found.append(f"{launch.programs} programs for {chip.sms} SMs")
    return list(dict.fromkeys(found))


def workload_facts(workload: Workload, dtype: str, family: str) -> dict[str, Any]:
    """Every launch of a workload at full batch, and the time that its bytes and flops take."""
    chip = CHIPS[family]
    maps = workload_maps(workload, workload.batch, DTYPES[dtype], "meta")
    memory = Memory(chip.l2_bytes)
    launches = [facts_of(x, memory, chip) for x in launches_of_maps(maps, family)]
    specs = [MapSpec.of(x)._replace(requires_grad=i % 4 < 2) for i, x in enumerate(maps)]
    pairs = [specs[i : i + 4] for i in range(0, len(specs), 4)]
    flops = sum(fewest_flops((a, b), (c, d)) for a, b, c, d in pairs)
    moved = sum(x.nbytes * (2 if i % 4 < 2 else 1) for i, x in enumerate(maps))
    floor = max(moved / chip.memory, flops / chip.product["fp32" if dtype == "fp32" else "half"])
    return {
        "workload": workload.name,
        "dtype": dtype,
        "launches": launches,
        "predicted_us": sum(x["predicted_us"] for x in launches),
        "floor_us": 1e6 * floor,
    }


# --- printing -------------------------------------------------------------------------------------

_LAUNCH = (
    *("launch", "programs", "warps", "registers", "shared", "beside", "waves", "converted"),
    *("predicted us", "bound by"),
)
_LOOP = ("loop", "steps", "instructions", "BAR", "products", "reads", "stores", "shared")


def launch_table(facts: dict[str, Any]) -> str:
    """The launches of a workload, and under them the loops."""
    launches = [
        (
            *(x["kernel"], x["programs"], x["warps"], x["registers"], x["shared"], x["beside"]),
            *(f"{x['waves']:.2f}", x["converted"], f"{x['predicted_us']:.1f}", x["binds"]),
        )
        for x in facts["launches"]
    ]
    loops = [
        (
            *(loop["function"], ",".join(f"{n:.4g}" for n in loop["steps"]) or "-"),
            *(loop.get("instructions", 0), loop.get("BAR", 0), _some(loop, "H")),
            *(_some(loop, "LDG"), _some(loop, "STG"), _some(loop, "LDS", "STS")),
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
    """A row for each workload, and under them what launches miss."""
    head = ("workload", "dtype", "floor us", "predicted us", "of the floor", "launches")
    rows = [
        (
            *(x["workload"], x["dtype"], f"{x['floor_us']:.1f}", f"{x['predicted_us']:.1f}"),
            f"{x['predicted_us'] / x['floor_us']:.1f}x",
            ", ".join(
                f"{y['kernel']} {y['predicted_us']:.0f} ({y['binds']})" for y in x["launches"]
            ),
        )
        for x in found
    ]
    missed = [
        f"{x['workload']} {x['dtype']}: {y['kernel']}: {miss}"
        for x in found
        for y in x["launches"]
        for miss in y["misses"]
    ]
    return "\n".join([plain_table(head, rows), *(["", "Misses:", *missed] if missed else [])])


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tools.predict",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("workload", choices=("all", *BY_NAME))
    parser.add_argument("--dtype", choices=tuple(DTYPES), help="of the maps; default bf16 and fp32")
    parser.add_argument("--family", choices=tuple(CHIPS), default="sm_90", help="of chips")
    parser.add_argument("--strict", action="store_true", help="fail where a launch misses")
    chosen = parser.parse_args(arguments)
    names = list(BY_NAME) if chosen.workload == "all" else [chosen.workload]
    dtypes = [chosen.dtype] if chosen.dtype else ["bf16", "fp32"]
    found = [workload_facts(BY_NAME[x], dtype, chosen.family) for dtype in dtypes for x in names]
    for facts in found if chosen.workload != "all" else []:
        print(launch_table(facts), end="\n\n")
    print(summary(found))
    print(f"Predicted for {chosen.family} by a model, not measured: see tools/predict.py.")
    return int(chosen.strict and any(y["misses"] for x in found for y in x["launches"]))


if __name__ == "__main__":
    sys.exit(main())
