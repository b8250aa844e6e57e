"""Launching kernels at the cost of a C call.

Triton's own launch path inspects every argument on every call. Here a kernel is bound once to its
grid and to all that depends on shapes and strides; a call brings addresses and scalars. The
compiled kernel is looked up by what is left to inspect: which addresses are multiples of 16 bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import reduce
from operator import or_
from typing import Any

import torch
import triton
from torch import Tensor

from fsp_kernels.backends.devices import check_not_capturing
from fsp_kernels.backends.triton.arithmetic import INTERPRETED
from fsp_kernels.backends.triton.configurations import family_of

# Where a kernel takes its tensors from a list: numbers, alone or in nested tuples, with None where
# it takes none.
Places = Any


class Launch:
    """A kernel bound to its grid and constant arguments, callable with tensors and floats.

    ``places`` say where it takes which tensor; without them it takes all, one after the other.
    """

    def __init__(
        self, kernel: Any, grid: int, warps: int, *constants: Any, places: Places | None = None
    ):
        self.kernel = kernel
        self.grid = (grid, 1, 1)
        self.warps = warps
        self.constants = constants
        self.arrange = tuple if places is None else _arranger(places)
        self._compiled: dict[tuple[bool, ...], Any] = {}

    def __call__(self, stream: int, tensors: Sequence[Tensor], *scalars: Any) -> None:
        """Launch on ``stream``, a raw handle, of the current device."""
        addresses = list(map(Tensor.data_ptr, tensors))
        combined = reduce(or_, addresses)
        alignment = () if combined % 16 == 0 else tuple([x % 16 == 0 for x in addresses])
        compiled = self._compiled.get(alignment)
        if compiled is not None:
            arguments = self.arrange(addresses)
            compiled[self.grid](*arguments, *self.constants, *scalars, stream=stream)
            return
        if INTERPRETED:
            self.start(self.arrange(tensors), *scalars)
            return
        check_not_capturing(f"Triton compiles and loads {self.kernel.__name__}")
        self._compiled[alignment] = self.start(self.arrange(tensors), *scalars)

    def start(self, tensors: tuple[Any, ...], *scalars: Any) -> Any:
        """Launch by Triton's own path, on the current stream; the compiled kernel."""
        return self.kernel[self.grid](*tensors, *self.constants, *scalars, num_warps=self.warps)


def _arranger(places: Places) -> Callable[[Sequence[Any]], tuple[Any, ...]]:
    """A function that arranges a list as ``places`` say; compiled, since every launch calls it."""

    def code_of(places: Places) -> str:
        if isinstance(places, tuple):
            return f"({''.join(f'{code_of(x)}, ' for x in places)})"
        return "None" if places is None else f"x[{places}]"

    arrange: Callable[[Sequence[Any]], tuple[Any, ...]] = eval(f"lambda x: {code_of(places)}")
    return arrange


def device_family(device: torch.device | None = None) -> str:
    """The configuration table for a device, the current one if none is named.

    The interpreter follows the one with most rows; without a GPU it is that of the chip to compile
    for.
    """
    if INTERPRETED:
        return "sm_100"
    if torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability(device)
        return family_of(10 * major + minor)
    return family_of(triton.runtime.driver.active.get_current_target().arch)
