"""``torch.ops.fsp``: the same computations as operators, for those who must see one.

The compiler, ``torch.export``, dispatch modes and tensor subclasses come this way; see
:mod:`fsp_kernels.functional`, which holds the formulas and the autograd they share.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fsp_kernels.backends import get_backend
from fsp_kernels.backends.fused import fp32_precision
from fsp_kernels.functional import (
    _Matrix,
    _MatrixBackward,
    forbid_second_derivative,
    run_loss,
)
from fsp_kernels.loss_plan import LossPlan, MapSpec
from fsp_kernels.plan import accumulation_dtype, gradient_dtype, plan_loss

_LIBRARY = torch.library.Library("fsp", "DEF")
_LIBRARY.define("matrix(Tensor first, Tensor second, str backend) -> Tensor")
_LIBRARY.define(
    "matrix_backward(Tensor gradient, Tensor other, bool channels_last, str backend) -> Tensor"
)
# `maps` are flattened pair by pair, student before teacher; `ready[i]` says that the teacher of
# pair i is one FSP matrix, `needs[j]` that maps[j] wants a gradient. Returns the loss and those.
_LIBRARY.define(
    "loss(Tensor[] maps, bool[] ready, bool[] needs, float[] weights, str pool, str norm, "
    "str backend) -> (Tensor, Tensor[])"
)


@torch.library.impl(_LIBRARY, "matrix", "CompositeExplicitAutograd")
def _matrix(first: Tensor, second: Tensor, backend: str) -> Tensor:
    return _Matrix.forward(first, second, backend)


@torch.library.register_fake("fsp::matrix", lib=_LIBRARY)
def _matrix_fake(first: Tensor, second: Tensor, backend: str) -> Tensor:  # noqa: ARG001
    dtype = torch.promote_types(first.dtype, second.dtype)
    return first.new_empty(first.shape[0], first.shape[1], second.shape[1], dtype=dtype)


@torch.library.impl(_LIBRARY, "matrix_backward", "CompositeExplicitAutograd")
def _matrix_backward(gradient: Tensor, other: Tensor, channels_last: bool, backend: str) -> Tensor:
    return _MatrixBackward.forward(gradient, other, channels_last, backend)


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


for _name, _function in (("fsp::matrix", _Matrix), ("fsp::matrix_backward", _MatrixBackward)):
    torch.library.register_autograd(
        _name, _function.backward, setup_context=_function.setup_context, lib=_LIBRARY
    )


@torch.library.impl(_LIBRARY, "loss", "CompositeExplicitAutograd")
def _loss(
    maps: Sequence[Tensor],
    ready: Sequence[bool],
    needs: Sequence[bool],
    weights: Sequence[float],
    pool: str,
    norm: str,
    backend: str,
) -> tuple[Tensor, list[Tensor]]:
    return run_loss(maps, _plan(maps, ready, needs, pool, norm, backend), weights)


@torch.library.register_fake("fsp::loss", lib=_LIBRARY)
def _loss_fake(
    maps: Sequence[Tensor],
    ready: Sequence[bool],  # noqa: ARG001
    needs: Sequence[bool],
    weights: Sequence[float],  # noqa: ARG001
    pool: str,  # noqa: ARG001
    norm: str,  # noqa: ARG001
    backend: str,  # noqa: ARG001
) -> tuple[Tensor, list[Tensor]]:
    gradients = [
        torch.empty_like(x, dtype=gradient_dtype(x.dtype))
        for x, need in zip(maps, needs, strict=True)
        if need
    ]
    return maps[0].new_empty((), dtype=accumulation_dtype(*(x.dtype for x in maps))), gradients


def _plan(
    maps: Sequence[Tensor],
    ready: Sequence[bool],
    needs: Sequence[bool],
    pool: str,
    norm: str,
    backend: str,
) -> LossPlan:
    specs = iter(
        [MapSpec.of(x)._replace(requires_grad=n) for x, n in zip(maps, needs, strict=True)]
    )
    student, teacher = [], []
    for is_matrix in ready:
        student.append((next(specs), next(specs)))
        teacher.append((next(specs),) if is_matrix else (next(specs), next(specs)))
    return plan_loss(
        tuple(student), tuple(teacher), pool, norm, get_backend(backend), fp32_precision()
    )


def _loss_setup_context(
    ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, list[Tensor]]
) -> None:
    maps, _, ctx.needs = inputs[:3]
    ctx.dtypes = [x.dtype for x in maps]
    gradients = output[1]
    ctx.mark_non_differentiable(*gradients)
    ctx.save_for_backward(*gradients)
    # Not saved: only their identity matters, and only to a second derivative.
    ctx.wanted = [x for x, need in zip(maps, ctx.needs, strict=True) if need]


def _loss_backward(ctx: Any, incoming: Tensor, _: Any) -> tuple[Any, ...]:
    scaled: Sequence[Tensor] = [g * incoming for g in ctx.saved_tensors]
    if torch.is_grad_enabled():
        scaled = forbid_second_derivative(scaled, ctx.wanted)
    given = iter(scaled)
    spread = [
        next(given).to(dtype) if need else None
        for need, dtype in zip(ctx.needs, ctx.dtypes, strict=True)
    ]
    return spread, None, None, None, None, None, None


torch.library.register_autograd(
    "fsp::loss", _loss_backward, setup_context=_loss_setup_context, lib=_LIBRARY
)
