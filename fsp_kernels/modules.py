"""The loss as an ``nn.Module``, and the usual way to form pairs."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor, nn

from fsp_kernels import checks
from fsp_kernels.functional import Pair, fsp_loss


class FSPLoss(nn.Module):
    """:func:`fsp_kernels.fsp_loss` with its options fixed.

    Args:
        weights: ``lambda_i >= 0`` for each pair, numbers or a 1-D tensor, or ``None`` for ones.
            A ``torch.nn.Parameter`` becomes a parameter of the module. Under ``torch.compile`` the
            values of a tensor may change without a new compilation.
        pool: ``"max"`` or ``"avg"``.
        norm: ``"frobenius"``, ``"mse"`` or ``"column"``.
        channel_dim: the axis of the maps' channels, 1 or -1; maps of three axes need it.
        reduction: ``"sum"``, or ``"none"`` for the loss of each pair.

    Raises:
        TypeError, ValueError: as :func:`fsp_kernels.fsp_loss`, already in the constructor.
    """

    def __init__(
        self,
        weights: Sequence[float] | Tensor | None = None,
        pool: str = "max",
        norm: str = "frobenius",
        channel_dim: int | None = None,
        reduction: str = "sum",
    ):
        super().__init__()
        checks.check_options(pool, norm, reduction)
        checks.check_channel_dim(channel_dim)
        if isinstance(weights, Tensor):
            checks.check_weight_tensor(weights, None)
        elif weights is not None:
            weights = checks.check_weights(weights, None)
        self.weights = weights
        self.pool = pool
        self.norm = norm
        self.reduction = reduction
        self.channel_dim = channel_dim

    def forward(
        self,
        student: Sequence[Pair],
        teacher: Sequence[Pair | Tensor],
        student_mask: Tensor | None = None,
        teacher_mask: Tensor | None = None,
    ) -> Tensor:
        """The loss of the pairs of both networks; see :func:`fsp_kernels.fsp_loss`."""
        return fsp_loss(
            student,
            teacher,
            weights=self.weights,
            pool=self.pool,
            norm=self.norm,
            reduction=self.reduction,
            channel_dim=self.channel_dim,
            student_mask=student_mask,
            teacher_mask=teacher_mask,
        )

    def extra_repr(self) -> str:
        options = f"weights={self.weights}, pool={self.pool!r}, norm={self.norm!r}"
        if self.reduction != "sum":
            options += f", reduction={self.reduction!r}"
        if self.channel_dim is not None:
            options += f", channel_dim={self.channel_dim}"
        return options


def pairs_of(features: Sequence[Tensor]) -> list[Pair]:
    """Consecutive layers as pairs: ``[f0, f1, f2] -> [(f0, f1), (f1, f2)]``.

    Args:
        features: feature maps, ``(B, C, *spatial)`` or ``(B, *spatial, C)``, in the order of the
            network's layers.

    Raises:
        TypeError: not a list or tuple (a tensor would be split along its batch).
        ValueError: fewer than two maps.
    """
    checks.check_features(features)
    return list(pairwise(features))
