"""The CPU backend: C++ kernels in csrc/cpu/ that evaluate the loss one sample at a time.

While a thread copies the maps of a sample to its cache, it pools them, widens half precision and
subtracts the teacher. If the processor multiplies bf16, maps of bf16 are multiplied as they are,
and residuals and Gram blocks are rounded to bf16 for the gradients. Positions that a mask leaves
out take no part in the products.

The torch backend computes FSP matrices, and what these kernels do not serve: ready matrices, which
come from there, fewer samples of all pairs than threads, and spatial axes that cannot be flattened.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fsp_kernels.backends.compiled import compiled_module
from fsp_kernels.backends.devices import cached_constant
from fsp_kernels.backends.tensors import (
    Slots,
    empty_gradients,
    in_memory,
    slots_of,
    tensors_at,
)
from fsp_kernels.backends.torch_backend import TorchBackend, pair_loss
from fsp_kernels.loss_plan import Limits, LossPlan, MapPlan, PairPlan, multiplied_dtypes
from fsp_kernels.plan import CPU_GRAM_FLOP_COST

MOST_PREPARED = 4096  # prepared losses that are kept; at the limit all are dropped
_SCALARS = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}


class CpuBackend(TorchBackend):
    """See :class:`fsp_kernels.backends.Backend` for what each method promises."""

    name = "cpu"

    def __init__(self) -> None:
        self.prepared: dict[tuple[LossPlan, int], _PreparedLoss] = {}

    def why_unavailable(self) -> str | None:
        return _why_unavailable()

    def why_unsupported(self, device: torch.device, dtypes: Sequence[torch.dtype]) -> str | None:
        if device.type != "cpu":
            return f"its kernels run on the CPU, not on {device.type}"
        if torch.float64 in dtypes:
            return "its kernels take fp32, fp16 and bf16, not fp64"
        return None

    def limits(
        self,
        device: torch.device,
        student: Sequence[MapPlan],
        teacher: Sequence[MapPlan],
        precision: str,
    ) -> Limits:
        if len(teacher) == 1:
            return super().limits(device, student, teacher, precision)
        bf16 = set(multiplied_dtypes(student, teacher)) == {torch.bfloat16}
        if bf16 and _multiplies_bf16():
            return Limits(
                evaluations=("samples",), exact_halves=True, bf16_forms=("matrix", "gram")
            )
        return Limits(evaluations=("samples",), gram_flop_cost=CPU_GRAM_FLOP_COST)

    def loss(
        self,
        maps: Sequence[Tensor],
        plan: LossPlan,
        weights: Sequence[float],
        masks: Sequence[Tensor] = (),
    ) -> tuple[Tensor, list[Tensor]]:
        gradients = empty_gradients(maps, plan)
        tensors = [*in_memory(maps), *gradients]
        threads = torch.get_num_threads()
        # A plan holds the strides of the maps, and those of the gradients follow from them.
        prepared = self.prepared.get((plan, threads))
        if prepared is None:
            if len(self.prepared) >= MOST_PREPARED:
                self.prepared.clear()
            prepared = self.prepared[plan, threads] = _PreparedLoss(plan, tensors, threads)
        losses = prepared(tensors, weights, masks)
        result = losses if plan.by_pair else sum(losses)
        return torch.tensor(result, dtype=torch.float32, device="cpu"), gradients


@cached_constant
def _why_unavailable() -> str | None:
    found = compiled_module("cpu")
    if isinstance(found, str):
        return found
    return None if found.instruction_sets else "its kernels need a processor with AVX2"


@cached_constant
def _multiplies_bf16() -> bool:
    module: Any = compiled_module("cpu")
    return bool(module.instruction_sets[0] == "avx512_bf16")


class _Kernels(NamedTuple):
    """The pairs of a plan that the kernels evaluate."""

    pairs: list[int]
    # (addresses of the pairs' tensors and masks, a factor for each pair, threads) -> their losses
    run: Callable[[Sequence[int], Sequence[float], int], list[float]]


class _PreparedLoss:
    """A planned loss: which pairs the kernels evaluate, and these as the kernels take them."""

    def __init__(self, plan: LossPlan, tensors: Sequence[Tensor], threads: int):
        self._plan, self._threads = plan, threads
        self._slots = slots_of(plan)
        self._mask_slots = [pair.masks for pair in plan.pairs]
        by_kernels = [
            i
            for i, (pair, slots) in enumerate(zip(plan.pairs, self._slots, strict=True))
            if pair.evaluation == "samples" and _all_flat(slots, tensors)
        ]
        if _leave_threads_idle([plan.pairs[i] for i in by_kernels], threads):
            by_kernels = []
        self._by_torch = [i for i in range(len(plan.pairs)) if i not in by_kernels]
        self._kernels = self._describe(by_kernels, tensors) if by_kernels else None

    def __call__(
        self, tensors: Sequence[Tensor], weights: Sequence[float], masks: Sequence[Tensor]
    ) -> list[float]:
        """The loss of each pair. ``tensors`` are all maps, then all wanted gradients."""
        losses = [0.0] * len(weights)
        if self._kernels is not None:
            found = self._run(self._kernels, tensors, weights, masks)
            for i, loss in zip(self._kernels.pairs, found, strict=True):
                losses[i] = loss
        for i in self._by_torch:
            pair, slots = self._plan.pairs[i], self._slots[i]
            maps = [x for x in tensors_at(slots[:4], tensors) if x is not None]
            gradients = tensors_at(slots[4 : 4 + len(maps)], tensors)
            losses[i] = pair_loss(maps, gradients, pair, self._plan, weights[i], masks).item()
        return losses

    def _run(
        self,
        kernels: _Kernels,
        tensors: Sequence[Tensor],
        weights: Sequence[float],
        masks: Sequence[Tensor],
    ) -> list[float]:
        own: list[Tensor | None] = []
        for i in kernels.pairs:
            own += tensors_at(self._slots[i], tensors)
            own += tensors_at(self._mask_slots[i], masks)
        addresses = [0 if x is None else x.data_ptr() for x in own]
        factors = [weights[i] / self._plan.pairs[i].divisor for i in kernels.pairs]
        return kernels.run(addresses, factors, self._threads)

    def _describe(self, pairs: list[int], tensors: Sequence[Tensor]) -> _Kernels:
        module: Any = compiled_module("cpu")
        described = [
            _described(module, self._plan.pairs[i], tensors_at(self._slots[i], tensors))
            for i in pairs
        ]
        return _Kernels(pairs, module.Loss(described, module.instruction_sets[0]))


def _leave_threads_idle(pairs: Sequence[PairPlan], threads: int) -> bool:
    """Whether so many threads have no sample that PyTorch, which uses them all, is faster.

    The kernels for bf16 are faster on half of the threads than PyTorch's products of fp32 on all.
    """
    busy = sum(pair.batch * (2 if pair.bf16_products else 1) for pair in pairs)
    return busy < threads


def _all_flat(slots: Slots, tensors: Sequence[Tensor]) -> bool:
    """Whether the maps and gradients of a pair can be viewed as ``(B, C, K)``."""
    own = [x for x in tensors_at(slots, tensors) if x is not None]
    return all(x.flatten(2).data_ptr() == x.data_ptr() for x in own)


def _described(module: Any, pair: PairPlan, tensors: Sequence[Tensor | None]) -> Any:
    """A pair as the kernels take it, without addresses."""
    layouts = [
        None if x is None else (x.flatten(2).stride(), getattr(module.Scalar, _SCALARS[x.dtype]))
        for x in tensors
    ]
    return module.Pair(
        maps=layouts[:4],
        gradients=layouts[4:],
        poolings=[_pooling(plan) for plan in pair.maps],
        batch=pair.batch,
        channels=pair.channels,
        positions=(pair.positions, pair.teacher[0].positions),
        residual=getattr(module.Residual, pair.residual),
        norm=module.Norm.column if pair.norm == "column" else module.Norm.squares,
        form=getattr(module.Form, pair.form),
        symmetric=pair.symmetric,
        bf16_products=pair.bf16_products,
    )


def _pooling(plan: MapPlan) -> tuple[list[int], list[int], bool] | None:
    """The spatial size of a map, the size that it is pooled to, each of three axes, and how."""
    if plan.pooled_size is None:
        return None
    missing = [1] * (3 - len(plan.pooled_size))
    return [*missing, *plan.shape[2:]], [*missing, *plan.pooled_size], plan.pool == "avg"
