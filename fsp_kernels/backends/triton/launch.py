"""Launching kernels at the cost of a C call.

Triton's own launch path inspects every argument on every call. Here a kernel is bound once to its
grid and to all that depends on shapes and strides; a call brings addresses and scalars. The
compiled kernel is looked up by what is left to inspect: which addresses are multiples of 16 bytes.
"""

from __future__ import annotations

from functools import reduce
from operator import or_
from typing import Any

import torch
import triton

from fsp_kernels.backends.fused import check_not_capturing
from fsp_kernels.backends.triton.arithmetic import INTERPRETED
from fsp_kernels.backends.triton.configurations import family_of

# Tensors as a kernel takes them: alone, or in nested tuples with None where there is none.
Tensors = Any


class Launch:
    """A kernel bound to its grid and constant arguments, callable with tensors and floats."""

    def __init__(self, kernel: Any, grid: int, warps: int, *constants: Any):
        self.kernel = kernel
        self.grid = (grid, 1, 1)
        self.warps = warps
        self.constants = constants
        self._compiled: dict[tuple[bool, ...], Any] = {}

    def __call__(self, stream: int, tensors: tuple[Tensors, ...], *scalars: Any) -> None:
        """Launch on ``stream``, a raw handle, of the current device."""
        found: list[int] = []
        addresses = tuple([_addresses(x, found) for x in tensors])
        every = reduce(or_, found)
        alignment = () if every % 16 == 0 else tuple([address % 16 == 0 for address in found])
        compiled = self._compiled.get(alignment)
        if compiled is not None:
            compiled[self.grid](*addresses, *self.constants, *scalars, stream=stream)
            return
        if INTERPRETED:
            self.start(tensors, *scalars)
            return
        check_not_capturing(f"Triton compiles and loads {self.kernel.__name__}")
        self._compiled[alignment] = self.start(tensors, *scalars)

    def start(self, tensors: tuple[Tensors, ...], *scalars: Any) -> Any:
        """Launch by Triton's own path, on the current stream; the compiled kernel."""
        return self.kernel[self.grid](*tensors, *self.constants, *scalars, num_warps=self.warps)


def _addresses(tensors: Tensors, found: list[int]) -> Any:
    """The same structure with addresses for tensors, which also go to ``found``."""
    if tensors is None:
        return None
    if type(tensors) is tuple:
        return tuple([_addresses(x, found) for x in tensors])
    address = tensors.data_ptr()
    found.append(address)
    return address


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
