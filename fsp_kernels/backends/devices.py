"""What backends ask of PyTorch's devices: streams, precision, availability."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, wraps
from typing import Any

import torch
from torch import Tensor


def on_device(tensor: Tensor, function: Callable[..., Any], *arguments: Any) -> Any:
    """Call with the tensor's device current: kernels are launched where it is."""
    index = tensor.get_device()
    if index < 0 or index == torch._C._cuda_getDevice():
        return function(*arguments)
    with torch.cuda.device(index):
        return function(*arguments)


def fp32_precision() -> str:
    """How fp32 maps are multiplied, after ``torch.get_float32_matmul_precision()``.

    Read where PyTorch keeps it for CUDA: the function itself fails once the newer setting is used.
    """
    return "tf32" if torch._C._get_fp32_precision_getter("cuda", "matmul") == "tf32" else "tf32x3"


def raw_stream(device: torch.device) -> int:
    """The handle of the current stream of a device."""
    return 0 if device.index is None else torch._C._cuda_getCurrentRawStream(device.index)


def check_not_capturing(what: str) -> None:
    """Refuse ``what``, a clause, while the current stream is captured in a CUDA graph.

    Raises:
        RuntimeError: it is captured.
    """
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            f"{what} at its first call, which a CUDA graph cannot capture: call it once before "
            "capturing, forward and backward, with tensors of the same shapes, strides and dtypes"
        )


def why_no_gpu(why_not_on: Callable[[int], str | None]) -> str | None:
    """``None`` if there is an NVIDIA GPU with nothing against it, else what is missing.

    Asks about one GPU after another, until there is nothing against one.
    """
    if not torch.cuda.is_available():
        return "PyTorch sees no NVIDIA GPU"
    if torch.version.hip is not None:
        return "this PyTorch is built for ROCm; its kernels are for NVIDIA GPUs"
    first = why_not_on(0)
    others = range(1, torch.cuda.device_count())
    works = first is None or any(why_not_on(i) is None for i in others)
    return None if works else first


def constant(function: Callable[..., Any]) -> Callable[..., Any]:
    """Evaluated, not traced, where a call is compiled.

    As ``torch.compiler.assume_constant_result`` has it, which takes seconds to import the compiler.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def remembered(function: Callable[..., Any]) -> Any:
    """Constant, and asked once: every call wants to know.

    The compiler looks into a bare ``lru_cache``, and warns of it.
    """
    cached = lru_cache(function)

    @constant
    @wraps(function)
    def ask(*arguments: Any) -> Any:
        return cached(*arguments)

    ask.cache_clear = cached.cache_clear  # type: ignore[attr-defined]
    return ask
