"""``fsp_matrix`` and ``fsp_loss``: check, plan, hand to a backend. Autograd is defined here, once.

Two roads lead to the same backends. Eager calls go through a bare ``autograd.Function``, the
cheapest way PyTorch has. Whoever must see an operator instead (the compiler, export, dispatch
modes, tensor subclasses) gets ``torch.ops.fsp``, defined in :mod:`fsp_kernels.operators` from the
functions of this module.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from fsp_kernels import checks
from fsp_kernels.backends import Backend, get_backend, requested_backend, select_backend
from fsp_kernels.backends.fused import fp32_precision
from fsp_kernels.loss_plan import LossPlan, MapSpec, PairSpec, TeacherSpec
from fsp_kernels.plan import plan_loss
from fsp_kernels.pooling import match_spatial

Pair = tuple[Tensor, Tensor]

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


def fsp_matrix(
    first: Tensor,
    second: Tensor,
    *,
    pool: str = "max",
    backend: str | None = None,
    channel_dim: int | None = None,
) -> Tensor:
    """FSP matrix of two feature maps, ``G = F1 F2^T / K`` (Yim et al., CVPR 2017, equation 1).

    Twice differentiable, in reverse and in forward mode. With ``first is second`` it is the Gram
    matrix of style transfer, with two networks' maps it is bilinear pooling.

    Args:
        first: feature map ``(B, m, *spatial)``, one to three spatial axes, any strides;
            fp64, fp32, fp16 or bf16.
        second: feature map ``(B, n, *spatial)`` with as many spatial axes. Where the spatial sizes
            differ, the larger is pooled to the smaller, axis by axis.
        pool: ``"max"`` (the paper) or ``"avg"``; windows as ``adaptive_max_pool2d`` and
            ``adaptive_avg_pool2d`` have them.
        backend: a name of :func:`available_backends`, or ``None`` for the best that works.
        channel_dim: the axis of both maps' channels: 1 for ``(B, C, *spatial)``, -1 for
            ``(B, *spatial, C)``, which is read as it is. ``None`` means 1 for maps of four and five
            axes and is an error for three, where ``(B, C, K)`` and a transformer's ``(B, T, C)``
            look alike.

    Returns:
        ``(B, m, n)`` in the promoted dtype of the maps; half precision accumulates in fp32.

    Raises:
        TypeError: an argument is not a dense floating-point tensor.
        ValueError: shapes, devices, ``pool`` or ``backend`` do not fit; the message says which.
        RuntimeError: ``backend`` does not work on this machine, or the call is inside
            ``torch.jit.trace``.
    """
    checks.check_not_traced()
    specs = checks.spec_of("first", first), checks.spec_of("second", second)
    if channel_dim is not None:
        checks.check_channel_dim(channel_dim)
    if channel_dim == -1:
        first, second = checks.channels_first(first), checks.channels_first(second)
        specs = MapSpec.of(first), MapSpec.of(second)
    checks.check_pair(None, *specs, channel_dim)
    checks.check_choice("pool", pool, checks.POOLS)
    name = _select(requested_backend(backend), specs).name
    if specs[0].shape[2:] != specs[1].shape[2:]:
        first, second = match_spatial(first, second, pool)
    return matrix(first.flatten(2), second.flatten(2), name)


def fsp_loss(
    student: Sequence[Pair],
    teacher: Sequence[Pair | Tensor],
    *,
    weights: Sequence[float] | Tensor | None = None,
    pool: str = "max",
    norm: str = "frobenius",
    backend: str | None = None,
    channel_dim: int | None = None,
) -> Tensor:
    """FSP distillation loss ``1/B sum_b sum_i lambda_i ||G_i^T - G_i^S||^2`` (ibid., equation 2).

    Value and gradients are computed together in one pass over the maps; neither network's FSP
    matrices are formed, and their difference only for a chunk of samples at a time (:func:`explain`
    tells how many). Once differentiable, in reverse mode. Gradients flow to every map that requires
    them, the teacher's too; under ``torch.no_grad()`` only the value is computed.

    Args:
        student: pairs ``(first, second)`` of feature maps ``(B, m, *spatial)``,
            ``(B, n, *spatial)``; see :func:`fsp_matrix` for ranks, strides and dtypes, which may
            differ from map to map.
        teacher: as many pairs with the same batch and channel counts (spatial sizes may differ),
            or in place of a pair a ready FSP matrix ``(B, m, n)``, or ``(1, m, n)`` for all
            samples.
        weights: ``lambda_i >= 0``, one for each pair; ``None`` for ones. Numbers, or a 1-D
            floating-point tensor on the CPU or beside the maps. A tensor on the CPU that requires
            no gradient is read like numbers. Any other is not read back, so its values are not
            checked; each pair is then evaluated on its own, which takes more launches, and the
            weights get a gradient if they require one.
        pool: how the larger map of a pair is brought to the smaller: ``"max"`` or ``"avg"``.
        norm: ``"frobenius"``, the batch mean of the sum of squares (the paper); ``"mse"``, the mean
            over batch and entries (RepDistiller, Knowledge-Distillation-Zoo); ``"column"``, the
            batch mean of the sum over columns of their L2 norms (torchdistill).
        backend: a name of :func:`available_backends`, or ``None`` for the best that works.
        channel_dim: the axis of all maps' channels, 1 or -1, as in :func:`fsp_matrix`; maps of
            three axes need it, ready matrices do not.

    Returns:
        A scalar, fp64 if any input is, else fp32.

    Raises:
        TypeError: something is not a dense floating-point tensor, not a pair, not a real number.
        ValueError: shapes, devices or options do not fit; the message says which and how.
        RuntimeError: ``backend`` does not work on this machine; the call is inside
            ``torch.jit.trace``; or, from a second or a forward-mode derivative, that the loss has
            none and what to write instead.
    """
    checks.check_not_traced()
    maps, student_specs, teacher_specs = checks.flatten_pairs(student, teacher, channel_dim)
    pairs = len(student_specs)
    checks.check_options(pool, norm)
    requested = requested_backend(backend)
    if weights is None:
        lambdas: tuple[float, ...] | Tensor = (1.0,) * pairs
    else:
        lambdas = _read_weights(weights, student_specs)
    if isinstance(lambdas, Tensor) and not _is_readable(lambdas):
        checks.check_loss(student_specs, teacher_specs, channel_dim)
        one = partial(fsp_loss, pool=pool, norm=norm, backend=backend, channel_dim=channel_dim)
        losses = [one([s], [t]) for s, t in zip(student, teacher, strict=True)]
        stacked = torch.stack(losses)
        return (stacked * lambdas.to(stacked)).sum()
    if isinstance(lambdas, Tensor) or wants_operator(maps):
        checks.check_loss(student_specs, teacher_specs, channel_dim)
        return _loss_operator(maps, student_specs, teacher_specs, lambdas, pool, norm, requested)
    plan = _plan_here(student_specs, teacher_specs, pool, norm, requested, channel_dim)
    return planned_loss(plan, lambdas, maps)


def explain(
    student: Sequence[Pair],
    teacher: Sequence[Pair | Tensor],
    *,
    pool: str = "max",
    norm: str = "frobenius",
    backend: str | None = None,
    channel_dim: int | None = None,
) -> LossPlan:
    """How :func:`fsp_loss` would evaluate these arguments, without computing anything.

    The plan prints as a table of evaluation, chunking, flops, bytes and extra memory; the same are
    its attributes. As in the loss itself, gradients count where maps require them and grad mode is
    on. Raises as :func:`fsp_loss`.
    """
    _, student_specs, teacher_specs = checks.flatten_pairs(student, teacher, channel_dim)
    checks.check_options(pool, norm)
    requested = requested_backend(backend)
    return _plan_here(student_specs, teacher_specs, pool, norm, requested, channel_dim)


def _plan_here(
    student: tuple[PairSpec, ...],
    teacher: tuple[TeacherSpec, ...],
    pool: str,
    norm: str,
    requested: str | None,
    channel_dim: int | None,
) -> LossPlan:
    """The plan under the grad mode and the transforms in force."""
    # Inside a functorch transform a tensor does not tell whether an outer level wants its gradient.
    all_or_none = None
    if torch._C._are_functorch_transforms_active():
        all_or_none = torch.is_grad_enabled()
    elif not torch.is_grad_enabled():
        all_or_none = False
    signature = student, teacher, pool, norm, requested, channel_dim
    return _checked_plan(*signature, all_or_none, fp32_precision())


@lru_cache(maxsize=1024)
def _checked_plan(
    student: tuple[PairSpec, ...],
    teacher: tuple[TeacherSpec, ...],
    pool: str,
    norm: str,
    requested: str | None,
    channel_dim: int | None,
    all_or_none: bool | None,
    precision: str,
) -> LossPlan:
    """Checks and plan of a signature; a hit skips both, and failures are not remembered.

    ``all_or_none`` says that all maps want a gradient, or none, whatever each of them requires.
    """
    if all_or_none is not None:
        student, teacher = _want(student, all_or_none), _want(teacher, all_or_none)
    checks.check_loss(student, teacher, channel_dim)
    specs = [spec for entry in (*student, *teacher) for spec in entry]
    return plan_loss(student, teacher, pool, norm, _select(requested, specs), precision)


def _select(requested: str | None, specs: Sequence[MapSpec]) -> Backend:
    return select_backend(requested, specs[0].device, tuple({s.dtype: None for s in specs}))


def _want(specs: Any, wanted: bool) -> Any:
    """The same maps, all or none of which want a gradient."""
    return tuple(tuple(s._replace(requires_grad=wanted) for s in entry) for entry in specs)


def _read_weights(
    weights: Sequence[float] | Tensor, student: Sequence[PairSpec]
) -> tuple[float, ...] | Tensor:
    """The checked weights: numbers where they are known now, else a tensor."""
    pairs = len(student)
    if torch.compiler.is_compiling() and isinstance(weights, (list, tuple)):
        from torch.fx.experimental.symbolic_shapes import has_static_value

        # A number that changes from call to call: as a number it would be compiled in.
        if not all(has_static_value(x) for x in weights if isinstance(x, (int, float))):
            weights = torch.stack([x * torch.ones((), dtype=torch.float64) for x in weights])
    if not isinstance(weights, Tensor):
        return checks.check_weights(weights, pairs)
    checks.check_weight_tensor(weights, pairs, student[0][0].device)
    if _is_readable(weights) and not wants_operator((weights,)):
        return checks.check_weights(weights.tolist(), pairs)
    return weights


def _is_readable(weights: Tensor) -> bool:
    """Whether only the values count, and reading them stalls no device."""
    return weights.device.type == "cpu" and not (
        weights.requires_grad
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
    )


def wants_operator(maps: Sequence[Tensor]) -> bool:
    """Whether something stands between this call and the kernels that must see an operator."""
    return (
        torch.compiler.is_compiling()
        or is_in_torch_dispatch_mode()
        or torch._C._are_functorch_transforms_active()
        or not _PLAIN.issuperset(map(type, maps))
    )


_PLAIN = frozenset((Tensor, torch.nn.Parameter))


def _loss_operator(
    maps: list[Tensor],
    student: tuple[PairSpec, ...],
    teacher: tuple[TeacherSpec, ...],
    weights: tuple[float, ...] | Tensor,
    pool: str,
    norm: str,
    requested: str | None,
) -> Tensor:
    specs = [spec for s, t in zip(student, teacher, strict=True) for spec in (*s, *t)]
    # Inside a functorch transform a tensor does not tell whether an outer level wants its gradient.
    any_map, enabled = torch._C._are_functorch_transforms_active(), torch.is_grad_enabled()
    needs = [enabled and (any_map or spec.requires_grad) for spec in specs]
    ready = [len(entry) == 1 for entry in teacher]
    backend = _select(requested, specs).name
    numbers, changing = ([], weights) if isinstance(weights, Tensor) else (list(weights), None)
    outputs = torch.ops.fsp.loss(maps, ready, needs, numbers, pool, norm, backend, changing)
    loss: Tensor = outputs[0]
    return loss


def planned_loss(plan: LossPlan, weights: tuple[float, ...], maps: Sequence[Tensor]) -> Tensor:
    """The loss as a plan has it, checked by nobody, with autograd."""
    loss: Tensor = FSPLossFunction.apply(plan, weights, *maps)
    return loss


def run_loss(
    maps: Sequence[Tensor], plan: LossPlan, weights: Sequence[float]
) -> tuple[Tensor, list[Tensor]]:
    """Loss and gradients by the plan's backend, untouched by autograd and autocast."""
    with without_autograd(), outside_autocast(plan.device):
        return get_backend(plan.backend).loss(maps, plan, weights)


