"""The FSP loss of Knowledge-Distillation-Zoo (AberHu/Knowledge-Distillation-Zoo)."""

from __future__ import annotations

from torch import Tensor, nn

import fsp_kernels as fsp
from fsp_kernels import checks


class FSP(nn.Module):
    """Replaces ``FSP`` of AberHu/Knowledge-Distillation-Zoo, ``kd_losses/fsp.py``::

        from kd_losses import FSP                  # before
        from fsp_kernels.compat.kd_zoo import FSP  # after

    Maps are average pooled to the smaller size. The loss is the mean of the squared residual over
    batch and matrix entries. It differs only where the original fails or is ill-defined: on each
    axis the larger map is pooled. The original compares heights alone and pools only the first map,
    so it stretches a first map that is higher but narrower.

    Args:
        channel_dim: the axis of the maps' channels, as in `fsp_kernels.fsp_loss`.

    Raises:
        ValueError: the student's and the teacher's matrices differ in shape (the original warns and
            broadcasts where it can).
    """

    def __init__(self, channel_dim: int | None = None):
        super().__init__()
        checks.check_channel_dim(channel_dim)
        self.channel_dim = channel_dim

    def forward(self, fm_s1: Tensor, fm_s2: Tensor, fm_t1: Tensor, fm_t2: Tensor) -> Tensor:
        """The loss, a scalar, of maps ``(B, m, H, W)`` and ``(B, n, H, W)`` of each network."""
        return fsp.fsp_loss(
            [(fm_s1, fm_s2)],
            [(fm_t1, fm_t2)],
            pool="avg",
            norm="mse",
            channel_dim=self.channel_dim,
        )
