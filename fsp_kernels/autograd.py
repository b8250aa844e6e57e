"""Autograd of the FSP matrix and of the loss.

There are two ways to the backends. Eager calls use a bare ``autograd.Function``, which costs
least. The compiler, export, dispatch modes, transforms and tensor subclasses need an operator.
They use ``torch.ops.fsp``, which :mod:`fsp_kernels.operators` builds from the functions here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._python_dispatch import (
    _get_current_dispatch_mode_stack,
    is_in_torch_dispatch_mode,
)

from fsp_kernels.backends import get_backend, planned_backend
from fsp_kernels.backends.tensors import elements_of
from fsp_kernels.loss_plan import LossPlan

_BY_MATRICES = (
    "((fsp_matrix(*student) - fsp_matrix(*teacher)) ** 2).sum() / batch_size for each pair."
)
ONCE_DIFFERENTIABLE = (
    "fsp_loss is once differentiable: its gradient is computed together with its value, in one "
    "pass over the feature maps. For second derivatives compose it from fsp_matrix, which is twice "
    f"differentiable: {_BY_MATRICES}"
)
NO_FORWARD_MODE = (
    "fsp_loss has no forward-mode derivative (jvp, jacfwd, hessian, dual tensors). Use reverse "
    "mode (grad, vjp, jacrev), or compose it from fsp_matrix, which has both modes: "
    f"{_BY_MATRICES}"
)


def needs_operator(maps: Sequence[Tensor]) -> bool:
    """Whether the call must go through ``torch.ops.fsp``, e.g. since it is being compiled."""
    return (
        torch.compiler.is_compiling()
        or (is_in_torch_dispatch_mode() and register_flop_formulas())
        or torch._C._are_functorch_transforms_active()
        or not _PLAIN_TYPES.issuperset(map(type, maps))
    )


# The flops of each operator; operators.py fills it.
FLOP_FORMULAS: dict[Any, Callable[..., int]] = {}


def register_flop_formulas() -> bool:
    """Give the formulas to each active ``FlopCounterMode``. Returns true.

    PyTorch's own registry of formulas cannot be used: reading it imports Triton.
    """
    for mode in _get_current_dispatch_mode_stack():
        registry = getattr(getattr(mode, "counter", None), "flop_registry", None)
        if registry is not None:
            registry.update(FLOP_FORMULAS)
    return True


_PLAIN_TYPES = frozenset((Tensor, torch.nn.Parameter))


def planned_loss(
    plan: LossPlan,
    weights: tuple[float, ...],
    maps: Sequence[Tensor],
    masks: Sequence[Tensor] = (),
) -> Tensor:
    """Run a plan whose inputs have been checked; differentiable."""
    loss: Tensor = FSPLossFunction.apply(plan, weights, masks, *maps)
    return loss


def outside_autocast(device: str) -> AbstractContextManager[Any]:
    """A context without autocast, which would round the fp32 operands of the products."""
    if (
        torch._C._is_any_autocast_enabled()
        and _has_autocast(device)
        and torch.is_autocast_enabled(device)
    ):
        return torch.autocast(device, enabled=False)
    return _NO_CONTEXT


_NO_CONTEXT: AbstractContextManager[Any] = nullcontext()
_has_autocast = lru_cache(torch.amp.is_autocast_available)


class FSPLossFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        plan: LossPlan,
        weights: tuple[float, ...],
        masks: Sequence[Tensor],
        *maps: Tensor,
    ) -> Tensor:
        with outside_autocast(plan.device):
            loss, gradients = planned_backend(plan).loss(maps, plan, weights, masks)
        ctx.plan, ctx.gradients = plan, gradients
        # Not saved for backward: only their identity is needed, and only by a second derivative.
        ctx.wanted = [maps[i] for i in plan.wanted]
        return loss

    @staticmethod
    def backward(ctx: Any, incoming: Tensor) -> Any:
        if ctx.gradients is None:
            raise RuntimeError(
                "Trying to backward through fsp_loss a second time, after its gradients were "
                "released; specify retain_graph=True the first time."
            )
        # If no later backward can need the gradients, they are scaled in place, and the leaves
        # take them without a copy.
        keep = _keeps_graph()
        plan: LossPlan = ctx.plan
        if _is_differentiated(incoming):
            how = plan.scaling.dtypes, plan.scaling.factors
            scaled = scaled_by_torch(ctx.gradients, *how, incoming, ctx.wanted)
        else:
            scaled = planned_backend(plan).scale(ctx.gradients, plan.scaling, incoming, not keep)
        if not keep:
            ctx.gradients = ctx.wanted = None
        return None, None, None, *plan.spread(scaled)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:  # noqa: ARG004
        raise RuntimeError(NO_FORWARD_MODE)


def _is_differentiated(incoming: Tensor) -> bool:
    """Whether this backward is batched or must itself be differentiable."""
    return (
        torch.is_grad_enabled()
        or forward_ad._current_level >= 0
        or _is_batched(incoming)
        or _is_wrapped(incoming)
    )


_keeps_graph = torch._C._autograd._get_current_graph_task_keep_graph
_is_wrapped = torch._C._functorch.is_functorch_wrapped_tensor
_is_batched = torch._C._functorch.is_legacy_batchedtensor  # e.g. by ``is_grads_batched``


def scaled_by_torch(
    gradients: Sequence[Tensor],
    dtypes: Sequence[torch.dtype],
    factors: Sequence[int],
    incoming: Tensor,
    maps: Sequence[Tensor],
) -> list[Tensor]:
    """``gradients * incoming`` by PyTorch, differentiable in ``incoming``.

    ``incoming`` is a scalar, or ``(pairs,)``; ``factors`` says which of its elements.

    The derivative by ``maps`` is not known. Asking for it raises an error instead of giving zero.
    """
    if torch.is_grad_enabled():
        incoming = incoming + _SecondDerivative.apply(*maps)
    each = elements_of(incoming)
    return [(g * each[i]).to(dtype) for g, i, dtype in zip(gradients, factors, dtypes, strict=True)]


class _SecondDerivative(torch.autograd.Function):
    """A zero that depends on the maps, and whose derivative by them raises an error."""

    @staticmethod
    def forward(*maps: Tensor) -> Tensor:
        return maps[0].new_zeros(())

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, incoming: Tensor) -> Any:  # noqa: ARG004
        raise RuntimeError(ONCE_DIFFERENTIABLE)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:  # noqa: ARG004
        raise RuntimeError(ONCE_DIFFERENTIABLE)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *maps: Tensor) -> tuple[Tensor, None]:  # noqa: ARG004
        return _SecondDerivative.apply(*maps), None


def matrix(first: Tensor, second: Tensor, backend: str) -> Tensor:
    """``F1 F2^T / K``: ``(B, m, K), (B, n, K) -> (B, m, n)``, as operator or eagerly."""
    if needs_operator((first, second)):
        result: Tensor = torch.ops.fsp.matrix(first, second, backend)
        return result
    return FSPMatrixFunction.apply(first, second, backend)


def matrix_backward(gradient: Tensor, other: Tensor, channels_last: bool, backend: str) -> Tensor:
    """``G' F / K``: ``(B, m, n), (B, n, K) -> (B, m, K)``, the gradient of one map of a matrix.

    The derivatives of this function and of :func:`matrix` need these two functions alone.
    """
    if needs_operator((gradient, other)) or _is_batched(gradient):
        result: Tensor = torch.ops.fsp.matrix_backward(gradient, other, channels_last, backend)
        return result
    return FSPMatrixGradientFunction.apply(gradient, other, channels_last, backend)


class FSPMatrixFunction(torch.autograd.Function):
    @staticmethod
    def forward(first: Tensor, second: Tensor, backend: str) -> Tensor:
        with outside_autocast(first.device.type):
            return get_backend(backend).matrix(first, second)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG004
        first, second, ctx.backend = inputs
        _save(ctx, first, second)

    @staticmethod
    def backward(ctx: Any, incoming: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        first, second = ctx.saved_tensors
        to_first = to_second = None
        if ctx.needs_input_grad[0]:
            g = matrix_backward(incoming, second, _channels_last(first), ctx.backend)
            to_first = g.to(first.dtype)
        if ctx.needs_input_grad[1]:
            g = matrix_backward(incoming.mT, first, _channels_last(second), ctx.backend)
            to_second = g.to(second.dtype)
        return to_first, to_second, None

    @staticmethod
    def jvp(ctx: Any, first: Tensor | None, second: Tensor | None, *_: Any) -> Tensor:
        return _bilinear_jvp(matrix, ctx, first, second, ctx.backend)


class FSPMatrixGradientFunction(torch.autograd.Function):
    @staticmethod
    def forward(gradient: Tensor, other: Tensor, channels_last: bool, backend: str) -> Tensor:
        with outside_autocast(gradient.device.type):
            return get_backend(backend).matrix_backward(gradient, other, channels_last)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG004
        gradient, other, ctx.channels_last, ctx.backend = inputs
        _save(ctx, gradient, other)

    @staticmethod
    def backward(ctx: Any, incoming: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        gradient, other = ctx.saved_tensors
        to_gradient = to_other = None
        if ctx.needs_input_grad[0]:
            to_gradient = matrix(incoming, other, ctx.backend).to(gradient.dtype)
        if ctx.needs_input_grad[1]:
            g = matrix_backward(gradient.mT, incoming, _channels_last(other), ctx.backend)
            to_other = g.to(other.dtype)
        return to_gradient, to_other, None, None

    @staticmethod
    def jvp(ctx: Any, gradient: Tensor | None, other: Tensor | None, *_: Any) -> Tensor:
        return _bilinear_jvp(matrix_backward, ctx, gradient, other, ctx.channels_last, ctx.backend)


def _save(ctx: Any, x: Tensor, y: Tensor) -> None:
    """Save both inputs for derivatives. PyTorch saves no inference tensor, so that is copied."""
    if (x.is_inference() or y.is_inference()) and any(ctx.needs_input_grad):
        x, y = (t.clone() if t.is_inference() else t for t in (x, y))
    ctx.save_for_backward(x, y)
    ctx.save_for_forward(x, y)


def _bilinear_jvp(
    function: Callable[..., Tensor], ctx: Any, to_x: Tensor | None, to_y: Tensor | None, *rest: Any
) -> Tensor:
    """The forward-mode derivative of a product of the two saved inputs, given their tangents."""
    x, y = ctx.saved_tensors
    terms = [] if to_x is None else [function(to_x, y, *rest)]
    terms += [] if to_y is None else [function(x, to_y, *rest)]
    return sum(terms[1:], terms[0])


def _channels_last(flat: Tensor) -> bool:
    """Whether a ``(B, C, K)`` map has its channels next to each other in memory."""
    return flat.stride(1) == 1 and flat.stride(2) != 1
