"""The CUDA C++ backend: NVIDIA GPUs from Turing on, without Triton; kernels and launches in csrc/.

    extension.py    the compiled module, or why there is none
    maps.py         what kernels are told of a map
    product.py      FSP matrices and their derivatives
    entries.py      what kernels are told of a pair
    loss.py         what is launched for a plan

The module knows nothing of PyTorch: it is told addresses, sizes, strides and the stream. Launches
are prepared once for all shapes and strides of a call, which then brings addresses and weights.
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
    on_cpu = "it is built for the host: it serves the CPU"

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
        precision: str,  # noqa: ARG002  (kernels for one product and for three have the same tiles)
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
            (g.data_ptr(), out.data_ptr(), *size_and_dtypes)
            for g, out, size_and_dtypes in zip(
                gradients, scaled, _sizes_and_dtypes(kernels, scaling), strict=True
            )
        ]
        stream = raw_stream(factor.device)
        kernels.scale(index_of(factor), stream, described, factor.data_ptr(), in_place)


@lru_cache(maxsize=1024)
def _sizes_and_dtypes(kernels: Any, scaling: Scaling) -> list[tuple[int, Any, Any]]:  # noqa: ARG001
    """What a module's kernels are told of gradients beside their addresses."""
    held, wanted = (map(scalar_of, dtypes) for dtypes in (scaling.held, scaling.dtypes))
    return list(zip(scaling.sizes, held, wanted, strict=True))
