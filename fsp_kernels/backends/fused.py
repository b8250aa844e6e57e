"""The part of a backend that the Triton and the CUDA backend share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from fsp_kernels.backends.devices import on_device
from fsp_kernels.backends.tensors import counts, empty_gradients, in_memory, pool_maps
from fsp_kernels.loss_plan import LossPlan, Scaling


class PreparedLoss(Protocol):
    """The launches of a plan on a device, prepared once and used by every call."""

    def __call__(self, tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
        """Compute the loss.

        ``tensors`` are all maps, then all wanted gradients, which it fills, then what
        :func:`fsp_kernels.backends.tensors.mask_slots_of` says.
        """


class FusedBackend:
    """See :class:`fsp_kernels.backends.Backend` for what each method promises."""

    most_prepared = 4096  # prepared losses that are kept; at the limit all are dropped

    def __init__(self) -> None:
        self.prepared: dict[tuple[LossPlan, int], PreparedLoss] = {}

    transposes = False
    mask_dtype = torch.bool  # in which kernels read a mask

    on_cpu: str  # where kernels run on the CPU: why they do not serve tensors of a GPU

    @property
    def automatic(self) -> bool:
        """False where its kernels run on the CPU, which is for tests and debugging."""
        raise NotImplementedError

    def why_not_on(self, device: torch.device) -> str | None:
        """``None`` if its kernels run on this NVIDIA GPU, else why not."""
        raise NotImplementedError

    def why_unsupported(self, device: torch.device, dtypes: Sequence[torch.dtype]) -> str | None:
        if torch.float64 in dtypes:
            return "its kernels take fp32, fp16 and bf16, not fp64"
        if not self.automatic:
            return None if device.type == "cpu" else self.on_cpu
        if device.type != "cuda":
            return f"its kernels run on NVIDIA GPUs, not on {device.type}"
        return self.why_not_on(device)

    def prepare(self, plan: LossPlan, tensors: Sequence[Tensor]) -> PreparedLoss:
        """Prepare the launches of a plan for tensors with these strides."""
        raise NotImplementedError

    def loss(
        self,
        maps: Sequence[Tensor],
        plan: LossPlan,
        weights: Sequence[float],
        masks: Sequence[Tensor] = (),
    ) -> tuple[Tensor, list[Tensor]]:
        device = maps[0].get_device()
        if device >= 0 and device != torch._C._cuda_getDevice():
            with torch.cuda.device(device):
                return self.loss(maps, plan, weights, masks)
        gradients = empty_gradients(maps, plan)
        tensors = [*in_memory(maps), *gradients]
        if masks:
            tensors += [x.to(self.mask_dtype) for x in masks]
            tensors += map(counts, masks)
        pooled = pool_maps(tensors, plan, plan.pooled_before) if plan.pooled_before else []
        # A plan holds the strides of the maps, and those of the gradients follow from them.
        prepared = self.prepared.get((plan, device))
        if prepared is None:
            if len(self.prepared) >= self.most_prepared:
                self.prepared.clear()
            prepared = self.prepared[plan, device] = self.prepare(plan, tensors)
        result = prepared(tensors, weights)
        for x in pooled:
            x.unpool()
        if plan.doubled:
            torch._foreach_mul_([gradients[i] for i in plan.doubled], 2.0)
        return result, gradients

    def scale(
        self, gradients: list[Tensor], scaling: Scaling, factor: Tensor, in_place: bool
    ) -> list[Tensor]:
        scaled = gradients
        if not in_place or scaling.held != scaling.dtypes:
            scaled = [
                g if in_place and g.dtype == dtype else torch.empty_like(g, dtype=dtype)
                for g, dtype in zip(gradients, scaling.dtypes, strict=True)
            ]
        factor = factor.contiguous()
        on_device(factor, self.scale_into, scaled, gradients, scaling, factor, in_place)
        return scaled

    def scale_into(
        self,
        scaled: Sequence[Tensor],
        gradients: Sequence[Tensor],
        scaling: Scaling,
        factor: Tensor,
        in_place: bool,
    ) -> None:
        """Write ``gradients * factor`` to ``scaled``. Their device is the current one.

        ``factor`` is contiguous.

        With ``in_place`` a tensor may be in both lists. If the factor is 1 it may be skipped.
        """
        raise NotImplementedError

    def product(self, x: Tensor, y: Tensor, out: Tensor, positions: int) -> None:
        """``out = x @ y / positions``: ``(B, M, R), (B, R, N) -> (B, M, N)``."""
        raise NotImplementedError

    def matrix(self, first: Tensor, second: Tensor) -> Tensor:
        dtype = torch.promote_types(first.dtype, second.dtype)
        out = first.new_empty(first.shape[0], first.shape[1], second.shape[1], dtype=dtype)
        self.product(first.resolve_neg(), second.resolve_neg().mT, out, first.shape[2])
        return out

    def matrix_backward(self, gradient: Tensor, other: Tensor, channels_last: bool) -> Tensor:
        dtype = torch.promote_types(gradient.dtype, other.dtype)
        batch, channels, positions = gradient.shape[0], gradient.shape[1], other.shape[2]
        if channels_last:
            out = gradient.new_empty(batch, positions, channels, dtype=dtype).mT
        else:
            out = gradient.new_empty(batch, channels, positions, dtype=dtype)
        self.product(gradient.resolve_neg(), other.resolve_neg(), out, positions)
        return out
