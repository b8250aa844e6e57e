"""What the backends with fused kernels share, whatever the kernels are written in."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache, wraps
from itertools import pairwise
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from fsp_kernels.loss_plan import LossPlan, MapPlan
from fsp_kernels.pooling import pool, unpool

# --- FSP matrices and the scaling of gradients --------------------------------------------------


class FusedBackend:
    """See :class:`fsp_kernels.backends.Backend` for what each method promises."""

    on_cpu: str  # why no tensors of a GPU, where its kernels run on the CPU instead

    @property
    def automatic(self) -> bool:
        """Not so where its kernels run on the CPU, for tests and for debugging."""
        raise NotImplementedError

    def why_not_on(self, device: torch.device) -> str | None:
        """``None`` if its kernels run on this NVIDIA GPU, else why not."""
        raise NotImplementedError

    def why_unsupported(self, device: torch.device, dtypes: Sequence[torch.dtype]) -> str | None:
        if torch.float64 in dtypes:
            return "its kernels take fp32, fp16 and bf16, not fp64"
        if not self.automatic:
            return None if device.type == "cpu" else self.on_cpu
        if device.type != "cuda":
            return f"its kernels run on NVIDIA GPUs, not on {device.type}"
        return self.why_not_on(device)

    def product(self, x: Tensor, y: Tensor, out: Tensor, positions: int) -> None:
        """``out = x @ y / positions``: ``(B, M, R), (B, R, N) -> (B, M, N)``."""
        raise NotImplementedError

    def matrix(self, first: Tensor, second: Tensor) -> Tensor:
        dtype = torch.promote_types(first.dtype, second.dtype)
        out = first.new_empty(first.shape[0], first.shape[1], second.shape[1], dtype=dtype)
        self.product(first, second.mT, out, first.shape[2])
        return out

    def matrix_backward(self, gradient: Tensor, other: Tensor, channels_last: bool) -> Tensor:
        dtype = torch.promote_types(gradient.dtype, other.dtype)
        batch, channels, positions = gradient.shape[0], gradient.shape[1], other.shape[2]
        if channels_last:
            out = gradient.new_empty(batch, positions, channels, dtype=dtype).mT
        else:
            out = gradient.new_empty(batch, channels, positions, dtype=dtype)
        self.product(gradient, other, out, positions)
        return out


def targets_of(
    gradients: Sequence[Tensor], dtypes: Sequence[torch.dtype], in_place: bool
) -> list[Tensor]:
    """Where scaled gradients go: their own place, or a new one."""
    return [
        g if in_place and g.dtype == dtype else torch.empty_like(g, dtype=dtype)
        for g, dtype in zip(gradients, dtypes, strict=True)
    ]


# --- how maps lie -------------------------------------------------------------------------------


class Axes(NamedTuple):
    """Where the positions of a map ``(B, C, *spatial)`` lie; strides in elements.

    Three axes always, leading ones of size 1 where there are fewer.
    """

    strides: tuple[int, int, int]
    sizes: tuple[int, int, int]  # after pooling
    windows: tuple[int, int, int]  # elements pooled along each axis
    flat: bool  # positions lie the last stride apart, whatever their axis


def axes_of(shape: Sequence[int], strides: Sequence[int], size: Sequence[int] | None) -> Axes:
    """The axes of a map that is pooled to ``size``, a divisor of its own axis by axis."""
    spatial = [1] * (5 - len(shape)) + list(shape[2:])
    pooled = spatial if size is None else [1] * (5 - len(shape)) + list(size)
    steps = [0] * (5 - len(shape)) + list(strides[2:])
    windows = [full // part for full, part in zip(spatial, pooled, strict=True)]
    flat = windows == [1, 1, 1] and _is_flat(spatial, steps)
    if flat:  # the stride of the innermost axis that has more than one position
        longer = [t for s, t in zip(spatial, steps, strict=True) if s > 1]
        steps = [0, 0, longer[-1] if longer else 1]
    return Axes(_three(steps), _three(pooled), _three(windows), flat)


def _three(values: Sequence[int]) -> tuple[int, int, int]:
    first, second, third = values
    return first, second, third


def _is_flat(sizes: Sequence[int], strides: Sequence[int]) -> bool:
    """Whether one stride leads from each position to the next, across the axes."""
    axes = [(s, t) for s, t in zip(sizes, strides, strict=True) if s > 1]
    return all(outer == inner_size * inner for (_, outer), (inner_size, inner) in pairwise(axes))


# --- a loss, prepared once ------------------------------------------------------------------------

# Of one pair: a, b, c, d and their gradients, with None where there is none.
Slots = tuple[Tensor | None, ...]


class Program(Protocol):
    """The launches of a plan, for maps that lie in one way."""

    def __call__(
        self,
        maps: Sequence[Tensor],
        gradients: Sequence[Tensor | None],
        weights: Sequence[float],
    ) -> Tensor:
        """The loss; fills ``gradients``."""


Prepare = Callable[[LossPlan, Sequence[Tensor], Sequence[Tensor | None]], Program]


class Programs:
    """Losses by plan; a program is prepared when first wanted, for all that it depends on.

    Strides of gradients follow from those of the maps. Dropped as a whole should shapes never
    settle.
    """

    most = 4096

    def __init__(self, prepare: Prepare):
        self._prepare = prepare
        self._programs: dict[Any, Program] = {}

    def __len__(self) -> int:
        return len(self._programs)

    def clear(self) -> None:
        self._programs.clear()

    def loss(
        self, maps: Sequence[Tensor], plan: LossPlan, weights: Sequence[float]
    ) -> tuple[Tensor, list[Tensor]]:
        """See :meth:`fsp_kernels.backends.Backend.loss`; on the current device."""
        gradients = [
            None if m.gradient_dtype is None else torch.empty_like(x, dtype=m.gradient_dtype)
            for x, m in zip(maps, plan.maps, strict=True)
        ]
        if plan.fused_windows:
            result = self._program_of(plan, maps, gradients)(maps, gradients, weights)
        else:
            result = self._pooled_loss(maps, gradients, plan, weights)
        return result, [g for g in gradients if g is not None]

    def _pooled_loss(
        self,
        maps: Sequence[Tensor],
        gradients: Sequence[Tensor | None],
        plan: LossPlan,
        weights: Sequence[float],
    ) -> Tensor:
        """The same where some maps have windows that no kernel takes."""
        pooled = [
            None if m.fused_windows else _Pooled(x, g, m)
            for x, g, m in zip(maps, gradients, plan.maps, strict=True)
        ]
        read = [x if p is None else p.map for x, p in zip(maps, pooled, strict=True)]
        written = [g if p is None else p.gradient for g, p in zip(gradients, pooled, strict=True)]
        result = self._program_of(plan, read, written)(read, written, weights)
        for x in pooled:
            if x is not None:
                x.unpool()
        return result

    def _program_of(
        self, plan: LossPlan, maps: Sequence[Tensor], gradients: Sequence[Tensor | None]
    ) -> Program:
        # Of the strides a plan has what it depends on; a program depends on all of them.
        key = (plan, maps[0].device.index, tuple([x.stride() for x in maps]))
        program = self._programs.get(key)
        if program is None:
            if len(self._programs) >= self.most:
                self._programs.clear()
            program = self._programs[key] = self._prepare(plan, maps, gradients)
        return program


class _Pooled:
    """A map whose windows no kernel takes, pooled by PyTorch before the kernels see it."""

    def __init__(self, x: Tensor, gradient: Tensor | None, plan: MapPlan):
        assert plan.pooled_size is not None
        self._target, self._size, self._mode = gradient, plan.pooled_size, plan.pool
        x = x.to(plan.read.dtype)
        pooled, self._indices = pool(x, self._size, self._mode, indexed=gradient is not None)
        self.map = pooled.contiguous().view(plan.read.shape)
        self.gradient = None
        if gradient is not None:
            dtype = plan.read.gradient_dtype
            self.gradient = torch.empty(plan.read.shape, dtype=dtype, device=x.device)

    def unpool(self) -> None:
        if self._target is not None and self.gradient is not None:
            flat = self.gradient.flatten(2)
            unpool(flat, self._target, self._size, self._mode, self._indices)


def slots_of(
    sizes: Sequence[int], maps: Sequence[Tensor], gradients: Sequence[Tensor | None]
) -> list[Slots]:
    """The maps and gradients of each pair; ``sizes`` are its maps, 4, or 3 with a ready matrix."""
    slots, start = [], 0
    for size in sizes:
        padding = (None,) * (4 - size)
        stop = start + size
        slots.append((*maps[start:stop], *padding, *gradients[start:stop], *padding))
        start = stop
    return slots


def partner_of(own: int) -> int:
    """The other map of the same network."""
    return own ^ 1


# --- devices --------------------------------------------------------------------------------------


def on_device(tensor: Tensor, function: Callable[..., Any], *arguments: Any) -> Any:
    """Call with the tensor's device current: kernels are launched where it is."""
    index = tensor.get_device()
    if index < 0 or index == torch.cuda.current_device():
        return function(*arguments)
    with torch.cuda.device(index):
        return function(*arguments)


def fp32_precision() -> str:
    """How fp32 maps are multiplied, after ``torch.get_float32_matmul_precision()``.

    Read where PyTorch keeps it for CUDA: the function itself fails once the newer setting is used.
    """
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "tf32x3"


def raw_stream(device: torch.device) -> int:
    """The handle of the current stream of a device."""
    return torch._C._cuda_getCurrentRawStream(device.index) if device.type == "cuda" else 0


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
