"""How close is close: one table, and the float64 oracle that results are held to with it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fsp_kernels import reference
from fsp_kernels.backends.devices import fp32_precision
from fsp_kernels.loss_plan import LossPlan, PairPlan
from fsp_kernels.plan import HALF


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

# Where a CPU multiplies bf16. In norms its errors are as those of fused kernels, below.
BF16_PRODUCTS = Tolerance(2.0**-7, 2.0**-7, "differences and residuals rounded to bf16, 2^-8 each")


def row_of(plan: LossPlan) -> Tolerance | None:
    """The row for all results of a plan, or ``None`` if their dtypes have theirs."""
    return BF16_PRODUCTS if any(pair.bf16_products for pair in plan.pairs) else None


# A loss that cancels has no relative error, so these are bounds of another kind: the residual of a
# sample that is computed in difference form is off by `eps (||a - c|| ||b|| + ||c|| ||b - d||) / K`
# at most, `eps` the rounding error below, whatever the two FSP matrices are. That is much smaller
# than the naive op's error where the student's maps are near the teacher's. It is larger, by r,
# where the maps of the two networks differ by r in scale and their matrices do not. Averages of
# pooling are rounded before they are subtracted, which adds `eps (||a|| ||b|| + ||c|| ||d||) / K`.
RESIDUAL_EPS = {
    torch.bfloat16: (2.0**-8, "differences rounded to bf16, where a CPU multiplies bf16"),
    torch.float32: (2.0**-22, "unit roundoff 2^-24, or three TF32 products, 2^-22"),
    torch.float64: (2.0**-51, "unit roundoff 2^-53"),
}
# From such an error `e` of a residual `D` follows one of `2 ||D|| e + e^2` of the loss. That holds
# for the Gram form of the torch backend on a CPU too, which accumulates in fp64, unless the maps
# are fp64 themselves. Elsewhere the terms of the Gram form are rounded before they cancel: its loss
# is off by the `eps` below times the square of `(||a - c|| ||b|| + ||c|| ||b - d||) / K`.
# No form gives a loss below zero.
GRAM_EPS = {
    torch.float32: (2.0**-20, "products in 3xTF32, 2^-22, cut off and not rounded"),
    torch.float16: (2.0**-9, "differences and products in TF32, 2^-11 each"),
    torch.bfloat16: (2.0**-9, "differences and products in TF32, 2^-11 each"),
}


def residual_terms(
    student: tuple[Tensor, Tensor], teacher: tuple[Tensor, Tensor], pool: str = "max"
) -> Tensor:
    """What the bound above multiplies by ``eps``, of each sample, in float64."""
    exact = [[x.detach().double() for x in pair] for pair in (student, teacher)]
    pooled = [reference.match_spatial(*pair, pool) for pair in exact]
    a, b, c, d = (x.flatten(2) for pair in pooled for x in pair)

    def size(x: Tensor) -> Tensor:
        return x.flatten(1).norm(dim=1)

    terms = size(a - c) * size(b) + size(c) * size(b - d)
    if pool == "avg" and any(pair[0].shape[2:] != pair[1].shape[2:] for pair in exact):
        terms += size(a) * size(b) + size(c) * size(d)
    return terms / a.shape[2]


class Fused(NamedTuple):
    """Bounds of the relative error of the loss and of a gradient."""

    loss: float
    gradient: float
    reason: str


# What backends with fused kernels state, of ``|error| / |expected|`` in norms over a whole tensor:
# a single element of a thousand that is wrong shows as 3e-2. By the form of the evaluation and the
# dtype of a map, which its gradient has too. Beside half-precision maps the two products of a
# residual have one rounded operand each, and the loss is its square: 4 times the unit roundoff.
FUSED = {
    ("matrix", torch.float32): Fused(
        1e-5, 1e-5, "products in 3xTF32, 2^-22; tensor cores cut their sums off instead of rounding"
    ),
    ("matrix", torch.bfloat16): Fused(
        2.0**-6,
        5e-3,
        "differences, residual and gradient rounded to bf16, 2^-8 at most and 2e-3 on average each",
    ),
    ("matrix", torch.float16): Fused(
        2.0**-9,
        1e-3,
        "differences and gradient rounded to fp16, the residual to TF32: 2^-11 at most each",
    ),
    ("gram", torch.float32): Fused(1e-5, 1e-5, "as in matrix form"),
    ("gram", torch.bfloat16): Fused(
        1e-3, 5e-3, "differences and blocks rounded to TF32, 2^-11 each; the gradient to bf16, 2^-8"
    ),
    ("gram", torch.float16): Fused(
        1e-3,
        2e-3,
        "differences and blocks rounded to TF32, 2^-11 each; the gradient to fp16, 2^-11",
    ),
}
# Where a CPU multiplies bf16, unlike in ("gram", torch.bfloat16) above.
FUSED_BF16_BLOCKS = Fused(
    2.0**-6, 1e-2, "differences, blocks and gradient rounded to bf16, 2^-8 at most each"
)
# fp32 maps while ``torch.get_float32_matmul_precision()`` is not "highest".
FUSED_TF32 = Fused(5e-3, 5e-3, "each operand of each product rounded or cut to TF32, 2^-10")


def fused_bounds(pair: PairPlan, own: torch.dtype) -> Fused:
    """The row for a gradient of dtype ``own``, and for the loss, of one pair."""
    dtypes = {plan.dtype for plan in pair.maps}
    # Products of maps are exact; only differences of half-precision maps are rounded.
    exact = pair.form == "matrix" and not (pair.residual == "difference" and pair.halves)
    kinds = {torch.float32} if exact else dtypes
    if pair.bf16_products and pair.form == "gram":
        return FUSED_BF16_BLOCKS
    loss = max(FUSED[pair.form, dtype].loss for dtype in kinds)
    # A residual beside half-precision maps is rounded to TF32 for their sake, as it is for fp16.
    gradient = FUSED[pair.form, own].gradient
    if dtypes.intersection(HALF):
        gradient = max(gradient, FUSED[pair.form, torch.float16].gradient)
    if not dtypes.issubset(HALF) and fp32_precision() == "tf32":
        return FUSED_TF32._replace(gradient=max(gradient, FUSED_TF32.gradient))
    return Fused(loss, gradient, FUSED[pair.form, own].reason)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """``|actual - expected| / |expected|`` in norms; 0 where both are zero."""
    error = (actual.double() - expected).norm().item()
    return error / expected.norm().item() if error else 0.0


def assert_near(actual: Tensor, expected: Tensor, bound: float, reason: str) -> None:
    """Hold the norm of the error to ``bound`` times that of the float64 ``expected``."""
    assert actual.shape == expected.shape
    assert not actual.isnan().any()
    error = (actual.double() - expected).norm().item()
    size = expected.norm().item()
    assert error <= bound * size, f"error {error:.3e} of {size:.3e}, {actual.dtype}: {reason}"


def assert_close(
    actual: Tensor, expected: Tensor, scale: float | None = None, row: Tolerance | None = None
) -> None:
    """Hold ``actual`` to the float64 ``expected`` by a row, by default that of its own dtype.

    ``scale`` is the size of what was summed before anything cancelled; by default, that of the
    largest expected element.
    """
    assert actual.shape == expected.shape
    row, info = row or TOLERANCES[actual.dtype], torch.finfo(actual.dtype)
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

    def check(
        self, loss: Tensor, gradients: Sequence[Tensor | None], plan: LossPlan | None = None
    ) -> None:
        """Hold a loss and the gradients there are to this.

        ``plan`` is needed where a processor may multiply bf16.
        """
        row = None if plan is None else row_of(plan)
        assert_close(loss, self.loss, self.loss_scale, row)
        rows = zip(gradients, self.gradients, self.gradient_scales, strict=True)
        for gradient, expected, scale in rows:
            if gradient is not None:
                assert_close(gradient, expected, scale, row)

    def check_fused(self, plan: LossPlan, loss: Tensor, gradients: Sequence[Tensor | None]) -> None:
        """Hold what fused kernels computed by a plan to this, in norms over whole tensors."""
        pairs = [(pair, planned) for pair in plan.pairs for planned in pair.maps]
        bounds = [fused_bounds(pair, planned.dtype) for pair, planned in pairs]
        assert_near(loss, self.loss, max(b.loss for b in bounds), "the loss")
        for gradient, expected, bound in zip(gradients, self.gradients, bounds, strict=True):
            if gradient is not None:
                assert_near(gradient, expected, bound.gradient, bound.reason)


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
    student_mask: Tensor | None = None,
    teacher_mask: Tensor | None = None,
) -> Oracle:
    """The definition in float64, every tensor taken for a separate variable."""
    masks = {"student_mask": student_mask, "teacher_mask": teacher_mask}
    exact = [x.detach().double().requires_grad_() for x in flatten(student, teacher)]
    sizes = [x.detach().double().abs().requires_grad_() for x in exact]
    weights = [1.0] * len(student) if weights is None else weights
    loss = reference.fsp_loss(*unflatten(exact, teacher), weights, pool, norm, **masks)
    # The same with nothing cancelling: residuals of absolute values, added.
    bound = loss.new_zeros(())
    pairs = zip(*unflatten(exact, teacher), *unflatten(sizes, teacher), weights, strict=True)
    for pair, entry, pair_sizes, entry_sizes, weight in pairs:
        total = _matrix(pair_sizes, pool, student_mask) + _matrix(entry_sizes, pool, teacher_mask)
        term = reference.residual_norm(total, norm)
        if norm == "column":  # a direction is as uncertain as its column is short
            residual = _matrix(pair, pool, student_mask) - _matrix(entry, pool, teacher_mask)
            length = residual.norm(dim=1)
            columns = total.norm(dim=1)
            term = (columns * (columns / length.clamp_min(1e-300)).detach()).sum(dim=1).mean()
        bound = bound + weight * term
    gradients = torch.autograd.grad(loss, exact)
    scales = torch.autograd.grad(bound, sizes)
    return Oracle(
        loss.detach(), list(gradients), bound.item(), [g.abs().max().item() for g in scales]
    )


def _matrix(entry: Tensor | tuple[Tensor, Tensor], pool: str, mask: Tensor | None = None) -> Tensor:
    if isinstance(entry, Tensor):
        return entry
    return reference.fsp_matrix(*entry, pool=pool, mask=mask)
