"""The compiled module ``fsp_kernels._cuda``, or why it is missing."""

from __future__ import annotations

import re
from functools import lru_cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from fsp_kernels.backends.compiled import compiled_module
from fsp_kernels.backends.devices import cached_constant, constant, raw_stream, why_no_gpu


def extension() -> ModuleType | str:
    """The module, or why it is missing."""
    return compiled_module("cuda")


@cached_constant
def why_unavailable() -> str | None:
    """``None`` if the extension exists and has kernels for a GPU of this machine.

    This only reads properties of the GPUs, because other processes may be using all of them.
    """
    found = extension()
    if isinstance(found, str):
        return found
    return None if on_host() else why_no_gpu(_why_no_kernels)


@constant
def on_host() -> bool:
    """Whether the kernels are compiled for the CPU, as in tests."""
    return getattr(extension(), "architectures", None) == "host"


def module() -> Any:
    found = extension()
    assert not isinstance(found, str), found
    return found


@cached_constant
def why_not_on(device: int) -> str | None:
    """Load the kernels on this GPU. Returns ``None`` if they run there, else why not.

    Raises:
        RuntimeError: a CUDA graph is being captured, and the kernels are not loaded yet.
    """
    reason = _why_no_kernels(device)
    if reason is not None:
        return reason
    with torch.cuda.device(device):  # PyTorch's, which restores the other device without using it
        reason = module().why_not_on(device, raw_stream(torch.device("cuda", device)))
    return f"its extension does not run on cuda:{device}: {reason}" if reason else None


def _why_no_kernels(device: int) -> str | None:
    capability = torch.cuda.get_device_capability(device)
    built = module().architectures
    if any(_runs_on(capability, code) for code in built.split()):
        return None
    major, minor = capability
    return f"its extension, built for {built}, has no kernels for cuda:{device} (sm_{major}{minor})"


def _runs_on(capability: tuple[int, int], code: str) -> bool:
    """Whether code for one of CMake's architectures, e.g. ``80-real`` or ``120-virtual``, can run.

    Machine code runs on chips with the same major number and at least the same minor number. PTX
    runs on all later chips if the driver can compile it; :func:`why_not_on` finds that out.
    """
    found = re.fullmatch(r"(\d+)(\d)([af]?)(-real|-virtual)?", code)
    if found is None:  # "all" and "all-major": only nvcc knows what they stand for
        return True
    oldest = (int(found[1]), int(found[2]))
    if found[3] == "a":  # for this chip only
        return capability == oldest
    if found[3] == "f" or found[4] == "-real":
        return capability >= oldest and capability[0] == oldest[0]
    return capability >= oldest


def index_of(tensor: Tensor) -> int:
    """The number of a tensor's device; 0 if the kernels are compiled for the CPU."""
    return max(0, tensor.get_device())


def scalar_of(dtype: torch.dtype) -> Any:
    return _scalars(module())[dtype]


@lru_cache
def _scalars(extension: Any) -> dict[torch.dtype, Any]:
    names = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
    return {dtype: getattr(extension.Scalar, name) for dtype, name in names.items()}
