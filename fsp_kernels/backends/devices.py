"""What backends need to know of PyTorch's devices: streams, precision, availability."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, wraps
from typing import Any

import torch
from torch import Tensor


def on_device(tensor: Tensor, function: Callable[..., Any], *arguments: Any) -> Any:
    """Call ``function`` while the tensor's device is current: kernels are launched there."""
    index = tensor.get_device()
    if index < 0 or index == torch._C._cuda_getDevice():
        return function(*arguments)
    with torch.cuda.device(index):
        return function(*arguments)


def fp32_precision() -> str:
    """How fp32 maps are multiplied: what ``torch.get_float32_matmul_precision()`` says.

    That function fails once PyTorch's newer setting is used, so CUDA's value is read directly.
    Before PyTorch 2.9 there is no newer setting.
    """
    if _fp32_setting is None:
        return "tf32x3" if torch.get_float32_matmul_precision() == "highest" else "tf32"
    return "tf32" if _fp32_setting("cuda", "matmul") == "tf32" else "tf32x3"


_fp32_setting = getattr(torch._C, "_get_fp32_precision_getter", None)


def raw_stream(device: torch.device) -> int:
    """The handle of the current stream of a device."""
    return 0 if device.index is None else torch._C._cuda_getCurrentRawStream(device.index)


def check_not_capturing(what: str) -> None:
    """Raise if the current stream is being captured in a CUDA graph.

    Args:
        what: a clause that says what cannot be captured, for the message.

    Raises:
        RuntimeError: the stream is being captured.
    """
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            f"{what} at its first call, which a CUDA graph cannot capture: call it once before "
            "capturing, forward and backward, with tensors of the same shapes, strides and dtypes"
        )


def why_no_gpu(why_not_on: Callable[[int], str | None]) -> str | None:
    """``None`` if kernels run on an NVIDIA GPU of this machine, else what is missing.

    ``why_not_on`` is called with the index of one GPU after another, until it returns ``None``.
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
    """A decorator: the compiler calls the function instead of tracing it.

    ``torch.compiler.assume_constant_result`` does the same, but it takes seconds to import the
    compiler.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def cached_constant(function: Callable[..., Any]) -> Any:
    """A decorator: :func:`constant`, and cached, since every loss calls the function.

    A bare ``lru_cache`` would not do: the compiler traces into it, with a warning.
    """
    cached = lru_cache(function)

    @constant
    @wraps(function)
    def call(*arguments: Any) -> Any:
        return cached(*arguments)

    call.cache_clear = cached.cache_clear  # type: ignore[attr-defined]
    return call


@cached_constant
def multiplies_bf16() -> bool:
    """Whether PyTorch multiplies bf16 on this CPU by instructions for it, as of AVX512-BF16."""
    if not torch.backends.mkldnn.is_available():
        return False
    if hasattr(torch.cpu, "get_capabilities"):
        return bool(torch.cpu.get_capabilities().get("avx512_bf16"))
    return torch.cpu._is_avx512_bf16_supported()  # before PyTorch had the function above
