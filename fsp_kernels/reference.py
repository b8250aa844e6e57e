"""The definition of matrix and loss, written literally. Tests and benchmarks compare with it.

Source: Yim, Joo, Bae, Kim, "A Gift from Knowledge Distillation: Fast Optimization, Network
Minimization and Transfer Learning", CVPR 2017, equations 1 and 2.

Nothing here is optimised. Every function takes any floating dtype (use ``float64`` for exact
references) and maps of rank 3 to 5, and is differentiable any number of times.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

_ADAPTIVE_POOL: dict[tuple[str, int], Callable[..., Tensor]] = {
    ("max", 1): F.adaptive_max_pool1d,
    ("max", 2): F.adaptive_max_pool2d,
    ("max", 3): F.adaptive_max_pool3d,
    ("avg", 1): F.adaptive_avg_pool1d,
    ("avg", 2): F.adaptive_avg_pool2d,
    ("avg", 3): F.adaptive_avg_pool3d,
}


def match_spatial(first: Tensor, second: Tensor, pool: str = "max") -> tuple[Tensor, Tensor]:
    """Pool each map to the smaller of the two sizes, axis by axis."""
    size = [min(p, q) for p, q in zip(first.shape[2:], second.shape[2:], strict=True)]
    adaptive_pool = _ADAPTIVE_POOL[pool, len(size)]

    def fit(x: Tensor) -> Tensor:
        return x if list(x.shape[2:]) == size else adaptive_pool(x, size)

    return fit(first), fit(second)


def fsp_matrix(
    first: Tensor, second: Tensor, pool: str = "max", mask: Tensor | None = None
) -> Tensor:
    """``G = F1 F2^T / K``: maps ``(B, m, *spatial)`` and ``(B, n, *spatial)`` to ``(B, m, n)``.

    With a mask ``(B, *spatial)`` of bool only the positions where it is true count.
    """
    first, second = match_spatial(first, second, pool)
    f1, f2 = first.flatten(2), second.flatten(2)  # (B, m, K), (B, n, K)
    if mask is None:
        return f1 @ f2.transpose(1, 2) / f1.shape[2]
    counts = mask.flatten(1)  # (B, K)
    f1, f2 = (f.masked_fill(~counts[:, None], 0) for f in (f1, f2))
    # Of a sample without such positions, the sum is zero.
    return f1 @ f2.transpose(1, 2) / counts.sum(1).clamp(min=1)[:, None, None]


def residual_norm(residual: Tensor, norm: str) -> Tensor:
    """The loss of one pair, a scalar, from its residual ``G^S - G^T`` of shape ``(B, m, n)``."""
    if norm == "frobenius":
        return residual.square().sum(dim=(1, 2)).mean()
    if norm == "mse":
        return residual.square().mean()
    if norm == "column":
        return residual.norm(dim=1).sum(dim=1).mean()
    raise ValueError(f"unknown norm {norm!r}")


def fsp_loss(
    student: Sequence[tuple[Tensor, Tensor]],
    teacher: Sequence[tuple[Tensor, Tensor] | Tensor],
    weights: Sequence[float] | None = None,
    pool: str = "max",
    norm: str = "frobenius",
    reduction: str = "sum",
    student_mask: Tensor | None = None,
    teacher_mask: Tensor | None = None,
) -> Tensor:
    """``sum_i lambda_i norm(G_i^S - G_i^T)``, or the terms ``(pairs,)`` with the reduction "none".

    A teacher entry is two maps or a ready matrix.
    """
    weights = [1.0] * len(student) if weights is None else weights
    terms = []
    for pair, target, weight in zip(student, teacher, weights, strict=True):
        g_student = fsp_matrix(*pair, pool, student_mask)
        if isinstance(target, Tensor):
            g_teacher = target
        else:
            g_teacher = fsp_matrix(*target, pool=pool, mask=teacher_mask)
        terms.append(weight * residual_norm(g_student - g_teacher, norm))
    return torch.stack(terms) if reduction == "none" else torch.stack(terms).sum()
