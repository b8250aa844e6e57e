"""The ways a feature map may lie in memory.

Each takes a contiguous ``(B, C, *spatial)`` tensor to one of the same shape and other strides. What
lies between the elements of a slice is NaN, so that reading it shows.
"""

from __future__ import annotations

from collections.abc import Callable


def channels_last(x):
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


def sliced(axis: int, step: int) -> Callable:
    def layout(x):
        shape = list(x.shape)
        shape[axis] = shape[axis] * step + 3
        host = x.new_full(shape, float("nan"))
        part = host.narrow(axis, 2, shape[axis] - 3)
        part = part[(slice(None),) * (axis % x.ndim) + (slice(None, None, step),)]
        return part.copy_(x)

    return layout


def cropped(x):
    host = x.new_full([*x.shape[:2], *(s + 2 for s in x.shape[2:])], float("nan"))
    for axis in range(2, x.ndim):
        host = host.narrow(axis, 1, x.shape[axis])
    return host.copy_(x)


def one_element_off(x):
    return x.new_full([x.numel() + 1], float("nan"))[1:].view(x.shape).copy_(x)


def expanded(axis: int) -> Callable:
    return lambda x: x.narrow(axis, 0, 1).expand(x.shape)


def permute_spatial(x):
    order = (0, 1, *range(x.ndim - 1, 1, -1))
    return x.permute(order).contiguous().permute(order)


LAYOUTS = {
    "contiguous": lambda x: x,
    "channels last": channels_last,
    "spatial axes permuted": permute_spatial,
    "batch outermost but one": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "slice of a batch": sliced(0, 2),
    "slice of channels": sliced(1, 1),
    "every second channel": sliced(1, 2),
    "slice of space": sliced(-1, 1),
    "every second position": sliced(2, 2),
    "cropped": cropped,
    "one element off alignment": one_element_off,
    "slice of channels-last channels": lambda x: sliced(-1, 1)(x.movedim(1, -1)).movedim(-1, 1),
    "one sample for all": expanded(0),
    "one channel for all": expanded(1),
    "one position for all": expanded(-1),
}
