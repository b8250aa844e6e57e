"""Launch kernels at the cost of a C call.

Triton's own launch inspects every argument at every call. Here a kernel is bound once to its grid
and to all arguments that depend on shapes and strides. A call passes only addresses and scalars.
The compiled kernel is looked up by which of the addresses are multiples of 16 bytes.
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

# Which tensors of a list a kernel takes, and in what structure: indices in nested tuples, with None
# for an argument without a tensor.
Places = Any


class Launch:
    """A kernel bound to its grid and constant arguments, callable with tensors and floats.

    ``places`` says which of the tensors it takes; without ``places`` it takes all, in order.
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
        """Launch on ``stream``, a raw handle of a stream of the current device."""
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
        """Launch as Triton does, on the current stream. Returns the compiled kernel."""
        return self.kernel[self.grid](*tensors, *self.constants, *scalars, num_warps=self.warps)


def _arranger(places: Places) -> Callable[[Sequence[Any]], tuple[Any, ...]]:
    """Compile a function that arranges a list as ``places`` says, since every launch calls it."""

    def code_of(places: Places) -> str:
        if isinstance(places, tuple):
            return f"({''.join(f'{code_of(x)}, ' for x in places)})"
        return "None" if places is None else f"x[{places}]"

    arrange: Callable[[Sequence[Any]], tuple[Any, ...]] = eval(f"lambda x: {code_of(places)}")
    return arrange


def device_family(device: torch.device | None = None) -> str:
    """The family of a device, by default the current one.

    In the interpreter it is the family whose table has most rows. Without a GPU it is that of the
    chip that Triton compiles for.
    """
    if INTERPRETED:
        return "sm_100"
    if torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability(device)
        return family_of(10 * major + minor)
    return family_of(triton.runtime.driver.active.get_current_target().arch)
