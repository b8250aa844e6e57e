"""The FSP loss of RepDistiller (HobbitLong/RepDistiller)."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor, nn

import fsp_kernels as fsp
from fsp_kernels import checks


class FSP(nn.Module):
    """Replaces ``FSP`` of HobbitLong/RepDistiller, ``distiller_zoo/FSP.py``::

        from distiller_zoo import FSP                    # before
        from fsp_kernels.compat.repdistiller import FSP  # after

    There is one loss for each two consecutive maps. Maps are average pooled to the smaller size,
    then the loss is the mean of the squared residual over batch and matrix entries. It differs only
    where the original fails or is ill-defined: sizes are matched axis by axis. The original
    compares heights alone and pools to a square, so it fails unless the smaller map is square, and
    stretches a larger map that is narrow.

    Args:
        s_shapes: the shapes of the student's maps, each ``(B, C, H, W)``.
        t_shapes: the shapes of the teacher's maps, as many and with the same channels.
        channel_dim: the axis of the maps' channels, as in `fsp_kernels.fsp_loss`.

    Raises:
        ValueError: the numbers of maps differ (an ``AssertionError`` in the original), or the
            channels of two maps do.
    """

    def __init__(
        self,
        s_shapes: Sequence[Sequence[int]],
        t_shapes: Sequence[Sequence[int]],
        channel_dim: int | None = None,
    ):
        super().__init__()
        checks.check_channel_dim(channel_dim)
        self.channel_dim = channel_dim
        _check_same_number(s_shapes, t_shapes)
        axis = channel_dim or 1
        s_channels, t_channels = [s[axis] for s in s_shapes], [t[axis] for t in t_shapes]
        if s_channels != t_channels:
            raise ValueError(
                f"student and teacher must have the same channels, map by map: "
                f"the student has {s_channels}, the teacher {t_channels}"
            )

    def forward(self, g_s: Sequence[Tensor], g_t: Sequence[Tensor]) -> list[Tensor]:
        """The loss, a scalar, of each two consecutive maps: one fewer than there are maps.

        Raises:
            ValueError: the numbers of maps differ (the original drops the extra ones).
        """
        _check_same_number(g_s, g_t)
        if len(g_s) < 2:
            return []
        losses = fsp.fsp_loss(
            list(pairwise(g_s)),
            list(pairwise(g_t)),
            pool="avg",
            norm="mse",
            reduction="none",
            channel_dim=self.channel_dim,
        )
        return list(losses.unbind())


def _check_same_number(student: Sequence[object], teacher: Sequence[object]) -> None:
    if len(student) != len(teacher):
        raise ValueError(
            f"student and teacher must have the same number of maps: "
            f"the student has {len(student)}, the teacher {len(teacher)}"
        )
