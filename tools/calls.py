"""Calls that launch a given kernel of the Triton backend, for a chip that need not be there."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget

from benchmarks.checks import float32_products
from benchmarks.workloads import Layer, Workload
from fsp_kernels.backends import registered_backends
from fsp_kernels.backends.devices import fp32_precision, raw_stream
from fsp_kernels.backends.fused import FusedBackend
from fsp_kernels.backends.tensors import counts
from fsp_kernels.backends.triton import configurations
from fsp_kernels.backends.triton.configurations import Row
from fsp_kernels.backends.triton.launch import Launch
from fsp_kernels.backends.triton.loss import PreparedLoss
from fsp_kernels.backends.triton.product import prepare
from fsp_kernels.loss_plan import LossPlan, MapSpec, MaskIndices
from fsp_kernels.plan import plan_loss

# The chip that each family's table is compiled for.
ARCHITECTURES = {"sm_80": 80, "sm_89": 89, "sm_90": 90, "sm_100": 100, "sm_120": 120}
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

    @property
    def family(self) -> str:
        return self.row.family

    def __str__(self) -> str:
        row, dtype = self.row, str(self.dtype).removeprefix("torch.")
        return f"{row.kernel} {row.kind} {row.access} {row.limit} {dtype}"


def cases(family: str | None = None, kernel: str | None = None) -> Iterator[Case]:
    """Every row of the table, by dtype; or those of a family or a kernel."""
    for row in configurations.rows():
        if family in (None, row.family) and kernel in (None, row.kernel):
            for dtype in DTYPES[row.kind]:
                yield Case(row, dtype)


# --- maps and calls -------------------------------------------------------------------------------


def call_of(case: Case, batch: int, device: str) -> Callable[[], list[Tensor]]:
    """A call of the backend with maps that the planner gives to the kernel of a case."""
    return call_on(maps_of(case, batch, device))


def maps_of(case: Case, batch: int, device: str) -> list[Tensor]:
    """The maps of one pair that lead to the kernel of a case.

    Two for a product, and what a loss could leave as the gradient of their matrix.
    """
    kernel, limit = case.row.kernel, case.row.limit
    if kernel == "one_pass":  # few positions, which are never split
        channels, size, odd = limit, (16, 16), (7, 7)
    elif kernel == "gram":
        odd = {16: (3, 3), 32: (5, 5), 64: (7, 7)}[limit]
        channels, size = 2048, (4, limit // 4)
    elif limit:
        channels, size, odd = limit, (64, 64), (21, 21)
    else:
        channels, size, odd = 256, (32, 32), (21, 21)
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


def call_on(maps: list[Tensor], *options: Any) -> Callable[[], list[Tensor]]:
    """A call on maps as the two above make them; it returns all that it computes.

    ``options`` are those of :func:`planned`. The call is prepared outside the backend's caches.
    """
    if len(maps) == 3 and not options:
        return _product_call(*maps)
    plan, tensors = planned(maps, *options)
    program = PreparedLoss(plan, tensors)
    return lambda: [program(tensors, [1.0] * len(plan.pairs)), *tensors[len(maps) :]]


def planned(
    maps: list[Tensor],
    wanted: tuple[bool, ...] = (True, True, False, False),
    pool: str = "max",
    norm: str = "frobenius",
    masks: MaskIndices = (None, None),
    backend: str = "triton",
) -> tuple[LossPlan, list[Tensor]]:
    """The plan of pairs with ``len(wanted)`` maps each, outside of all caches.

    And what a program takes: the maps, and after them their gradients, masks and their counts.
    """
    size = len(wanted)
    specs = [
        MapSpec.of(x)._replace(device=torch.device("cuda"), requires_grad=wanted[i % size])
        for i, x in enumerate(maps)
    ]
    pairs = [specs[start : start + size] for start in range(0, len(specs), size)]
    student, teacher = tuple((p[0], p[1]) for p in pairs), tuple(tuple(p[2:]) for p in pairs)
    chosen = registered_backends()[backend]
    assert isinstance(chosen, FusedBackend)
    # Not from the cache: the table, on which plans depend, changes between calls.
    plan = plan_loss.__wrapped__(
        student, teacher, pool, norm, chosen, fp32_precision(), masks=masks
    )
    gradients = [torch.empty_like(maps[i], dtype=plan.maps[i].gradient_dtype) for i in plan.wanted]
    masked = {plan.mask: x for x, plan in zip(maps, plan.maps, strict=True)}
    flat = [
        torch.ones(x.shape[0], x[0, 0].numel(), dtype=chosen.mask_dtype, device=x.device)
        for i, x in masked.items()
        if i is not None
    ]
    return plan, [*maps, *gradients, *flat, *map(counts, flat)]


def _product_call(first: Tensor, second: Tensor, slope: Tensor) -> Callable[[], list[Tensor]]:
    """Both uses of the kernel: an FSP matrix, and the gradient that reaches the first map."""
    first, second = first.flatten(2), second.flatten(2)
    products = []
    for x, y, out in (
        (first, second.mT, torch.empty_like(slope)),
        (slope, second, torch.empty_like(first)),
    ):
        launch, parts = prepare(
            (x.shape[0], x.shape[1], x.shape[2]),
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


# --- launches that do not happen ------------------------------------------------------------------


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
