"""``torch.ops.fsp``: the FSP matrix and the loss as PyTorch operators.

The compiler, ``torch.export``, dispatch modes, transforms and tensor subclasses need operators.
:mod:`fsp_kernels.autograd` holds the derivatives, which eager calls share.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd.forward_ad import _set_fwd_grad_enabled
from torch.autograd.function import Function, _SingleLevelFunction

from fsp_kernels.autograd import (
    FLOP_FORMULAS,
    NO_FORWARD_MODE,
    FSPMatrixFunction,
    FSPMatrixGradientFunction,
    matrix,
    matrix_backward,
    outside_autocast,
    register_flop_formulas,
    scaled_by_torch,
)
from fsp_kernels.backends import get_backend, planned_backend
from fsp_kernels.backends.devices import fp32_precision
from fsp_kernels.checks import check_weights
from fsp_kernels.loss_plan import NO_MASKS, LossPlan, MapSpec, Masks, by_network, factors_of
from fsp_kernels.plan import accumulation_dtype, gradient_dtype, plan_loss

_LIBRARY = torch.library.Library("fsp", "DEF")
_OPS = torch.ops.fsp
_LIBRARY.define("matrix(Tensor first, Tensor second, str backend) -> Tensor")
_LIBRARY.define(
    "matrix_backward(Tensor gradient, Tensor other, bool channels_last, str backend) -> Tensor"
)
# `maps` are flattened pair by pair, student before teacher. `ready[i]` says that the teacher of
# pair i is a ready FSP matrix, `needs[j]` that maps[j] needs a gradient. Returns the loss and these
# gradients. Weights that change from call to call are passed as `changing`, a CPU tensor, instead
# of `weights`. The reduction "none" gives one loss of each pair, (pairs,). `symmetric[i]` says that
# the two maps of pair i are one tensor, in each network that has maps. The gradient of the first
# map is then the whole gradient, and the second must not need any. Without flags no pair is.
# Masks are (B, K) of bool. If `shares_mask`, the student's is the teacher's, too.
_LIBRARY.define(
    "loss(Tensor[] maps, bool[] ready, bool[] needs, float[] weights, str pool, str norm, "
    "str backend, Tensor? changing=None, str reduction='sum', "
    "bool[] symmetric=[], Tensor? student_mask=None, Tensor? teacher_mask=None, "
    "bool shares_mask=False) -> (Tensor, Tensor[])"
)


@torch.library.impl(_LIBRARY, "matrix", "CompositeExplicitAutograd")
def _matrix(first: Tensor, second: Tensor, backend: str) -> Tensor:
    return FSPMatrixFunction.forward(first, second, backend)


@torch.library.register_fake("fsp::matrix", lib=_LIBRARY)
def _matrix_fake(first: Tensor, second: Tensor, backend: str) -> Tensor:  # noqa: ARG001
    dtype = torch.promote_types(first.dtype, second.dtype)
    return first.new_empty(first.shape[0], first.shape[1], second.shape[1], dtype=dtype)


@torch.library.impl(_LIBRARY, "matrix_backward", "CompositeExplicitAutograd")
def _matrix_backward(gradient: Tensor, other: Tensor, channels_last: bool, backend: str) -> Tensor:
    return FSPMatrixGradientFunction.forward(gradient, other, channels_last, backend)


@torch.library.register_fake("fsp::matrix_backward", lib=_LIBRARY)
def _matrix_backward_fake(
    gradient: Tensor,
    other: Tensor,
    channels_last: bool,
    backend: str,  # noqa: ARG001
) -> Tensor:
    dtype = torch.promote_types(gradient.dtype, other.dtype)
    b, m, k = gradient.shape[0], gradient.shape[1], other.shape[2]
    if channels_last:
        return gradient.new_empty(b, k, m, dtype=dtype).mT
    return gradient.new_empty(b, m, k, dtype=dtype)


@torch.library.impl(_LIBRARY, "loss", "CompositeExplicitAutograd")
def _loss(
    maps: Sequence[Tensor],
    ready: Sequence[bool],
    needs: Sequence[bool],
    weights: Sequence[float],
    pool: str,
    norm: str,
    backend: str,
    changing: Tensor | None = None,
    reduction: str = "sum",
    symmetric: Sequence[bool] = (),
    student_mask: Tensor | None = None,
    teacher_mask: Tensor | None = None,
    shares_mask: bool = False,
) -> tuple[Tensor, list[Tensor]]:
    if changing is not None:
        weights = check_weights(changing.tolist(), len(ready))
    masks = _masks(student_mask, teacher_mask, shares_mask)
    plan = _plan(maps, ready, needs, pool, norm, backend, reduction, symmetric, masks)
    with torch.no_grad(), outside_autocast(plan.device):
        return planned_backend(plan).loss(maps, plan, weights, masks.flat())


@torch.library.register_fake("fsp::loss", lib=_LIBRARY)
def _loss_fake(
    maps: Sequence[Tensor],
    ready: Sequence[bool],
    needs: Sequence[bool],
    weights: Sequence[float],  # noqa: ARG001
    pool: str,  # noqa: ARG001
    norm: str,  # noqa: ARG001
    backend: str,  # noqa: ARG001
    changing: Tensor | None = None,  # noqa: ARG001
    reduction: str = "sum",
    symmetric: Sequence[bool] = (),  # noqa: ARG001
    student_mask: Tensor | None = None,  # noqa: ARG001
    teacher_mask: Tensor | None = None,  # noqa: ARG001
    shares_mask: bool = False,  # noqa: ARG001
) -> tuple[Tensor, list[Tensor]]:
    gradients = [
        torch.empty_like(x, dtype=gradient_dtype(x.dtype))
        for x, need in zip(maps, needs, strict=True)
        if need
    ]
    shape = (len(ready),) if reduction == "none" else ()
    return maps[0].new_empty(shape, dtype=accumulation_dtype(*(x.dtype for x in maps))), gradients


def _masks(student: Tensor | None, teacher: Tensor | None, shared: bool) -> Masks:
    return Masks.of(student, student if shared else teacher)


def _plan(
    maps: Sequence[Tensor],
    ready: Sequence[bool],
    needs: Sequence[bool],
    pool: str,
    norm: str,
    backend: str,
    reduction: str = "sum",
    symmetric: Sequence[bool] = (),
    masks: Masks = NO_MASKS,
) -> LossPlan:
    specs = [MapSpec.of(x)._replace(requires_grad=n) for x, n in zip(maps, needs, strict=True)]
    student, teacher = by_network(specs, ready)
    options = pool, norm, get_backend(backend), fp32_precision(), reduction, tuple(symmetric)
    return plan_loss(student, teacher, *options, masks.of_networks)


# --- autograd -----------------------------------------------------------------------------------
# register_autograd is not used: it does not work with torch.func, and its forward mode gives zeros.


def _below_autograd(operator: Any) -> Callable[..., Any]:
    """A forward for an operator's autograd function: it calls the operator below autograd."""

    def forward(*inputs: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            if not torch._C._are_functorch_transforms_active():
                return operator(*inputs)
            with torch.enable_grad(), _set_fwd_grad_enabled(True):  # for the outer levels
                return operator(*inputs)

    return forward


def _apply(function: Any, *inputs: Any) -> Any:
    """``function.apply`` at one level of nested transforms; PyTorch calls it for each level."""
    register_flop_formulas()
    if not torch._C._are_functorch_transforms_active():
        return function.apply(*inputs)
    with enable_single_level_autograd_function():
        return function.apply(*inputs)


def _autograd_of(name: str, function: type[Function]) -> Callable[..., Tensor]:
    """Autograd of an operator with the derivatives of ``function``."""
    forward = _below_autograd(getattr(_OPS, name).default)
    members = {**vars(function), "forward": staticmethod(forward)}
    return partial(_apply, type(function.__name__, (_SingleLevelFunction,), members))


class _LossFunction(_SingleLevelFunction):
    """Autograd of the loss. ``arguments`` are the operator's, without the maps.

    The outputs are one flat tuple: the loss, then its gradients.
    """

    @staticmethod
    def forward(arguments: tuple[Any, ...], *maps: Tensor) -> tuple[Tensor, ...]:
        loss, gradients = _below_autograd(_OPS.loss.default)(list(maps), *arguments)
        return loss, *gradients

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        (ready, ctx.needs, *_, reduction, _, _, _, _), *maps = inputs
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(*output[1:])
        # Not saved for backward, so that maps may change after the call: only their identity and
        # dtype are needed.
        wanted = [i for i, need in enumerate(ctx.needs) if need]
        ctx.wanted = [maps[i] for i in wanted]
        ctx.factors = factors_of(ready, wanted, reduction == "none")

    @staticmethod
    def backward(ctx: Any, incoming: Tensor, *_: Any) -> Any:
        how = [x.dtype for x in ctx.wanted], ctx.factors
        scaled = iter(scaled_by_torch(ctx.saved_tensors, *how, incoming, ctx.wanted))
        return None, *(next(scaled) if need else None for need in ctx.needs)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:  # noqa: ARG004
        raise RuntimeError(NO_FORWARD_MODE)


@torch.library.impl(_LIBRARY, "loss", "Autograd")
def _loss_autograd(
    maps: Sequence[Tensor],
    ready: Sequence[bool],
    needs: Sequence[bool],
    weights: Sequence[float],
    pool: str,
    norm: str,
    backend: str,
    changing: Tensor | None = None,
    reduction: str = "sum",
    symmetric: Sequence[bool] = (),
    student_mask: Tensor | None = None,
    teacher_mask: Tensor | None = None,
    shares_mask: bool = False,
) -> tuple[Tensor, list[Tensor]]:
    # PyTorch leaves out arguments that have their defaults.
    options = weights, pool, norm, backend, changing, reduction, symmetric
    arguments = ready, needs, *options, student_mask, teacher_mask, shares_mask
    loss, *gradients = _apply(_LossFunction, arguments, *maps)
    return loss, gradients


# --- flops --------------------------------------------------------------------------------------


def _product_flops(x: Tensor, y: Tensor, *_: Any, **__: Any) -> int:
    # Both take 2 B m n K: the matrix of (B, m, K), (B, n, K), its gradient of (B, m, n), (B, n, K).
    return 2 * x.shape[0] * x.shape[1] * y.shape[1] * y.shape[2]


def _loss_flops(
    maps: Sequence[Tensor],
    ready: Sequence[bool],
    needs: Sequence[bool],
    weights: Sequence[float],  # noqa: ARG001
    pool: str,
    norm: str,
    backend: str,
    changing: Tensor | None = None,  # noqa: ARG001
    reduction: str = "sum",
    symmetric: Sequence[bool] = (),
    student_mask: Tensor | None = None,
    teacher_mask: Tensor | None = None,
    shares_mask: bool = False,
    **_: Any,
) -> int:
    """The flops of value and gradients: the forward computes both, so backward counts none."""
    masks = _masks(student_mask, teacher_mask, shares_mask)
    return _plan(maps, ready, needs, pool, norm, backend, reduction, symmetric, masks).flops


FLOP_FORMULAS.update(
    {_OPS.matrix: _product_flops, _OPS.matrix_backward: _product_flops, _OPS.loss: _loss_flops}
)


# --- vmap ---------------------------------------------------------------------------------------


@torch.library.register_vmap("fsp::loss", lib=_LIBRARY)
def _loss_vmap(
    info: Any, in_dims: tuple[Any, ...], maps: Sequence[Tensor], *arguments: Any
) -> tuple[Any, Any]:
    """Compute one loss for each slice. Slices cannot be joined: a loss is a mean over its batch."""
    size = info.batch_size

    def slices_of(tensors: Sequence[Tensor], dims: Sequence[int | None]) -> list[list[Tensor]]:
        """For each slice, the tensors in it."""
        mapped = [
            [x] * max(1, size) if dim is None else _one_slice_at_least(x.movedim(dim, 0)).unbind()
            for x, dim in zip(tensors, dims, strict=True)
        ]
        return [list(x) for x in zip(*mapped, strict=True)]

    calls = [[x, *arguments] for x in slices_of(maps, in_dims[0])]
    for i, dim in enumerate(in_dims):
        if type(dim) is int:  # a mask
            for call, (mask,) in zip(calls, slices_of([arguments[i - 1]], [dim]), strict=True):
                call[i] = mask
    losses, gradients = zip(*(_OPS.loss(*call) for call in calls), strict=True)
    stacked = [torch.stack(slices)[:size] for slices in zip(*gradients, strict=True)]
    return (torch.stack(losses)[:size], stacked), (0, [0] * len(stacked))


def _fold_into_batch(
    function: Callable[..., Tensor],
    info: Any,
    in_dims: tuple[Any, ...],
    x: Tensor,
    y: Tensor,
    *rest: Any,
) -> tuple[Tensor, int]:
    """vmap of the other two operators: fold the mapped axis into the batch axis, then unfold it."""
    slices = max(1, info.batch_size)
    x, y = (
        t.expand(slices, *t.shape) if dim is None else _one_slice_at_least(t.movedim(dim, 0))
        for t, dim in zip((x, y), in_dims, strict=False)
    )
    folded = function(x.flatten(0, 1), y.flatten(0, 1), *rest)
    return folded.unflatten(0, (slices, -1))[: info.batch_size], 0


def _one_slice_at_least(x: Tensor) -> Tensor:
    """``x``, or a slice of zeros if its first axis is empty."""
    return x if len(x) else torch.cat((x, x.new_zeros(1, *x.shape[1:])))


for _name, _function, _call in (
    ("matrix", FSPMatrixFunction, matrix),
    ("matrix_backward", FSPMatrixGradientFunction, matrix_backward),
):
    _LIBRARY.impl(_name, _autograd_of(_name, _function), "Autograd")
    torch.library.register_vmap(f"fsp::{_name}", partial(_fold_into_batch, _call), lib=_LIBRARY)
