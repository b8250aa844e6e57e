"""Errors of loss and gradients to float64 as the student nears its teacher.

Distillation drives the two networks' maps together. Who subtracts two nearly equal FSP matrices
has a gradient that drowns in rounding just there. Ours subtracts the maps first.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks import contenders
from benchmarks.contenders import Contender
from benchmarks.measure import (
    LOSS_SCALES,
    evaluate,
    float32_products,
    in_float64,
    relative_error,
)
from benchmarks.peers import Loss
from benchmarks.race import NotRun, failure
from benchmarks.workloads import Case, Pairs, Workload
from fsp_kernels import reference
from fsp_kernels.autograd import planned_loss
from fsp_kernels.backends import registered_backends
from fsp_kernels.backends.devices import fp32_precision
from fsp_kernels.loss_plan import Form, MapSpec
from fsp_kernels.plan import alternatives

# Both maps of the pair: of the last stages of a ResNet-18, which kernels evaluate in Gram form and
# by tiles, and of an early one, in one pass (fp32: by tiles in parts). Of a larger batch errors are
# the same.
SHAPES = {
    "512 @ 7 x 7": (8, 512, 7, 7),
    "256 @ 14 x 14": (8, 256, 14, 14),
    "64 @ 28 x 28": (8, 64, 28, 28),
}
# For these, too, in this order.
QUICK_SHAPES = {
    "192 @ 7 x 7": (2, 192, 7, 7),
    "144 @ 9 x 9": (2, 144, 9, 9),
    "64 @ 9 x 9": (2, 64, 9, 9),
}
NOISES = (1.0, 1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6)
TORCH_BACKEND = "ours (torch)"
FORMS: tuple[Form, ...] = ("matrix", "gram")

Finding = dict[str, Any]


class Precision(NamedTuple):
    """The dtype of the maps, and ``torch.set_float32_matmul_precision``'s argument."""

    dtype: torch.dtype
    products: str = "highest"


PRECISIONS = {
    "fp32": Precision(torch.float32),
    "tf32": Precision(torch.float32, "high"),
    "bf16": Precision(torch.bfloat16),
    "fp16": Precision(torch.float16),
}


class Problem:
    """Maps at one noise, and what is true of them by the definition in float64.

    That is computed from the rounded maps, so rounding them is nobody's error. All gradients are
    scaled as training in the dtype scales them: in float64 a power of two changes nothing else.
    """

    def __init__(self, noise: float, shape: Sequence[int], dtype: torch.dtype, device: str):
        self.student, self.teacher = nearby_maps(noise, shape, dtype, device)
        self.scale = LOSS_SCALES.get(dtype, 1.0)
        exact = in_float64(self.student), in_float64(self.teacher)
        self._loss, self._gradients = evaluate(reference.fsp_loss, *exact, self.scale)

    def errors(self, contender: Loss) -> dict[str, float]:
        """Relative errors in the 2-norm, the gradients' being that of the worse one."""
        if not all(truth.norm() > 0 for truth in (self._loss, *self._gradients)):
            raise NotRun("not defined: rounding leaves student and teacher equal")
        loss, gradients = evaluate(contender, self.student, self.teacher, self.scale)
        return {
            "loss_error": relative_error([loss], [self._loss]),
            "gradient_error": relative_error(gradients, self._gradients),
        }


def nearby_maps(
    noise: float, shape: Sequence[int], dtype: torch.dtype, device: str, seed: int = 0
) -> tuple[Pairs, Pairs]:
    """``(student, teacher)``, one pair each; the student off by ``noise`` times normal noise.

    But for rounding they are the same numbers in every dtype and on every device.
    """
    generator = torch.Generator().manual_seed(seed)
    teacher = [torch.randn(*shape, generator=generator).relu_() for _ in range(2)]
    student = [x + noise * torch.randn(*shape, generator=generator) for x in teacher]
    first, second = (x.to(device, dtype).requires_grad_() for x in student)
    return [(first, second)], [(teacher[0].to(device, dtype), teacher[1].to(device, dtype))]


