"""What the table of configurations allows for a pair: which rows there are for its maps."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fsp_kernels.backends.axes import axes_of
from fsp_kernels.backends.triton.configurations import (
    ACCESSES,
    Configuration,
    configuration_of,
    rows_of,
)
from fsp_kernels.backends.triton.maps import unit_of
from fsp_kernels.loss_plan import Evaluation, Limits, MapPlan, multiplied_dtypes
from fsp_kernels.plan import HALF

SMALLEST_COPY = 4  # bytes that a GPU copies to shared memory while it computes
# Parts of the positions from which tiles in parts are faster than one pass, which takes longer for
# each position in fp32. Predicted from the machine code, not measured; for "tf32" not even that.
ONE_PASS_PARTS = {"half": 16, "tf32": 3, "tf32x3": 3}
# Of one launch: a kernel has code for each of its pairs, and takes as long to compile.
MOST_PAIRS = 8


def limits_of(
    student: Sequence[MapPlan], teacher: Sequence[MapPlan], precision: str, family: str
) -> Limits:
    """See :meth:`fsp_kernels.backends.Backend.limits`, for chips of a family."""
    kind = kind_of(student, teacher, precision)
    row = kind, family, access_of(student, teacher)
    channels = max(plan.shape[1] for plan in student)
    configured: dict[Evaluation, Configuration | None] = {
        "one pass": configuration_of("one_pass", *row, channels),
        "tiles": configuration_of("residual", *row, channels),
    }
    return Limits(
        evaluations=("one pass", "tiles", "blocks"),
        one_pass=max((r.limit for r in rows_of("one_pass", *row)), default=0),
        one_pass_parts=ONE_PASS_PARTS[kind],
        gram_positions=max((r.limit for r in rows_of("gram", *row)), default=0),
        bf16_slopes=True,
        blas_gradients=_suits_blas(student, teacher),
        # A launch takes as many warps as the pair that takes most.
        kernels={name: c and c.warps for name, c in configured.items()},
        launch_pairs=MOST_PAIRS,
        launch_products=4 * MOST_PAIRS,
    )


def kind_of(student: Sequence[MapPlan], teacher: Sequence[MapPlan], precision: str) -> str:
    """Which of ``configurations.KINDS`` the products of a pair are."""
    halves = all(dtype in HALF for dtype in multiplied_dtypes(student, teacher))
    return "half" if halves else precision


def access_of(student: Sequence[MapPlan], teacher: Sequence[MapPlan]) -> str:
    """Which of ``configurations.ACCESSES`` reading a pair is: the slowest of its maps'."""
    maps = [*student, *teacher] if len(teacher) == 2 else student
    return max((_access_of_map(x.read) for x in maps), key=ACCESSES.index)


def _access_of_map(plan: MapPlan) -> str:
    axes = axes_of(plan.shape, plan.strides, plan.pooled_size)
    if not axes.flat:
        return "scattered"
    neighbours = 1 in (plan.strides[1], axes.strides[2])
    return "aligned" if neighbours and _row_bytes(plan) >= SMALLEST_COPY else "odd"


def _suits_blas(student: Sequence[MapPlan], teacher: Sequence[MapPlan]) -> bool:
    """Whether maps, as they lie, and tiles of bf16 beside them have rows of whole 16 bytes.

    BLAS has its fast kernels for such operands alone.
    """
    slope_row = student[1].shape[1] * torch.bfloat16.itemsize
    return slope_row % 16 == 0 and all(
        _access_of_map(x) == "aligned" and _row_bytes(x) % 16 == 0 for x in (*student, *teacher)
    )


def _row_bytes(plan: MapPlan) -> int:
    """Of which all rows of a map are multiples."""
    axes = axes_of(plan.shape, plan.strides, plan.pooled_size)
    return unit_of(plan.strides, axes) * plan.dtype.itemsize
