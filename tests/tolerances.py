"""How close is close: one table, and the float64 oracle that results are held to with it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fsp_kernels import reference


class Tolerance(NamedTuple):
    """``|error| <= rtol |expected| + atol scale``, ``scale`` that of the terms that were summed."""

    rtol: float
    atol: float
    reason: str


TOLERANCES = {
    torch.float64: Tolerance(1e-13, 1e-13, "unit roundoff 1.1e-16, sums of up to 1e3 terms"),
    torch.float32: Tolerance(1e-6, 1e-6, "unit roundoff 6e-8, sums of up to 1e3 terms"),
    torch.float16: Tolerance(6e-4, 1e-6, "an fp32 result rounded once, unit roundoff 4.9e-4"),
    torch.bfloat16: Tolerance(4e-3, 1e-6, "an fp32 result rounded once, unit roundoff 3.9e-3"),
}


def assert_close(actual: Tensor, expected: Tensor, scale: float | None = None) -> None:
    """Hold ``actual`` to the float64 ``expected`` by the row of its own dtype.

    ``scale`` is the size of what was summed before anything cancelled; by default, that of the
    largest expected element.
    """
    assert actual.shape == expected.shape
    row, info = TOLERANCES[actual.dtype], torch.finfo(actual.dtype)
    scale = expected.abs().max().item() if scale is None else scale
    smallest = info.tiny * info.eps  # nothing below it can be told from zero
    error = (actual.double() - expected).abs()
    excess = error - (row.rtol * expected.abs() + row.atol * scale + smallest)
    assert not actual.isnan().any()
    assert excess.max() <= 0, (
        f"{actual.dtype}: error {error.max():.3e} of a value of scale {scale:.3e}, {row.reason}"
    )


class Oracle(NamedTuple):
    """A loss in float64: its value, the gradient of each map, and the scale of each."""

    loss: Tensor
    gradients: list[Tensor]  # pair by pair, student before teacher
    loss_scale: float
    gradient_scales: list[float]

    def check(self, loss: Tensor, gradients: Sequence[Tensor | None]) -> None:
        """Hold a loss and the gradients there are to this."""
        assert_close(loss, self.loss, self.loss_scale)
        rows = zip(gradients, self.gradients, self.gradient_scales, strict=True)
        for gradient, expected, scale in rows:
            if gradient is not None:
                assert_close(gradient, expected, scale)


def flatten(student: Sequence, teacher: Sequence) -> list[Tensor]:
    """The tensors of a loss, pair by pair, student before teacher."""
    tensors: list[Tensor] = []
    for pair, entry in zip(student, teacher, strict=True):
        tensors += [*pair, entry] if isinstance(entry, Tensor) else [*pair, *entry]
    return tensors


def unflatten(tensors: Sequence[Tensor], teacher: Sequence) -> tuple[list, list]:
    """The inverse of :func:`flatten`; ``teacher`` tells which entries are ready matrices."""
    remaining = iter(tensors)
    student, entries = [], []
    for entry in teacher:
        student.append((next(remaining), next(remaining)))
        ready = isinstance(entry, Tensor)
        entries.append(next(remaining) if ready else (next(remaining), next(remaining)))
    return student, entries


def oracle(
    student: Sequence,
    teacher: Sequence,
    weights: Sequence[float] | None = None,
    pool: str = "max",
    norm: str = "frobenius",
) -> Oracle:
    """The definition in float64, every tensor taken for a separate variable."""
    exact = [x.detach().double().requires_grad_() for x in flatten(student, teacher)]
    sizes = [x.detach().double().abs().requires_grad_() for x in exact]
    weights = [1.0] * len(student) if weights is None else weights
    loss = reference.fsp_loss(*unflatten(exact, teacher), weights, pool, norm)
    # The same with nothing cancelling: residuals of absolute values, added.
    bound = loss.new_zeros(())
    pairs = zip(*unflatten(exact, teacher), *unflatten(sizes, teacher), weights, strict=True)
    for pair, entry, pair_sizes, entry_sizes, weight in pairs:
        total = _matrix(pair_sizes, pool) + _matrix(entry_sizes, pool)
        term = reference.residual_norm(total, norm)
        if norm == "column":  # a direction is as uncertain as its column is short
            length = (_matrix(pair, pool) - _matrix(entry, pool)).norm(dim=1)
            columns = total.norm(dim=1)
            term = (columns * (columns / length.clamp_min(1e-300)).detach()).sum(dim=1).mean()
        bound = bound + weight * term
    gradients = torch.autograd.grad(loss, exact)
    scales = torch.autograd.grad(bound, sizes)
    return Oracle(
        loss.detach(), list(gradients), bound.item(), [g.abs().max().item() for g in scales]
    )


def _matrix(entry: Tensor | tuple[Tensor, Tensor], pool: str) -> Tensor:
    return entry if isinstance(entry, Tensor) else reference.fsp_matrix(*entry, pool=pool)
