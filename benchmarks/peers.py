"""The loss as others write it: the same number from the same tensors, the usual ways.

Each builds both FSP matrices and subtracts them. They differ in how the matrix is built; pooling
(max), the Frobenius norm and the sum over pairs are shared, so that only the matrix is compared.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.workloads import Loss, Pairs, Workload

Matrix = Callable[[Tensor, Tensor, Tensor | None], Tensor]  # two maps and a mask

# The broadcast product holds (B, m, n, K) tensors, three at its peak in backward. Where one takes
# more bytes than this, a CPU does not run it: it would take minutes to say what is known.
BROADCAST_LIMIT = 1 << 28


def flattened(
    first: Tensor, second: Tensor, mask: Tensor | None = None
) -> tuple[Tensor, Tensor, int | Tensor]:
    """Pool the larger map to the smaller and flatten: ``(B, m, K)`` and ``(B, n, K)``.

    The third result is the number of positions. With a mask ``(B, K)`` it is that of each sample,
    and the first map is zero where the mask is false.
    """
    size = [min(p, q) for p, q in zip(first.shape[2:], second.shape[2:], strict=True)]
    if [*first.shape[2:]] != size:
        first = F.adaptive_max_pool2d(first, size)
    if [*second.shape[2:]] != size:
        second = F.adaptive_max_pool2d(second, size)
    f1, f2 = first.flatten(2), second.flatten(2)
    if mask is None:
        return f1, f2, f1.shape[2]
    return f1 * mask[:, None].to(f1.dtype), f2, mask.sum(1)[:, None, None]


def einsum_matrix(first: Tensor, second: Tensor, mask: Tensor | None = None) -> Tensor:
    """The naive op: one einsum over positions."""
    f1, f2, positions = flattened(first, second, mask)
    return torch.einsum("bmk,bnk->bmn", f1, f2) / positions


def bmm_matrix(first: Tensor, second: Tensor, mask: Tensor | None = None) -> Tensor:
    """A batched matrix product, as in Knowledge-Distillation-Zoo."""
    f1, f2, positions = flattened(first, second, mask)
    return torch.bmm(f1, f2.transpose(1, 2)) / positions


def broadcast_matrix(first: Tensor, second: Tensor, mask: Tensor | None = None) -> Tensor:
    """Every product of two channels at every position, then the mean, as in RepDistiller."""
    f1, f2, positions = flattened(first, second, mask)
    products = f1.unsqueeze(2) * f2.unsqueeze(1)  # (B, m, n, K)
    return products.mean(dim=3) if mask is None else products.sum(dim=3) / positions


def broadcast_bytes(workload: Workload, batch: int) -> int:
    """Size of the largest fp32 ``(B, m, n, K)`` tensor the broadcast product would hold."""
    return max(4 * batch * p[0][0] * p[1][0] * workload.positions(p) for p in workload.layers)


def loss_over(matrix: Matrix) -> Loss:
    """The Frobenius loss of the paper on top of any way to build the matrix.

    Of the usual ways to write it, ``mse_loss`` passes over the matrices the least often in
    backward. It does not reduce the batch here: of large matrices in fp16, its mean has a gradient
    of zero and its sum is infinite.
    """

    def loss(
        student: Pairs,
        teacher: Pairs,
        student_mask: Tensor | None = None,
        teacher_mask: Tensor | None = None,
    ) -> Tensor:
        terms = [
            F.mse_loss(matrix(*s, student_mask), matrix(*t, teacher_mask), reduction="none")
            .sum(dim=(1, 2))
            .mean()
            for s, t in zip(student, teacher, strict=True)
        ]
        return torch.stack(terms).sum()

    return loss


def compiled_einsum() -> Loss:
    """``torch.compile`` of the naive op, for the shapes of its first call.

    Starting afresh keeps the shapes of earlier workloads from making it generalise, or give up:
    with ``fullgraph`` it raises where it would otherwise fall back to eager unseen.
    """
    torch.compiler.reset()
    return torch.compile(loss_over(einsum_matrix), fullgraph=True, dynamic=False)