def without_autograd() -> AbstractContextManager[Any]:
    """``torch.no_grad()`` where it is not in force already, as it is within a ``Function``."""
    return torch.no_grad() if torch.is_grad_enabled() else _NOTHING


def outside_autocast(device: str) -> AbstractContextManager[Any]:
    """Autocast would round the products' fp32 operands, which accumulation is there to avoid."""
    if _has_autocast(device) and torch.is_autocast_enabled(device):
        return torch.autocast(device, enabled=False)
    return _NOTHING


_NOTHING: AbstractContextManager[Any] = nullcontext()
_has_autocast = lru_cache(torch.amp.is_autocast_available)


class FSPLossFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, plan: LossPlan, weights: tuple[float, ...], *maps: Tensor) -> Tensor:
        loss, gradients = run_loss(maps, plan, weights)
        ctx.plan, ctx.gradients = plan, gradients
        # Not saved: only their identity matters, and only to a second derivative.
        ctx.wanted = [x for x, m in zip(maps, plan.maps, strict=True) if m.gradient_dtype]
        return loss

    @staticmethod
    def backward(ctx: Any, incoming: Tensor) -> Any:
        if ctx.gradients is None:
            raise RuntimeError(
                "Trying to backward through fsp_loss a second time, after its gradients were "
                "handed out; specify retain_graph=True the first time."
            )
        # Gradients that no later backward can ask for are given away: scaled in place, and taken
        # by the leaves without a copy.
        keep = torch._C._autograd._get_current_graph_task_keep_graph()
        plan: LossPlan = ctx.plan
        if _is_differentiated(incoming):
            scaled = scaled_by_torch(ctx.gradients, plan.wanted_dtypes, incoming, ctx.wanted)
        else:
            scaled = get_backend(plan.backend).scale(
                ctx.gradients, plan.wanted_dtypes, incoming, in_place=not keep
            )
        if not keep:
            ctx.gradients = ctx.wanted = None
        return None, None, *plan.spread(scaled)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:  # noqa: ARG004
        raise RuntimeError(NO_FORWARD_MODE)


