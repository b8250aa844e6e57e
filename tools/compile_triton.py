"""What each Triton kernel takes of a chip: registers, stack and shared memory. Needs no GPU.

    python -m tools.compile_triton [--family sm_90] [--kernel gram]
    python -m tools.compile_triton --workload tokens-vit-b [--backend cuda]    # see predict.py

compiles every kernel in every configuration of the table, for maps whose rows are multiples of 16
bytes, for 7 x 7 ones and for pooled ones, and prints a row for each. It fails where one spills
registers to the stack (a few bytes are allowed to a Triton that the table was not made with), or
wants more shared memory than the chip has. Rarer ways through the kernels have to compile; of these
it prints registers + bytes of stack.
"""

from __future__ import annotations

import argparse
import math
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget

from benchmarks import workloads
from benchmarks.checks import float32_products
from benchmarks.workloads import Layer, Workload
from fsp_kernels.backends import registered_backends
from fsp_kernels.backends.fused import fp32_precision, raw_stream
from fsp_kernels.backends.triton import configurations
from fsp_kernels.backends.triton.configurations import FAMILIES, Row
from fsp_kernels.backends.triton.launch import Launch
from fsp_kernels.backends.triton.loss import Program
from fsp_kernels.backends.triton.product import prepare
from fsp_kernels.loss_plan import LossPlan, MapSpec, Scaling
from fsp_kernels.plan import plan_loss

# Chips each family's table is compiled for, and the shared memory a program may have on them: CUDA
# C++ Programming Guide, "Technical Specifications per Compute Capability".
ARCHITECTURES = {"sm_80": 80, "sm_89": 89, "sm_90": 90, "sm_100": 100, "sm_120": 120}
TENSOR_MEMORY = 512  # columns
SHARED_MEMORY = {80: 163, 89: 99, 90: 227, 100: 227, 120: 99}  # KiB
# The Triton that the table was made with: there, no kernel uses the stack. Another one divides the
# registers otherwise, and some kernels keep a value or two on the stack.
TABLE_TRITON = "3.8"
MOST_STACK = 0 if triton.__version__.startswith(f"{TABLE_TRITON}.") else 128  # bytes
# What is multiplied in each kind of row.
DTYPES = {
    "half": (torch.bfloat16, torch.float16),
    "tf32": (torch.float32,),
    "tf32x3": (torch.float32,),
}


class Case(NamedTuple):
    """One kernel to compile: a row of the table and maps that lead to it."""

    row: Row
    dtype: torch.dtype


class Usage(NamedTuple):
    """What one compiled kernel takes, by thread (registers, stack) and program (shared memory)."""

    kernel: str
    registers: int
    stack: int  # bytes
    shared: int  # bytes
    tensor_memory: int = 0  # columns, of 512 that a chip of family sm_100 has


class _Chip:
    """The part of a Triton driver that compiling asks."""

    def __init__(self, architecture: int):
        self._target = GPUTarget("cuda", architecture, 32)

    def get_current_device(self) -> int:
        return self._target.arch  # by which Triton keeps apart what it compiled

    def get_current_stream(self, device: int) -> int:  # noqa: ARG002
        return 0

    def get_current_target(self) -> GPUTarget:
        return self._target


def cases(family: str | None = None, kernel: str | None = None) -> Iterator[Case]:
    """Every row of the table, by dtype; or those of a family or a kernel."""
    for row in configurations.rows():
        if family in (None, row.family) and kernel in (None, row.kernel):
            for dtype in DTYPES[row.kind]:
                yield Case(row, dtype)


def compile_case(case: Case) -> list[Usage]:
    """What the kernel of a case takes, in each variant that its shapes lead to."""
    # A lambda: even preparing a call asks the chip.
    compiled = compile_call(
        lambda: call_of(case, batch=8, device="meta")(), case.row.family, case.row.kind
    )
    # The row of "gram" is that of all launches of that form.
    return [usage_of(x) for x in compiled if x.metadata.name.startswith("fsp_" + case.row.kernel)]


def compile_call(call: Callable[[], object], family: str, kind: str) -> list[Any]:
    """What would be launched on a chip of that family, compiled only."""
    return instead_of_launches(compiled, call, family, kind)


def compiled(launch: Launch, tensors: tuple[Any, ...], *scalars: Any) -> Any:
    """The kernel of a launch."""
    arguments = (*tensors, *launch.constants, *scalars)
    return launch.kernel.warmup(*arguments, grid=launch.grid, num_warps=launch.warps)


