"""The compiled module ``fsp_kernels._cuda``, or why there is none."""

from __future__ import annotations

import importlib
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from fsp_kernels.backends.fused import constant, remembered, why_no_gpu

NEVER = "nothing has compiled it: `pip install .` does, where it finds nvcc 12.0 or newer"
# What setup.py leaves where it does not build the extension: why.
NOTE = Path(__file__).parents[2] / "cuda_build.txt"


@lru_cache
def extension() -> ModuleType | str:
    """The module, or why there is none."""
    try:
        return importlib.import_module("fsp_kernels._cuda")
    except ModuleNotFoundError:
        why = NOTE.read_text().strip() if NOTE.exists() else NEVER
        return f"its extension is not built: {why}"
    except ImportError as error:
        return f"its extension cannot be loaded: {error}"


@remembered
def why_unavailable() -> str | None:
    """``None`` if the extension is there and has kernels for a GPU of this machine."""
    found = extension()
    if isinstance(found, str):
        return found
    return None if on_host() else why_no_gpu(why_not_on)


@constant
def on_host() -> bool:
    """Whether the kernels are compiled for the CPU, as tests do."""
    return getattr(extension(), "architectures", None) == "host"


def module() -> Any:
    found = extension()
    assert not isinstance(found, str), found
    return found


@remembered
def why_not_on(device: int) -> str | None:
    reason = module().why_not_on(device)
    if not reason:
        return None
    major, minor = torch.cuda.get_device_capability(device)
    return (
        f"its extension, built for {module().architectures}, has no kernels for cuda:{device} "
        f"(sm_{major}{minor}): {reason}"
    )


def index_of(tensor: Tensor) -> int:
    """The number of a tensor's device; the host is the only one of a build for it."""
    return max(0, tensor.get_device())


def scalar_of(dtype: torch.dtype) -> Any:
    return _scalars(module())[dtype]


@lru_cache
def _scalars(extension: Any) -> dict[torch.dtype, Any]:
    names = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
    return {dtype: getattr(extension.Scalar, name) for dtype, name in names.items()}