def _is_differentiated(incoming: Tensor) -> bool:
    """Whether what a backward does now is batched or has derivatives of its own."""
    return (
        torch.is_grad_enabled()
        or forward_ad._current_level >= 0
        or _is_batched(incoming)
        or torch._C._functorch.is_functorch_wrapped_tensor(incoming)
    )


_is_batched = torch._C._functorch.is_legacy_batchedtensor  # by ``is_grads_batched`` and the like


def scaled_by_torch(
    gradients: Sequence[Tensor],
    dtypes: Sequence[torch.dtype],
    incoming: Tensor,
    maps: Sequence[Tensor],
) -> list[Tensor]:
    """``gradients * incoming`` by PyTorch, differentiable in ``incoming``.

    Their derivative by ``maps`` is not known: to ask for it is an error, not a silent zero.
    """
    if torch.is_grad_enabled():
        incoming = incoming + _SecondDerivative.apply(*maps)
    return [(g * incoming).to(dtype) for g, dtype in zip(gradients, dtypes, strict=True)]


class _SecondDerivative(torch.autograd.Function):
    """A zero that depends on maps in a way nobody may ask for."""

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
    """``F1 F2^T / K``: ``(B, m, K), (B, n, K) -> (B, m, n)``, by the road the call needs."""
    if wants_operator((first, second)):
        result: Tensor = torch.ops.fsp.matrix(first, second, backend)
        return result
    return FSPMatrixFunction.apply(first, second, backend)