def launches_of(call: Callable[[], object], family: str, kind: str) -> list[str]:
    """What would be launched on a chip of that family, in words that tell any two apart."""

    def described(launch: Launch, *_: Any) -> str:
        return f"{launch.kernel.__name__} {launch.grid} {launch.warps} {launch.constants}"

    return instead_of_launches(described, call, family, kind)


def instead_of_launches(
    do: Callable[..., Any], call: Callable[[], object], family: str, kind: str
) -> list[Any]:
    """What ``do`` makes of each launch of a call."""
    done: list[Any] = []

    def start(launch: Launch, tensors: tuple[Any, ...], *scalars: Any) -> None:
        done.append(do(launch, tensors, *scalars))

    triton.runtime.driver.set_active(_Chip(ARCHITECTURES[family]))
    with mock.patch.object(Launch, "start", start), precision_of(kind):
        call()
    return done


def precision_of(kind: str) -> AbstractContextManager[None]:
    """The precision of fp32 products that leads to a kind of row."""
    return float32_products("high" if kind == "tf32" else "highest")


def complaints(case: Case, usage: Usage) -> list[str]:
    """Why this cannot be shipped: nothing, if all is well."""
    limit = SHARED_MEMORY[ARCHITECTURES[case.row.family]] << 10
    found = []
    if usage.stack > MOST_STACK:
        found.append(f"spills {usage.stack} bytes to the stack")
    if usage.shared > limit:
        found.append(f"wants {usage.shared} bytes of shared memory, the chip has {limit}")
    if usage.tensor_memory > TENSOR_MEMORY:
        found.append(f"wants {usage.tensor_memory} columns of tensor memory of {TENSOR_MEMORY}")
    return found


def call_of(case: Case, batch: int, device: str) -> Callable[[], list[Tensor]]:
    """A call of the backend with maps that the planner gives to the kernel of a case."""
    return call_on(maps_of(case, batch, device))


