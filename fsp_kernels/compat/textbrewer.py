"""The FSP loss of TextBrewer (airaria/TextBrewer)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

import fsp_kernels as fsp
from fsp_kernels.functional import Pair


def fsp_loss(
    state_S: Sequence[Tensor], state_T: Sequence[Tensor], mask: Tensor | None = None
) -> Tensor:
    """Replaces ``fsp_loss`` of airaria/TextBrewer, ``src/textbrewer/losses.py``::

        from textbrewer.losses import fsp_loss              # before
        from fsp_kernels.compat.textbrewer import fsp_loss  # after

    If a configuration names the loss (``'loss': 'fsp'`` or ``'gram'``), leave it as it is and call
    `register` once before training.

    The two hidden states of each network have one FSP matrix, over the length of the sequence. The
    loss is the mean of the squared residual over batch and matrix entries. It differs only where
    the original fails or is ill-defined:

    - A sample whose mask has only zeros has a zero matrix. The original's loss is NaN.
    - NaN and infinity in masked positions are ignored. The original's loss is NaN.
    - The mask is read as zero or not zero. The original multiplies the states by it, so other
      values than 0 and 1 change the states.
    - Without a mask, two states of different lengths are max pooled to the shorter length. The
      original fails.

    Args:
        state_S: the student's two hidden states, ``(B, T, m)`` and ``(B, T, n)``.
        state_T: the teacher's, with the same batch and hidden sizes. Without a mask, their length
            may be another.
        mask: ``(B, T)`` of any dtype, on any device: 0 where a position is padding, 1 elsewhere.
            It is for both networks. ``None`` counts all positions.

    Returns:
        A scalar.

    Raises:
        TypeError: an argument is not two states in a list or tuple (the original ignores a third).
        ValueError: a shape is wrong, or the student's and the teacher's matrices differ in shape
            (the original warns and broadcasts where it can).
    """
    if mask is not None:
        mask = mask.to(state_S[0].device, torch.bool)
    return fsp.fsp_loss(
        [cast(Pair, state_S)],  # fsp_loss checks that there are two
        [cast(Pair, state_T)],
        norm="mse",
        channel_dim=-1,
        student_mask=mask,
        teacher_mask=mask,
    )


def register() -> None:
    """Make ``'fsp'`` and ``'gram'`` in TextBrewer's ``intermediate_matches`` mean the loss above.

    Raises:
        ImportError: TextBrewer is missing.
    """
    try:
        from textbrewer.presets import MATCH_LOSS_MAP
    except ImportError as error:
        raise ImportError(
            "registering fsp_loss needs TextBrewer: pip install textbrewer"
        ) from error
    MATCH_LOSS_MAP["fsp"] = MATCH_LOSS_MAP["gram"] = fsp_loss
