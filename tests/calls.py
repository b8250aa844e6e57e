"""Calls that take each of the fused kernels' roads, and what every result of one is held to.

The backend is the one that is in force: the fixture ``backend``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from layouts import LAYOUTS
from tolerances import flatten, oracle

import fsp_kernels as fsp
from fsp_kernels.backends.triton import configurations
from fsp_kernels.loss_plan import Scaling

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16
DTYPES = (FP32, FP16, BF16)
NORMS = ("frobenius", "mse", "column")
POOLS = ("max", "avg")

ROADS = ("one pass", "gram", "tiles", "tiles in parts")
MATRIX_ROADS = tuple(road for road in ROADS if road != "gram")


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

    def of(self, norm: str) -> Regime:
        """How these shapes are evaluated by a norm."""
        if norm == "column" and self.form == "gram":  # it needs the columns of the residual
            return self._replace(evaluation="tiles", form="matrix", parts=1)
        return self


class Tile(NamedTuple):
    """What a kernel for fp32 holds of a map under the limits of ``small``."""

    channels: int
    positions: int


class Sizes(NamedTuple):
    """Shapes that suit the tiles of a backend's kernels."""

    tile: Tile
    regimes: dict[str, Regime]
    limits: dict[str, int]  # of the planner, for small maps to take every road


SIZES = {
    # Triton's tiles are what a table says, 16 wide in ``small``.
    "triton": Sizes(
        tile=Tile(16, 16),
        regimes={
            "one pass": Regime((7, 13), (6, 3), "one pass"),
            "gram": Regime((20, 17), (1, 3), "blocks", form="gram", parts=2),
            "tiles": Regime((17, 20), (6, 3), "tiles"),
            "tiles in parts": Regime((20, 15), (5, 9), "tiles", parts=2),
        },
        limits={
            "GPU_TILE_CHANNELS": 16,
            "GPU_PART_POSITIONS": 20,
            "GPU_PART_CHANNELS": 10,
        },
    ),
    # Those of CUDA C++ are what csrc/ says: residuals of 64 or 128 channels by 32 positions,
    # gradients of 128 by 64, Gram forms of 32 channels.
    "cuda": Sizes(
        tile=Tile(64, 32),
        regimes={
            "one pass": Regime((35, 40), (6, 11), "one pass"),
            "gram": Regime((140, 35), (3, 5), "one pass", form="gram"),
            "tiles": Regime((131, 140), (6, 12), "tiles"),
            "tiles in parts": Regime((131, 15), (9, 9), "tiles", parts=2),
        },
        limits={"GPU_PART_POSITIONS": 40},
    ),
}


def small_rows(warps: int) -> list[configurations.Row]:
    """Triton's table with the smallest tiles there are, for channels and positions as few."""
    tile = configurations.Configuration(16, 16, 16, warps=warps, stages=2)
    most = {"one_pass": 16, "gram": 4}
    return [
        row._replace(configuration=tile, limit=most.get(row.kernel, 0))
        for row in configurations.rows()
    ]


def tensor(*shape: int, dtype=FP32, layout="contiguous", grad=True) -> torch.Tensor:
    x = torch.randn(shape, dtype=torch.float64).to(DEVICE, dtype)
    return LAYOUTS[layout](x).requires_grad_(grad)


def scaling_of(gradients: Sequence[torch.Tensor], dtypes=None, factors=None) -> Scaling:
    """What backward does to gradients that are wanted in these dtypes, by default their own."""
    held = tuple(g.dtype for g in gradients)
    sizes = tuple(g.numel() for g in gradients)
    factors = (0,) * len(sizes) if factors is None else tuple(factors)
    return Scaling(sizes, held, held if dtypes is None else tuple(dtypes), factors)


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
    """Loss and all gradients there are."""
    loss = fsp.fsp_loss(student, teacher, channel_dim=1, **options)
    gradients = gradients_of(loss, flatten(student, teacher))
    return [loss, *(g for g in gradients if g is not None)]


def check(student, teacher, *regimes: Regime, weights=None, **options) -> fsp.LossPlan:
    """The loss and its gradients are those of the definition, and each pair was evaluated as said.

    Returns the plan.
    """
    plan = fsp.explain(student, teacher, channel_dim=1, **options)
    ways = [(pair.evaluation, pair.form, pair.parts) for pair in plan.pairs]
    assert ways == [(r.evaluation, r.form, r.parts) for r in regimes]
    loss = fsp.fsp_loss(student, teacher, weights=weights, channel_dim=1, **options)
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