def loss_by(form: Form) -> Loss:
    """Ours by the torch backend, made to take one form, whichever it would choose."""

    def loss(student: Pairs, teacher: Pairs) -> Tensor:
        (a, b), (c, d) = student[0], teacher[0]
        specs = (MapSpec.of(a), MapSpec.of(b)), (MapSpec.of(c), MapSpec.of(d))
        backend = registered_backends()["torch"]
        plans = alternatives(*specs, "max", "frobenius", backend, fp32_precision())
        plan = next((plan for plan in plans if plan.pairs[0].form == form), None)
        if plan is None:
            raise NotRun(f"not run: has no {form} form for this shape")
        return planned_loss(plan, (1.0,), (a, b, c, d))

    return loss


def ways(chosen: Sequence[Contender], shape: Sequence[int], device: str) -> list[Contender]:
    """Every contender, and our torch backend made to take each of its forms."""
    found = [replace(c, build=partial(_built, c, shape, device)) for c in chosen]
    if any(way.name == TORCH_BACKEND for way in found):
        found += [
            Contender(f"{TORCH_BACKEND}, {form} form", partial(loss_by, form), ours=True)
            for form in FORMS
        ]
    return found


def _built(contender: Contender, shape: Sequence[int], device: str) -> Loss:
    batch, channels, side, _ = shape
    layer = (channels, side)
    case = Case(Workload("near convergence", batch, ((layer, layer),)), batch)
    reason = contenders.why_not(contender, case, device)
    if reason is not None:
        raise NotRun(reason)
    return contender.build()


def why_no(dtype: str, device: str) -> str | None:
    """Why a device cannot multiply so; ``None`` if it can."""
    if dtype != "tf32":
        return None
    if device == "cpu":
        return "a CPU has no TF32"
    return None if torch.cuda.get_device_capability() >= (8, 0) else "this GPU has no TF32"


def measure(
    device: str,
    chosen: Sequence[Contender],
    dtypes: Iterable[str] = tuple(PRECISIONS),
    noises: Sequence[float] = NOISES,
    shapes: Mapping[str, Sequence[int]] = SHAPES,
) -> tuple[list[Finding], list[Finding]]:
    """``(errors, not_measured)`` of every way, of all maps, in every dtype, at every noise."""
    findings: list[Finding] = []
    for (maps, shape), dtype in itertools.product(shapes.items(), dtypes):
        where = {"part": "accuracy", "maps": maps, "dtype": dtype}
        with float32_products(PRECISIONS[dtype].products):
            found = _findings(device, ways(chosen, shape, device), dtype, noises, shape)
        findings += [where | finding for finding in found]
    measured = [finding for finding in findings if "reason" not in finding]
    return measured, [finding for finding in findings if "reason" in finding]


def _findings(
    device: str,
    all_ways: Sequence[Contender],
    dtype: str,
    noises: Sequence[float],
    shape: Sequence[int],
) -> list[Finding]:
    """In one dtype; what has a reason has no errors."""

    def identity(noise: float, way: Contender) -> Finding:
        return {"noise": noise, "contender": way.name}

    reason = why_no(dtype, device)
    if reason is not None:
        missing = {"reason": reason, "fault": False}
        return [identity(noise, way) | missing for way in all_ways for noise in noises]
    kind = PRECISIONS[dtype].dtype
    problems = {noise: Problem(noise, shape, kind, device) for noise in noises}
    return [
        identity(noise, way) | finding
        for way in all_ways
        for noise, finding in _errors_of(way, problems).items()
    ]


def _errors_of(way: Contender, problems: Mapping[float, Problem]) -> dict[float, Finding]:
    """At each noise the errors, or the reason why there are none."""
    try:
        loss = way.build()
    except Exception as error:
        return dict.fromkeys(problems, _reason(error))
    found: dict[float, Finding] = {}
    for noise, problem in problems.items():
        try:
            found[noise] = problem.errors(loss)
        except Exception as error:
            found[noise] = _reason(error)
    return found


def _reason(error: Exception) -> Finding:
    outcome = failure(error)
    return {"reason": outcome.reason, "fault": outcome.fault}
