"""What the machine code of a workload's launches says of their time, without a GPU.

    python -m tools.predict tokens-vit-b [--dtype bf16] [--family sm_90] [--backend triton]
        [--strict] [--json -]

Of each launch it tells the programs and what they take, and of each loop what one step is made of.
From that it predicts a time, by a simple model. A step of a loop takes the longest of

* its instructions, one a cycle on each of an SM's four schedulers;
* its products, at the rate of the tensor cores; its traffic with shared memory;
* one warp's way through it: ``CYCLES_BETWEEN`` for each instruction, ``BARRIER`` for each barrier,
  and as much of ``MEMORY`` as nothing hides, which is all of it where loads are not asynchronous.

A launch takes the steps of all its programs, side by side as many as fit, or the bytes that it
moves to and from memory or the L2, whichever is longer, and ``LAUNCH`` besides. A product of BLAS
takes its bytes, or its flops at ``BLAS_SHARE`` of the rate of a large one.

A prediction ranks versions of a kernel. It is not a measurement, and may be off by a factor of 2.
It knows nothing of bank conflicts, of how well threads share cache lines, of what the compiler
reorders within a step, of clocks that power limits, or of what one launch overlaps with the next.
Instructions outside of loops count once a program, in equal parts for all pairs of a launch. What
it cannot know of csrc/ besides is told in launches.py. With a GPU of the family at hand, what each
launch takes there is told beside its prediction.

A launch misses where a loop copies 2 bytes at a time though all lines allow 4, waits at more than
``MOST_BARRIERS`` barriers a step or has steps that nobody counts, and where a launch that touches
``HEAVY`` bytes has fewer programs than the chip has SMs. ``--strict`` fails on a miss; without it
misses are only told, since there are some today.

Conversions of layouts through shared memory are the stores to it in loops whose loads do not pass
through registers. Triton's TTGIR names all conversions, not which of them take shuffles alone.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

import fsp_kernels as fsp
from benchmarks import gpu_timing
from benchmarks.tables import plain_table
from benchmarks.workloads import BY_NAME, DTYPES, Case, Workload
from fsp_kernels.backends import registered_backends
from fsp_kernels.loss_plan import MapSpec
from fsp_kernels.plan import fewest_flops
from tools.calls import workload_maps
from tools.launches import LANES, Launched, bytes_of, cuda_launches, triton_launches, unit_of
from tools.machine_code import Loop, product_of

BACKENDS = {"triton": triton_launches, "cuda": cuda_launches}
REGISTERS, MOST_WARPS, MOST_PROGRAMS, SCHEDULERS = 65536, 64, 32, 4
SHARED_LINE = 128  # bytes that shared memory moves in a cycle
CYCLES_BETWEEN, BARRIER, MEMORY = 2, 30, 600  # cycles
LAUNCH = 2e-6  # seconds
BLAS_SHARE = 0.7  # of what a large product reaches, for one between two launches
MOST_BARRIERS, HEAVY = 4, 1 << 20
CALLS = 20  # that are measured


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


# --- the model ------------------------------------------------------------------------------------


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
    alone: float = CYCLES_BETWEEN * counts["instructions"] + BARRIER * counts["BAR"]
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
    cycles = defaultdict(float, products=product * chip.clock)
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


def workload_facts(workload: Workload, dtype: str, family: str, backend: str) -> dict[str, Any]:
    """Every launch of a workload at full batch, and the time that its bytes and flops take."""
    chip = CHIPS[family]
    maps = workload_maps(workload, workload.batch, DTYPES[dtype], "meta")
    memory = Memory(chip.l2_bytes)
    launches = [facts_of(x, memory, chip) for x in BACKENDS[backend](maps, family)]
    specs = [MapSpec.of(x)._replace(requires_grad=i % 4 < 2) for i, x in enumerate(maps)]
    pairs = [specs[i : i + 4] for i in range(0, len(specs), 4)]
    flops = sum(fewest_flops((a, b), (c, d)) for a, b, c, d in pairs)
    moved = sum(x.nbytes * (2 if i % 4 < 2 else 1) for i, x in enumerate(maps))
    floor = max(moved / chip.memory, flops / chip.product["fp32" if dtype == "fp32" else "half"])
    facts = {
        "workload": workload.name,
        "dtype": dtype,
        "family": family,
        "backend": backend,
        "launches": launches,
        "predicted_us": sum(x["predicted_us"] for x in launches),
        "floor_us": 1e6 * floor,
    }
    if device_family() == family and registered_backends()[backend].why_unavailable() is None:
        triton.runtime.driver.reset_active()  # to compile, another one has taken its place
        add_measured(facts, Case(workload, workload.batch, dtype))
    return facts


# --- on a device ----------------------------------------------------------------------------------


def device_family() -> str | None:
    """Of the GPU at hand, if there is a model of it."""
    if not torch.cuda.is_available():
        return None
    family = "sm_{}{}".format(*torch.cuda.get_device_capability())
    return family if family in CHIPS else None


def add_measured(facts: dict[str, Any], case: Case) -> None:
    """What launches take on the GPU, from the profiler: medians of calls that find the L2 cold."""
    student, teacher = case.maps("cuda")
    other = torch.ones(4 * CHIPS[facts["family"]].l2_bytes, dtype=torch.uint8, device="cuda")

    def call() -> None:
        other.add_(1)
        fsp.fsp_loss(student, teacher, backend=facts["backend"])

    call()  # compiles
    launches = [x for x in facts["launches"] if x["kernel"] != "bmm"]
    expected = [x["kernel"] for x in launches]
    calls = [[x for x in gpu_timing.kernels_run(call) if "fsp_" in x["name"]] for _ in range(CALLS)]
    for run in calls:
        names = [x["name"] for x in run]
        if len(run) != len(expected) or any(
            kernel not in name for kernel, name in zip(expected, names, strict=True)
        ):
            raise RuntimeError(f"the GPU ran {names}, the model has {expected}")
    for launch, *events in zip(launches, *calls, strict=True):
        launch["measured_us"] = statistics.median(x["dur"] for x in events)
    ends = [run[-1]["ts"] + run[-1]["dur"] - run[0]["ts"] for run in calls]
    facts["measured_us"] = statistics.median(ends)


# --- printing -------------------------------------------------------------------------------------

_LAUNCH = (
    *("launch", "programs", "warps", "registers", "shared", "beside", "waves", "converted"),
    *("predicted us", "measured us", "bound by"),
)
_LOOP = ("loop", "steps", "instructions", "BAR", "products", "reads", "stores", "shared")


def launch_table(facts: dict[str, Any]) -> str:
    """The launches of a workload, and under them the loops."""
    launches = [
        (
            *(x["kernel"], x["programs"], x["warps"], x["registers"], x["shared"], x["beside"]),
            *(f"{x['waves']:.2f}", x["converted"], f"{x['predicted_us']:.1f}"),
            *(_microseconds(x), x["binds"]),
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


def _microseconds(facts: dict[str, Any]) -> str:
    return f"{facts['measured_us']:.1f}" if "measured_us" in facts else "-"


def _some(loop: dict[str, Any], *prefixes: str) -> str:
    """Counts of some instructions: ``8 LDGSTS 16`` are eight asynchronous copies of 16 bytes."""
    return ", ".join(f"{n} {x}" for x, n in loop.items() if x.startswith(prefixes)) or "-"


def summary(found: Sequence[dict[str, Any]]) -> str:
    """A row for each workload and backend, and under them what launches miss."""
    head = (
        *("workload", "dtype", "chip", "backend", "floor us", "predicted us", "of the floor"),
        *("measured us", "launches"),
    )
    rows = [
        (
            *(x["workload"], x["dtype"], x["family"], x["backend"], f"{x['floor_us']:.1f}"),
            *(f"{x['predicted_us']:.1f}", f"{x['predicted_us'] / x['floor_us']:.1f}x"),
            _microseconds(x),
            ", ".join(
                f"{y['kernel']} {y['predicted_us']:.0f} ({y['binds']})" for y in x["launches"]
            ),
        )
        for x in found
    ]
    missed = [
        f"{x['workload']} {x['dtype']} {x['backend']}: {y['kernel']}: {miss}"
        for x in found
        for y in x["launches"]
        for miss in y["misses"]
    ]
    return "\n".join([plain_table(head, rows), *(["", "Misses:", *missed] if missed else [])])


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the launches of a workload, or a row for each of ``all``; or write them as JSON."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.predict",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    # Not symmetric ones, which have other gradients than the calls of calls.py.
    names = [name for name, workload in BY_NAME.items() if not workload.symmetric]
    parser.add_argument("workload", choices=("all", *names))
    parser.add_argument("--dtype", choices=tuple(DTYPES), help="of the maps; default bf16 and fp32")
    parser.add_argument(
        "--family", choices=tuple(CHIPS), help="of chips; default that of the GPU here, or sm_90"
    )
    parser.add_argument("--backend", choices=tuple(BACKENDS), help="triton needs no nvcc")
    parser.add_argument("--strict", action="store_true", help="fail where a launch misses")
    parser.add_argument("--json", metavar="FILE", help="write JSON to a file; - for stdout")
    chosen = parser.parse_args(arguments)
    family = chosen.family or device_family() or "sm_90"
    found = [
        workload_facts(BY_NAME[name], dtype, family, backend)
        for dtype in ([chosen.dtype] if chosen.dtype else ["bf16", "fp32"])
        for name in (names if chosen.workload == "all" else [chosen.workload])
        for backend in ([chosen.backend] if chosen.backend else BACKENDS)
    ]
    failed = chosen.strict and any(y["misses"] for x in found for y in x["launches"])
    if chosen.json is not None:
        text = json.dumps(found, indent=1)
        print(text) if chosen.json == "-" else Path(chosen.json).write_text(text + "\n")
        return int(failed)
    for facts in found if chosen.workload != "all" else []:
        print(launch_table(facts), end="\n\n")
    print(summary(found))
    print("Predicted by a model, not measured: see tools/predict.py.")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
