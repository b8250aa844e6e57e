"""What the backends with fused kernels share, whatever the kernels are written in."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache, wraps
from itertools import pairwise
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from fsp_kernels.loss_plan import LossPlan, MapPlan, Scaling
from fsp_kernels.pooling import pool, unpool

# --- the backend ----------------------------------------------------------------------------------

# Of one pair: where a, b, c, d and their gradients are, with None where there is none.
Slots = tuple[int | None, ...]


class Program(Protocol):
    """The launches of a plan on a device, prepared once for all that they depend on."""

    def __call__(self, tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
        """The loss; ``tensors`` are all maps and, to be filled, all wanted gradients."""


class FusedBackend:
    """See :class:`fsp_kernels.backends.Backend` for what each method promises."""

    most_programs = 4096  # kept; all are dropped should shapes never settle

    def __init__(self) -> None:
        self.programs: dict[tuple[LossPlan, int], Program] = {}

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

    def prepare(self, plan: LossPlan, tensors: Sequence[Tensor]) -> Program:
        """The launches of a plan for tensors that lie as these do; see :class:`Program`."""
        raise NotImplementedError

    def loss(
        self, maps: Sequence[Tensor], plan: LossPlan, weights: Sequence[float]
    ) -> tuple[Tensor, list[Tensor]]:
        device = maps[0].get_device()
        if device >= 0 and device != torch._C._cuda_getDevice():
            with torch.cuda.device(device):
                return self.loss(maps, plan, weights)
        planned = plan.maps
        gradients = [
            torch.empty_like(maps[i], dtype=planned[i].gradient_dtype) for i in plan.wanted
        ]
        tensors = [*maps, *gradients]
        pooled = [] if plan.fused_windows else _pool(tensors, plan)
        # The strides of maps are part of a plan, and those of gradients follow from them.
        program = self.programs.get((plan, device))
        if program is None:
            if len(self.programs) >= self.most_programs:
                self.programs.clear()
            program = self.programs[plan, device] = self.prepare(plan, tensors)
        result = program(tensors, weights)
        for x in pooled:
            x.unpool()
        return result, gradients

    def scale(
        self, gradients: list[Tensor], scaling: Scaling, factor: Tensor, in_place: bool
    ) -> list[Tensor]:
        scaled = gradients
        if not in_place or scaling.held != scaling.dtypes:
            scaled = [
                g if in_place and g.dtype == dtype else torch.empty_like(g, dtype=dtype)
                for g, dtype in zip(gradients, scaling.dtypes, strict=True)
            ]
        on_device(factor, self.scale_into, scaled, gradients, scaling, factor, in_place)
        return scaled

    def scale_into(
        self,
        scaled: Sequence[Tensor],
        gradients: Sequence[Tensor],
        scaling: Scaling,
        factor: Tensor,
        in_place: bool,
    ) -> None:
        """``scaled = gradients * factor``, where their device is current.

        With ``in_place`` and a factor of 1, tensors that are among both may be left as they are.
        """
        raise NotImplementedError

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


# --- the tensors of a loss ------------------------------------------------------------------------


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


def _pool(tensors: list[Tensor], plan: LossPlan) -> list[_Pooled]:
    """Let pooled maps and their gradients take the places of those that no kernel can pool."""
    found = []
    gradients = _gradient_places(plan)
    for i, m in enumerate(plan.maps):
        if not m.fused_windows:
            place = gradients.get(i)
            x = _Pooled(tensors[i], None if place is None else tensors[place], m)
            tensors[i] = x.map
            if place is not None and x.gradient is not None:
                tensors[place] = x.gradient
            found.append(x)
    return found


def _gradient_places(plan: LossPlan) -> dict[int, int]:
    """Among all maps and all wanted gradients, where the gradient of a map is."""
    return {i: len(plan.maps) + k for k, i in enumerate(plan.wanted)}


def slots_of(plan: LossPlan) -> list[Slots]:
    """Where each pair's tensors are among all maps and all wanted gradients."""
    gradients = _gradient_places(plan)
    slots, start = [], 0
    for pair in plan.pairs:
        maps = range(start, start + len(pair.maps))
        padding = (None,) * (4 - len(maps))
        slots.append((*maps, *padding, *map(gradients.get, maps), *padding))
        start += len(maps)
    return slots


def tensors_at(slots: Slots, tensors: Sequence[Tensor]) -> list[Tensor | None]:
    return [None if x is None else tensors[x] for x in slots]


def partner_of(own: int) -> int:
    """The other map of the same network."""
    return own ^ 1


# --- devices --------------------------------------------------------------------------------------


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