def maps_of(case: Case, batch: int, device: str) -> list[Tensor]:
    """The maps of one pair that lead to the kernel of a case.

    Two for a product, and what a loss could leave as the gradient of their matrix.
    """
    kernel, limit = case.row.kernel, case.row.limit
    channels, size, odd = {
        "one_pass": (limit, (16, 16), (7, 7)),  # few positions, which are never split
        "gram": (2048, (4, limit // 4), {16: (3, 3), 32: (5, 5), 64: (7, 7)}.get(limit)),
    }.get(kernel, (limit, (64, 64), (21, 21)) if limit else (256, (32, 32), (21, 21)))
    shape = (batch, channels, *(odd if case.row.access == "odd" else size))
    offset = 1 if case.row.access == "odd" else 0  # which begins beside a multiple of 16 bytes
    if kernel == "product":
        maps = [_map(shape, case.dtype, device, offset) for _ in range(2)]
        return [*maps, _map((batch, channels, channels), case.dtype, device)]
    if case.row.access == "odd" and case.dtype == torch.float32:  # whose 4 bytes are a unit
        apart = (*shape[:2], 2 * math.prod(shape[2:]))
        return [_map(apart, case.dtype, device)[..., ::2] for _ in range(4)]
    if case.row.access != "scattered":
        return [_map(shape, case.dtype, device, offset) for _ in range(4)]
    # Pooled, as in a pair across a network's stages.
    larger = (*shape[:2], 2 * shape[2], 2 * shape[3])
    return [_map(s, case.dtype, device) for s in (larger, shape) * 2]


def workload_maps(workload: Workload, batch: int, dtype: torch.dtype, device: str) -> list[Tensor]:
    """The maps of all pairs of a workload, four for each pair."""

    def one(layer: Layer) -> Tensor:
        channels, size = layer
        if workload.tokens:  # (B, tokens, channels), seen across its rows
            return _map((batch, size, channels), dtype, device).transpose(1, 2)
        return _map((batch, channels, size, size), dtype, device)

    return [one(layer) for pair in workload.layers for layer in pair * 2]


def call_on(maps: list[Tensor]) -> Callable[[], list[Tensor]]:
    """A call on maps as the two above make them; it returns all that it computes."""
    return _product_call(*maps) if len(maps) == 3 else _loss_call(maps)


def planned(
    maps: list[Tensor],
    wanted: tuple[bool, ...] = (True, True, False, False),
    pool: str = "max",
    norm: str = "frobenius",
    backend: str = "triton",
) -> tuple[LossPlan, list[Tensor]]:
    """The plan of pairs with ``len(wanted)`` maps each, outside of all caches.

    And what a program takes: the maps, and after them their gradients.
    """
    size = len(wanted)
    specs = [
        MapSpec.of(x)._replace(device=torch.device("cuda"), requires_grad=wanted[i % size])
        for i, x in enumerate(maps)
    ]
    pairs = [specs[start : start + size] for start in range(0, len(specs), size)]
    student, teacher = tuple((p[0], p[1]) for p in pairs), tuple(tuple(p[2:]) for p in pairs)
    # Not from the cache: the table, on which plans depend, changes between calls.
    plan = plan_loss.__wrapped__(
        student, teacher, pool, norm, registered_backends()[backend], fp32_precision()
    )
    gradients = [torch.empty_like(maps[i], dtype=plan.maps[i].gradient_dtype) for i in plan.wanted]
    return plan, [*maps, *gradients]


def _loss_call(maps: list[Tensor], *options: Any) -> Callable[[], list[Tensor]]:
    """The loss of pairs, prepared outside the backend's caches; ``options`` are those above."""
    plan, tensors = planned(maps, *options)
    program = Program(plan, tensors)
    return lambda: [program(tensors, [1.0] * len(plan.pairs)), *tensors[len(maps) :]]


def _product_call(first: Tensor, second: Tensor, slope: Tensor) -> Callable[[], list[Tensor]]:
    """Both uses of the kernel: an FSP matrix, and the gradient that reaches the first map."""
    first, second = first.flatten(2), second.flatten(2)
    products = []
    for x, y, out in (
        (first, second.mT, torch.empty_like(slope)),
        (slope, second, torch.empty_like(first)),
    ):
        launch, parts = prepare(
            tuple(x.shape),
            y.shape[2],
            (x.stride(), y.stride(), out.stride()),
            x.dtype,
            y.dtype,
            1.0,
            fp32_precision(),
            first.device,
        )
        if parts > 1:
            out = out.new_empty(out.shape[0], parts, *out.shape[1:], dtype=torch.float32)
        products.append((launch, (x, y, out), parts))

    def call() -> list[Tensor]:
        stream = raw_stream(first.device)
        for launch, tensors, _ in products:
            launch(stream, tensors)
        return [out if parts == 1 else out.sum(1) for _, (_, _, out), parts in products]

    return call


def _map(shape: tuple[int, ...], dtype: torch.dtype, device: str, offset: int = 0) -> Tensor:
    """A map that begins ``offset`` elements after a multiple of 16 bytes."""
    flat = torch.empty(math.prod(shape) + offset, dtype=dtype, device=device)
    if device != "meta":
        flat.normal_()
    return flat[offset:].view(shape)


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


_HEADER = (
    *("family", "kernel", "kind", "limit", "dtype", "access", "blocks", "warps", "stages"),
    *("registers", "stack", "shared", "measured"),
)
_LINE = "{:<8}{:<11}{:<8}{:<7}{:<10}{:<11}{:<13}{:<7}{:<8}{:<11}{:<7}{:<8}{}"


def _line(case: Case, usage: Usage, bad: list[str]) -> str:
    row, c = case.row, case.row.configuration
    return _LINE.format(
        *(row.family, row.kernel, row.kind, row.limit, str(case.dtype).removeprefix("torch.")),
        *(row.access, f"{c.block_m}x{c.block_n}x{c.block_k}", c.warps, c.stages),
        *(usage.registers, usage.stack, usage.shared),
        "; ".join(bad or [row.measured or "not measured"]),
    )


class Variant(NamedTuple):
    """A way through the kernels that no row of the table leads to; it has to compile."""

    name: str
    dtype: torch.dtype
    shapes: tuple[tuple[int, ...], ...]
    wanted: tuple[bool, ...] = (True, True, False, False)
    pool: str = "max"
    norm: str = "frobenius"
    cropped: bool = False


def _square(channels: int, side: int, batch: int = 128) -> tuple[int, ...]:
    """By default a batch that takes one pass where channels are few."""
    return (batch, channels, side, side)


_ALL, _NONE, _READY = (True,) * 4, (False,) * 4, (True,) * 3
_FP32, _BF16, _FP16 = torch.float32, torch.bfloat16, torch.float16
VARIANTS = (
    Variant("averages", _BF16, (_square(64, 32), _square(64, 16)) * 2, pool="avg"),
    Variant("apart", _FP32, (_square(64, 32),) * 2 + (_square(64, 16),) * 2),
    Variant("ready", _BF16, (_square(64, 32),) * 2 + ((128, 64, 64),), _READY),
    Variant("ready, tiles", _FP32, (_square(256, 32),) * 2 + ((128, 256, 256),), _READY),
    Variant("columns", _FP32, (_square(64, 32),) * 4, norm="column"),
    Variant("columns, tiles", _BF16, (_square(256, 32),) * 4, norm="column"),
    Variant("parts", _FP32, (_square(256, 64, batch=1),) * 4),
    Variant("teacher", _FP32, (_square(64, 32),) * 4, _ALL),
    Variant("teacher, Gram", _BF16, (_square(512, 7),) * 4, _ALL),
    Variant("teacher, tiles", _BF16, (_square(256, 32),) * 4, _ALL),
    Variant("no gradients", _FP32, (_square(64, 32),) * 4, _NONE),
    Variant("no gradients, Gram", _FP32, (_square(512, 7),) * 4, _NONE),
    Variant("no gradients, tiles", _BF16, (_square(256, 32),) * 4, _NONE),
    Variant("cropped", _FP32, (_square(64, 34),) * 4, cropped=True),
    Variant("rows of 4 bytes", _BF16, ((8, 64, 7, 14),) * 4),
    Variant("rows of 4 bytes, tiles", _BF16, ((8, 256, 7, 14),) * 4),
    Variant("rows of 4 bytes, Gram", _FP32, (_square(512, 7),) * 4),
    Variant("one element", _FP16, ((1, 1, 1),) * 4),
    Variant("64-bit offsets", _BF16, (_square(16, 20000),) * 4),
)
# Kernels without a configuration of their own, which may not spill in any variant.
UNCONFIGURED = ("fsp_combine", "fsp_matrix_gradients", "fsp_finish", "fsp_scale")


def compile_variant(variant: Variant, family: str) -> list[Usage]:
    """What each kernel of a variant takes, backward's scaling included."""
    maps = [torch.empty(shape, dtype=variant.dtype, device="meta") for shape in variant.shapes]
    if variant.cropped:
        maps = [x[..., 1:-1, 1:-1] for x in maps]

    def call() -> None:
        _loss_call(maps, variant.wanted, variant.pool, variant.norm)()
        factor, gradients = torch.empty((), device="meta"), [x.float() for x in maps]
        held, dtypes = (tuple(x.dtype for x in some) for some in (gradients, maps))
        scaling = Scaling(tuple(map(Tensor.numel, maps)), held, dtypes)
        for in_place in (True, False):
            registered_backends()["triton"].scale(gradients, scaling, factor, in_place)

    return [usage_of(x) for x in compile_call(call, family, "tf32x3")]


def _report(case: Case) -> tuple[Case, list[Usage]]:
    return case, compile_case(case)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tools.compile_triton",
        description="Registers, stack and shared memory of every Triton kernel; needs no GPU.",
    )
    parser.add_argument("--family", choices=tuple(FAMILIES), help="one family of chips only")
    parser.add_argument("--kernel", choices=configurations.KERNELS, help="one kernel only")
    parser.add_argument("--jobs", type=int, default=None, help="processes; default one a core")
    names = ("all", *workloads.BY_NAME)
    parser.add_argument("--workload", choices=names, help="what its launches do, and a prediction")
    parser.add_argument("--dtype", choices=tuple(workloads.DTYPES), help="of a workload's maps")
    parser.add_argument(
        "--backend", choices=("triton", "cuda"), help="of a workload; triton needs no nvcc"
    )
    parser.add_argument("--strict", action="store_true", help="fail where a launch misses")
    parser.add_argument("--json", help="a file for what is told of a workload, - for stdout")
    chosen = parser.parse_args(arguments)
    if chosen.workload is not None:
        from tools import predict  # which needs what is above

        family = chosen.family or predict.device_family() or "sm_90"
        if family not in predict.CHIPS:
            known = ", ".join(predict.CHIPS)
            parser.error(f"--family {family}: a workload's time is predicted for {known} alone")
        of = chosen.workload, chosen.dtype, family, chosen.backend
        return predict.report(*of, chosen.json, chosen.strict)
    print(_LINE.format(*_HEADER))
    failures = 0
    with ProcessPoolExecutor(chosen.jobs) as pool:
        for case, usages in pool.map(_report, cases(chosen.family, chosen.kernel)):
            for usage in usages:
                bad = complaints(case, usage)
                failures += bool(bad)
                print(_line(case, usage, bad), flush=True)
        if chosen.kernel is None:
            families = [chosen.family] if chosen.family else list(FAMILIES)
            for family in families:
                found = pool.map(compile_variant, VARIANTS, [family] * len(VARIANTS))
                for variant, usages in zip(VARIANTS, found, strict=True):
                    spilled = [u for u in usages if u.kernel in UNCONFIGURED and u.stack]
                    failures += bool(spilled)
                    amounts = {f"{u.kernel} {u.registers}+{u.stack}": None for u in usages}
                    print(f"{family:<8}{variant.name:<21}{', '.join(amounts)}", flush=True)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
