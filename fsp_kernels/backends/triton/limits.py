"""What the configurations allow for a pair: which rows the table has for its maps."""

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
from fsp_kernels.backends.triton.maps import has_inner_channels, unit_of
from fsp_kernels.loss_plan import Evaluation, Limits, MapPlan, multiplied_dtypes
from fsp_kernels.plan import HALF

SMALLEST_COPY = 4  # bytes: the smallest copy to shared memory that runs while a GPU computes
# From this many parts of the positions on, tiles in parts are faster than one pass. It is less for
# fp32, where one pass takes longer for each position. The values for "half" and "tf32x3" were
# predicted from the machine code, not measured. The value for "tf32" was not even predicted.
ONE_PASS_PARTS = {"half": 16, "tf32": 3, "tf32x3": 3}
# The most pairs of a launch. A kernel has code for each pair, so more take longer to compile.
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
        # All pairs of a launch get as many warps as the pair that needs most.
        kernels={name: c and c.warps for name, c in configured.items()},
        launch_pairs=MOST_PAIRS,
        launch_products=4 * MOST_PAIRS,
    )


def kind_of(student: Sequence[MapPlan], teacher: Sequence[MapPlan], precision: str) -> str:
    """The kind of a pair's products, one of ``configurations.KINDS``."""
    halves = all(dtype in HALF for dtype in multiplied_dtypes(student, teacher))
    return "half" if halves else precision


def access_of(student: Sequence[MapPlan], teacher: Sequence[MapPlan]) -> str:
    """How a pair is read, one of ``configurations.ACCESSES``: the slowest among its maps."""
    maps = [*student, *teacher] if len(teacher) == 2 else student
    return max((_access_of_map(x.read) for x in maps), key=ACCESSES.index)


def _access_of_map(plan: MapPlan) -> str:
    axes = axes_of(plan.shape, plan.strides, plan.pooled_size)
    if not axes.flat:
        return "scattered"
    if plan.mask is not None and not has_inner_channels(plan.strides, axes):
        return "odd"
    neighbours = 1 in (plan.strides[1], axes.strides[2])
    return "aligned" if neighbours and _row_bytes(plan) >= SMALLEST_COPY else "odd"


def _suits_blas(student: Sequence[MapPlan], teacher: Sequence[MapPlan]) -> bool:
    """Whether the rows of the maps, and of bf16 tiles of the residual, are multiples of 16 bytes.

    BLAS has fast kernels only for such operands.
    """
    slope_row = student[1].shape[1] * torch.bfloat16.itemsize
    return slope_row % 16 == 0 and all(
        _access_of_map(x) == "aligned" and _row_bytes(x) % 16 == 0 for x in (*student, *teacher)
    )


def _row_bytes(plan: MapPlan) -> int:
    """A number of bytes that divides the starts and lengths of all rows of a map."""
    axes = axes_of(plan.shape, plan.strides, plan.pooled_size)
    return unit_of(plan.strides, axes) * plan.dtype.itemsize
