"""What the kernels of csrc/ allow for a pair: which of them fit the device's shared memory."""

from __future__ import annotations

from collections.abc import Sequence

from fsp_kernels.backends.cuda.extension import module, scalar_of
from fsp_kernels.backends.cuda.maps import operand_of
from fsp_kernels.loss_plan import Limits, MapPlan, multiplied_dtypes
from fsp_kernels.plan import GPU_GRAM_POSITIONS


def limits_of(student: Sequence[MapPlan], teacher: Sequence[MapPlan], device: int) -> Limits:
    """See :meth:`fsp_kernels.backends.Backend.limits`; ``device`` is the device's number."""
    kernels, operand = module(), operand_of(multiplied_dtypes(student, teacher))
    scalar = scalar_of(operand)
    fitting = [t for t in (32, 64, 128) if kernels.one_pass_tile(device, scalar, t) == t]
    # Tiles of 32 and of 64 channels share a kernel; tiles of 128 have their own.
    wide = max(plan.shape[1] for plan in student) > 64
    gram = kernels.gram_fits(device, GPU_GRAM_POSITIONS)
    return Limits(
        evaluations=("one pass", "tiles"),
        one_pass=max(fitting, default=0),
        gram_positions=GPU_GRAM_POSITIONS if gram else 0,
        bf16_slopes=True,
        kernels={"one pass": (operand, wide), "tiles": operand},
        launch_pairs=kernels.most_pairs,
        launch_products=kernels.most_products,
    )