def matrix_backward(gradient: Tensor, other: Tensor, channels_last: bool, backend: str) -> Tensor:
    """``G' F / K``: ``(B, m, n), (B, n, K) -> (B, m, K)``, what reaches one map of a matrix.

    With :func:`matrix` it is a closed set: the derivatives of both are made of these two.
    """
    if wants_operator((gradient, other)) or _is_batched(gradient):
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
    """Keep both inputs for derivatives; PyTorch keeps no inference tensor, but a copy of one."""
    if (x.is_inference() or y.is_inference()) and any(ctx.needs_input_grad):
        x, y = (t.clone() if t.is_inference() else t for t in (x, y))
    ctx.save_for_backward(x, y)
    ctx.save_for_forward(x, y)


def _bilinear_jvp(
    function: Callable[..., Tensor], ctx: Any, to_x: Tensor | None, to_y: Tensor | None, *rest: Any
) -> Tensor:
    """The forward-mode derivative of a product of the two saved inputs, from their tangents."""
    x, y = ctx.saved_tensors
    terms = [] if to_x is None else [function(to_x, y, *rest)]
    terms += [] if to_y is None else [function(x, to_y, *rest)]
    return sum(terms[1:], terms[0])


def _channels_last(flat: Tensor) -> bool:
    """Whether a ``(B, C, K)`` map has its channels next to each other in memory."""
    return flat.stride(1) == 1 and flat.stride(2) != 1
