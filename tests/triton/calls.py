"""Calls that take each of the kernels' roads, and what every result of one is held to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from layouts import LAYOUTS
from tolerances import flatten, oracle

import fsp_kernels as fsp

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16
DTYPES = (FP32, FP16, BF16)
NORMS = ("frobenius", "mse", "column")
POOLS = ("max", "avg")


class Regime(NamedTuple):
    """Shapes that are evaluated in one way under the limits of the fixture ``small``.

    None is a multiple of a tile; positions take more than one, except in Gram form, where they fit.
    """

    channels: tuple[int, int]
    size: tuple[int, ...]
    evaluation: str
    form: str = "matrix"
    parts: int = 1
    dtype: torch.dtype = FP32  # one in which it is evaluated so

    def of(self, *dtypes: torch.dtype, norm: str = "frobenius") -> Regime:
        """How these shapes are evaluated for maps of such dtypes, and by a norm."""
        if norm == "column" and self.form == "gram":  # it needs the columns of the residual
            return self._replace(evaluation="tiles", form="matrix")
        if self.evaluation == "recomputed tiles" and (norm == "column" or FP32 in dtypes):
            return self._replace(evaluation="tiles")
        return self


REGIMES = {
    "one pass": Regime((7, 13), (6, 3), "one pass"),
    "gram": Regime((20, 17), (1, 3), "one pass", form="gram"),
    "tiles": Regime((17, 20), (6, 3), "tiles"),
    "tiles in parts": Regime((20, 15), (5, 9), "tiles", parts=2),
    "recomputed tiles": Regime((20, 17), (3, 3), "recomputed tiles", dtype=BF16),
}
MATRIX = {name: regime for name, regime in REGIMES.items() if regime.form == "matrix"}


def tensor(*shape: int, dtype=FP32, layout="contiguous", grad=True) -> torch.Tensor:
    x = torch.randn(shape, dtype=torch.float64).to(DEVICE, dtype)
    return LAYOUTS[layout](x).requires_grad_(grad)


def pair_of(
    regime: Regime, batch: int = 1, size: Sequence[int] | None = None, dtypes=None, **options
) -> tuple[torch.Tensor, torch.Tensor]:
    size = regime.size if size is None else size
    dtypes = (regime.dtype, regime.dtype) if dtypes is None else dtypes
    first, second = (
        tensor(batch, channels, *size, dtype=dtype, **options)
        for channels, dtype in zip(regime.channels, dtypes, strict=True)
    )
    return first, second


def four_of(regime: Regime, **options) -> tuple[list, list]:
    """A call of one pair: ``[(a, b)], [(c, d)]``."""
    return [pair_of(regime, **options)], [pair_of(regime, **options)]


def gradients_of(loss: torch.Tensor, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor | None]:
    """Of each tensor that wants one, ``None`` for the others."""
    wanted = [x for x in tensors if x.requires_grad]
    found = iter(torch.autograd.grad(loss, wanted) if wanted else ())
    return [next(found) if x.requires_grad else None for x in tensors]


def run(student, teacher, **options) -> list[torch.Tensor]:
    """Loss and all gradients there are, by the Triton backend."""
    loss = fsp.fsp_loss(student, teacher, backend="triton", **options)
    gradients = gradients_of(loss, flatten(student, teacher))
    return [loss, *(g for g in gradients if g is not None)]


def check(student, teacher, *regimes: Regime, weights=None, **options) -> fsp.LossPlan:
    """The loss and its gradients are those of the definition, and each pair was evaluated as said.

    Returns the plan.
    """
    plan = fsp.explain(student, teacher, backend="triton", **options)
    ways = [(pair.evaluation, pair.form, pair.parts) for pair in plan.pairs]
    assert ways == [(r.evaluation, r.form, r.parts) for r in regimes]
    loss = fsp.fsp_loss(student, teacher, backend="triton", weights=weights, **options)
    assert (loss.dtype, loss.shape) == (FP32, ())
    tensors = flatten(student, teacher)
    gradients = gradients_of(loss, tensors)
    expected = oracle(student, teacher, weights, **options)
    expected.check_fused(plan, loss, gradients)
    for x, gradient in zip(tensors, gradients, strict=True):
        if gradient is not None:
            assert gradient.dtype == x.dtype
            assert gradient.stride() == torch.empty_like(x).stride()
    return plan
