"""The FSP loss of torchdistill (yoshitomo-matsubara/torchdistill)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

import fsp_kernels as fsp
from fsp_kernels import checks

IODict = Mapping[str, Mapping[str, Tensor]]  # module path -> "input" or "output" -> map


class FSPLoss(nn.Module):
    """Replaces ``FSPLoss`` of torchdistill (1.0 and newer), ``torchdistill/losses/mid_level.py``::

        from torchdistill.losses.mid_level import FSPLoss     # before
        from fsp_kernels.compat.torchdistill import FSPLoss   # after

    If configuration files name the loss (``key: 'FSPLoss'``), leave them as they are and call
    `register` once before the training or distillation box is built.

    For each pair, maps are max pooled to the smaller size, axis by axis. The pair's loss is the
    batch mean of the sum of the L2 norms of the residual's columns, times the pair's weight. The
    result is the sum over the pairs. All pairs must have the same batch size (the original divides
    by the first pair's).

    Args:
        fsp_pairs: for each pair's name, ``student_first``, ``student_second``, ``teacher_first``
            and ``teacher_second``, each ``{"path": module path, "io": "input" or "output"}``, and
            ``weight`` (1 if left out).
        channel_dim: the axis of the maps' channels, as in `fsp_kernels.fsp_loss`.
        **kwargs: accepted and ignored, as in the original.
    """

    def __init__(
        self,
        fsp_pairs: Mapping[str, Mapping[str, Any]],
        *,
        channel_dim: int | None = None,
        **_kwargs: Any,
    ):
        super().__init__()
        checks.check_channel_dim(channel_dim)
        self.fsp_pairs, self.channel_dim = fsp_pairs, channel_dim

    def forward(
        self, student_io_dict: IODict, teacher_io_dict: IODict, *_args: Any, **_kwargs: Any
    ) -> Tensor:
        """The loss, a scalar, of the maps ``(B, C, H, W)`` that hooks recorded in the two dicts.

        Raises:
            KeyError: a pair names a path, or an input or output of it, that was not recorded.
        """

        def maps(network: str, io_dict: IODict) -> list[tuple[Tensor, Tensor]]:
            return [
                (
                    _recorded(io_dict, pair[f"{network}_first"], f"{name}.{network}_first"),
                    _recorded(io_dict, pair[f"{network}_second"], f"{name}.{network}_second"),
                )
                for name, pair in self.fsp_pairs.items()
            ]

        return fsp.fsp_loss(
            maps("student", student_io_dict),
            maps("teacher", teacher_io_dict),
            weights=[pair.get("weight", 1) for pair in self.fsp_pairs.values()],
            pool="max",
            norm="column",
            channel_dim=self.channel_dim,
        )


def register() -> None:
    """Make ``key: 'FSPLoss'`` in torchdistill's configuration files mean the class above.

    Raises:
        ImportError: torchdistill is missing, or older than 1.0.
    """
    try:
        # This import registers torchdistill's own losses, so ours must come after it.
        from torchdistill.losses.registry import register_mid_level_loss
    except ImportError as error:
        raise ImportError(
            "registering FSPLoss needs torchdistill 1.0 or newer: pip install torchdistill"
        ) from error
    register_mid_level_loss(FSPLoss)


def _recorded(io_dict: IODict, where: Mapping[str, str], entry: str) -> Tensor:
    path, io = where["path"], where["io"]
    if path not in io_dict:
        raise KeyError(f"{entry}: module {path!r} was not recorded, only {list(io_dict)} were")
    if io not in io_dict[path]:
        raise KeyError(
            f"{entry}: the {io!r} of module {path!r} was not recorded, only {list(io_dict[path])}"
        )
    return io_dict[path][io]
