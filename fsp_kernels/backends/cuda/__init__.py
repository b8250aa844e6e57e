"""The CUDA C++ backend, for NVIDIA GPUs from Turing on, without Triton. Its kernels are in csrc/.

    extension.py    the compiled module, or why it is missing
    maps.py         kernel arguments from a map and its strides
    entries.py      kernel arguments from a planned pair and its strides
    limits.py       what the kernels allow for a pair, for the planner
    loss.py         prepare and run the launches of a plan
    product.py      FSP matrices and their derivatives

The compiled module does not use PyTorch: it takes addresses, sizes, strides and a stream. Launches
are prepared once for the shapes and strides of a call. A call then passes addresses and weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from fsp_kernels.backends.cuda import loss
from fsp_kernels.backends.cuda.extension import (
    index_of,
    module,
    on_host,
    scalar_of,
    why_not_on,
    why_unavailable,
)
from fsp_kernels.backends.cuda.limits import limits_of
from fsp_kernels.backends.cuda.product import batched_product
from fsp_kernels.backends.devices import on_device, raw_stream
from fsp_kernels.backends.fused import FusedBackend, PreparedLoss
from fsp_kernels.loss_plan import Limits, LossPlan, MapPlan, Scaling


class CudaBackend(FusedBackend):
    """See :class:`fsp_kernels.backends.Backend` for what each method promises."""

    name = "cuda"
    on_cpu = "it is built for the host, so its kernels run only on the CPU"

    @property
    def automatic(self) -> bool:
        return not on_host()

    def why_unavailable(self) -> str | None:
        return why_unavailable()

    def why_not_on(self, device: torch.device) -> str | None:
        return why_not_on(torch.cuda.current_device() if device.index is None else device.index)

    def limits(
        self,
        device: torch.device,
        student: Sequence[MapPlan],
        teacher: Sequence[MapPlan],
        precision: str,  # noqa: ARG002  (tiles are the same for one product and for three)
    ) -> Limits:
        return limits_of(student, teacher, device.index or 0)

    def product(self, x: Tensor, y: Tensor, out: Tensor, positions: int) -> None:
        on_device(x, batched_product, x, y, out, positions)

    def prepare(self, plan: LossPlan, tensors: Sequence[Tensor]) -> PreparedLoss:
        return loss.PreparedLoss(plan, tensors)

    def scale_into(
        self,
        scaled: Sequence[Tensor],
        gradients: Sequence[Tensor],
        scaling: Scaling,
        factor: Tensor,
        in_place: bool,
    ) -> None:
        kernels = module()
        described = [
            (g.data_ptr(), out.data_ptr(), *rest)
            for g, out, rest in zip(gradients, scaled, _described(kernels, scaling), strict=True)
        ]
        stream = raw_stream(factor.device)
        kernels.scale(index_of(factor), stream, described, factor.data_ptr(), in_place)


@lru_cache(maxsize=1024)
def _described(kernels: Any, scaling: Scaling) -> list[tuple[int, Any, Any, int]]:  # noqa: ARG001
    """For each gradient: elements, dtype it is held in, dtype wanted, place of its factor."""
    held, wanted = (map(scalar_of, dtypes) for dtypes in (scaling.held, scaling.dtypes))
    return list(zip(scaling.sizes, held, wanted, scaling.factors, strict=True))
