"""What the extension is told of a launch, for launches that no call of the library makes."""

from __future__ import annotations

from typing import Any


def flat_map(of: Any, slot: int, sample: int, channel: int, position: int, scalar: str) -> Any:
    """A map with these strides, at the address of that number."""
    return of.Map(
        slot=slot,
        scalar=getattr(of.Scalar, scalar),
        strides=(sample, channel, 0, 0, position),
        rows=1,
        columns=1,
        window=(1, 1, 1),
        pool=of.Pool.none,
        flat=True,
        channels_inner=False,
        unit=1,
    )


def plain_product(of: Any, **changes: Any) -> Any:
    """The product of no maps, of one channel and one position each, but for what is changed."""
    fields = {
        "maps": [None] * 4,
        "gradients": [None] * 4,
        "out": None,
        "out_part": 0,
        "samples": 1,
        "first_sample": 0,
        "channels": (1, 1),
        "positions": (1, 1),
        "parts": 1,
        "residual": of.Residual.plain,
        "norm": of.Norm.squares,
        "split": False,
        "finishes": False,
        "index": 0,
        "factor": 1.0,
    }
    return of.Pair(**(fields | changes))
