"""Part ``accuracy``: errors to float64 as the student nears its teacher.

Distillation drives the two networks' maps together. A loss that subtracts two nearly equal FSP
matrices then has a gradient of rounding errors. Ours subtracts the maps first.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks import contenders
from benchmarks.checks import Row, Truth, float32_products
from benchmarks.contenders import Contender
from benchmarks.measure import NotRun, failure
from benchmarks.options import chosen_contenders
from benchmarks.workloads import Case, Loss, Pairs, Workload
from fsp_kernels.autograd import planned_loss
from fsp_kernels.backends import registered_backends
from fsp_kernels.backends.devices import fp32_precision
from fsp_kernels.loss_plan import Form, MapSpec
from fsp_kernels.plan import alternatives

# Shapes of both maps of the pair. The first two are of the last stages of a ResNet-18, which
# kernels evaluate in Gram form and by tiles. The third is of an early stage, evaluated in one pass
# (fp32: by tiles in parts). Larger batches have the same errors.
SHAPES = {
    "512 @ 7 x 7": (8, 512, 7, 7),
    "256 @ 14 x 14": (8, 256, 14, 14),
    "64 @ 28 x 28": (8, 64, 28, 28),
}
# Small shapes that are evaluated in the same ways, in this order.
QUICK_SHAPES = {
    "192 @ 7 x 7": (2, 192, 7, 7),
    "144 @ 9 x 9": (2, 144, 9, 9),
    "64 @ 9 x 9": (2, 64, 9, 9),
}
NOISES = (1.0, 1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6)
TORCH_BACKEND = "ours (torch)"
FORMS: tuple[Form, ...] = ("matrix", "gram")


class Precision(NamedTuple):
    """The dtype of the maps, and the argument of ``torch.set_float32_matmul_precision``."""

    dtype: torch.dtype
    products: str = "highest"


PRECISIONS = {
    "fp32": Precision(torch.float32),
    "tf32": Precision(torch.float32, "high"),
    "bf16": Precision(torch.bfloat16),
    "fp16": Precision(torch.float16),
}


def nearby_maps(
    noise: float, shape: Sequence[int], dtype: torch.dtype, device: str, seed: int = 0
) -> tuple[Pairs, Pairs]:
    """``(student, teacher)``, one pair each; the student differs by ``noise`` times normal noise.

    They are the same numbers in every dtype and on every device, up to rounding.
    """
    generator = torch.Generator().manual_seed(seed)
    teacher = [torch.randn(*shape, generator=generator).relu_() for _ in range(2)]
    student = [x + noise * torch.randn(*shape, generator=generator) for x in teacher]
    first, second = (x.to(device, dtype).requires_grad_() for x in student)
    return [(first, second)], [(teacher[0].to(device, dtype), teacher[1].to(device, dtype))]


def loss_by(form: Form) -> Loss:
    """Ours by the torch backend in one form, whichever its plan would choose."""

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


def with_forms(chosen: Sequence[Contender], shape: Sequence[int], device: str) -> list[Contender]:
    """Every contender, and each form of our torch backend as one more."""
    found = [replace(c, build=partial(_built, c, shape, device)) for c in chosen]
    if any(contender.name == TORCH_BACKEND for contender in found):
        found += [
            Contender(f"{TORCH_BACKEND}, {form} form", partial(loss_by, form), ours=True)
            for form in FORMS
        ]
    return found


def _built(contender: Contender, shape: Sequence[int], device: str) -> Loss:
    batch, channels, side, _ = shape
    layer = (channels, side)
    case = Case(Workload("near convergence", batch, ((layer, layer),)), batch)
    reason = contenders.why_not_run(contender, case, device)
    if reason is not None:
        raise NotRun(reason)
    return contender.build()


def why_not_measured(dtype: str, device: str) -> str | None:
    """The reason why a device has no such products; ``None`` if it has them."""
    if dtype != "tf32":
        return None
    if device == "cpu":
        return "a CPU has no TF32"
    return None if torch.cuda.get_device_capability() >= (8, 0) else "this GPU has no TF32"


def errors_of(contender: Contender, truths: Mapping[float, Truth]) -> dict[float, Row]:
    """By noise the errors of a contender, or the reason why there are none."""
    try:
        loss = contender.build()
    except Exception as error:
        return dict.fromkeys(truths, failure(error))
    rows: dict[float, Row] = {}
    for noise, truth in truths.items():
        try:
            if not all(x.norm() > 0 for x in (truth.loss, *truth.gradients)):
                raise NotRun("not defined: rounding leaves student and teacher equal")
            rows[noise] = truth.errors(loss)
        except Exception as error:
            rows[noise] = failure(error)
    return rows


def measure_errors(
    chosen: Sequence[Contender],
    device: str,
    dtype: str,
    shape: Sequence[int],
    noises: Sequence[float] = NOISES,
) -> list[Row]:
    """A row for each contender and noise, with errors or the reason why there are none."""
    every = with_forms(chosen, shape, device)
    reason = why_not_measured(dtype, device)
    if reason is not None:
        missing = {"reason": reason, "fault": False}
        found = {contender: dict.fromkeys(noises, missing) for contender in every}
    else:
        kind = PRECISIONS[dtype].dtype
        with float32_products(PRECISIONS[dtype].products):
            truths = {noise: Truth(*nearby_maps(noise, shape, kind, device)) for noise in noises}
            found = {contender: errors_of(contender, truths) for contender in every}
    return [
        {"noise": noise, "contender": contender.name, "ours": contender.ours} | row
        for contender, rows in found.items()
        for noise, row in rows.items()
    ]


def measure_part(options: Namespace) -> list[Row]:
    """The rows of ``python -m benchmarks accuracy``."""
    # With fp32, its fast products are measured too.
    asked = options.dtype
    dtypes = [name for name in PRECISIONS if not asked or name.replace("tf32", "fp32") in asked]
    rows: list[Row] = []
    for maps, shape in (QUICK_SHAPES if options.quick else SHAPES).items():
        for dtype in dtypes:
            print(f"  {maps}, {dtype}", flush=True)
            found = measure_errors(chosen_contenders(options), options.device, dtype, shape)
            rows += [{"workload": maps, "dtype": dtype} | row for row in found]
    return rows
