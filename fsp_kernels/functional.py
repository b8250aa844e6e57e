"""``fsp_matrix`` and ``fsp_loss``: check, plan, hand to a backend. Autograd is defined here, once.

Two roads lead to the same backends. Eager calls go through a bare ``autograd.Function``, the
cheapest way PyTorch has. Whoever must see an operator instead (the compiler, export, dispatch
modes, tensor subclasses) gets ``torch.ops.fsp``, defined in :mod:`fsp_kernels.operators` from the
functions of this module.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from fsp_kernels import checks
from fsp_kernels.backends import get_backend, requested_backend, select_backend
from fsp_kernels.loss_plan import LossPlan, MapSpec, PairSpec, TeacherSpec
from fsp_kernels.plan import plan_loss
from fsp_kernels.reference import match_spatial

Pair = tuple[Tensor, Tensor]

ONCE_DIFFERENTIABLE = (
    "fsp_loss is once differentiable: its gradient is computed together with its value, in one "
    "pass over the feature maps. For second derivatives compose it from fsp_matrix, which is twice "
    "differentiable: ((fsp_matrix(*student) - fsp_matrix(*teacher)) ** 2).sum() / batch_size "
    "for each pair."
)


def fsp_matrix(
    first: Tensor, second: Tensor, *, pool: str = "max", backend: str | None = None
) -> Tensor:
    """FSP matrix of two feature maps, ``G = F1 F2^T / K`` (Yim et al., CVPR 2017, equation 1).

    Twice differentiable. With ``first is second`` it is the Gram matrix of style transfer, with
    two networks' maps it is bilinear pooling.

    Args:
        first: feature map ``(B, m, *spatial)``, one to three spatial axes, any strides;
            fp64, fp32, fp16 or bf16.
        second: feature map ``(B, n, *spatial)`` with as many spatial axes. Where the spatial sizes
            differ, the larger is pooled to the smaller, axis by axis.
        pool: ``"max"`` (the paper) or ``"avg"``; windows as ``adaptive_max_pool2d`` and
            ``adaptive_avg_pool2d`` have them.
        backend: a name of :func:`available_backends`, or ``None`` for the best that works.

    Returns:
        ``(B, m, n)`` in the promoted dtype of the maps; half precision accumulates in fp32.

    Raises:
        TypeError: an argument is not a dense floating-point tensor.
        ValueError: shapes, devices, ``pool`` or ``backend`` do not fit; the message says which.
        RuntimeError: ``backend`` does not work on this machine.
    """
    specs = checks.spec_of("first", first), checks.spec_of("second", second)
    checks.check_pair(None, *specs)
    checks.check_choice("pool", pool, checks.POOLS)
    name = _select(requested_backend(backend), specs)
    if specs[0].shape[2:] != specs[1].shape[2:]:
        first, second = match_spatial(first, second, pool)
    return matrix(first.flatten(2), second.flatten(2), name)


def fsp_loss(
    student: Sequence[Pair],
    teacher: Sequence[Pair | Tensor],
    *,
    weights: Sequence[float] | None = None,
    pool: str = "max",
    norm: str = "frobenius",
    backend: str | None = None,
) -> Tensor:
    """FSP distillation loss ``1/B sum_b sum_i lambda_i ||G_i^T - G_i^S||^2`` (ibid., equation 2).

    Value and gradients are computed together in one pass over the maps; neither network's FSP
    matrices are formed, and their difference only for a chunk of samples at a time (:func:`explain`
    tells how many). Once differentiable. Gradients flow to every map that requires them,
    the teacher's too; under ``torch.no_grad()`` only the value is computed.

    Args:
        student: pairs ``(first, second)`` of feature maps ``(B, m, *spatial)``,
            ``(B, n, *spatial)``; see :func:`fsp_matrix` for ranks, strides and dtypes, which may
            differ from map to map.
        teacher: as many pairs with the same batch and channel counts (spatial sizes may differ),
            or in place of a pair a ready FSP matrix ``(B, m, n)``. One that :func:`fsp_matrix`
            computed of fp32 maps equal to the student's leaves no loss and no gradient on a CPU; on
            a GPU, or rounded to half precision, it may leave rounding errors, which
            ``norm="column"`` turns into a direction of length 1.
        weights: ``lambda_i >= 0``, one for each pair; ``None`` for ones.
        pool: how the larger map of a pair is brought to the smaller: ``"max"`` or ``"avg"``.
        norm: ``"frobenius"``, the batch mean of the sum of squares (the paper); ``"mse"``, the mean
            over batch and entries (RepDistiller, Knowledge-Distillation-Zoo); ``"column"``, the
            batch mean of the sum over columns of their L2 norms (torchdistill).
        backend: a name of :func:`available_backends`, or ``None`` for the best that works.

    Returns:
        A scalar, fp64 if any input is, else fp32; never negative.

        With ``eps`` the rounding error and ``s = (||a - c|| ||b|| + ||c|| ||b - d||) / K`` for maps
        ``a, b`` of the student and ``c, d`` of the teacher, the residual ``G^S - G^T`` is off by
        about ``eps s``. That is little where the maps are near each other, but more than in the
        naive op where the scale of a map differs between the networks and the matrices agree. On a
        GPU, and for fp64 maps, the loss in Gram form is off by ``eps s^2``.

        NaN or infinity in a map gives a loss that is NaN or infinite, whatever the weight. In the
        gradients it is wherever the formula has it, as NaN where that has infinity in some cases;
        the gradients of other samples do not see it.

    Raises:
        TypeError: something is not a dense floating-point tensor, not a pair, not a real number.
        ValueError: shapes, devices or options do not fit; the message says which and how.
        RuntimeError: ``backend`` does not work on this machine; or, from a second derivative, that
            the loss is once differentiable and what to write instead.
    """
    maps, student_specs, teacher_specs = checks.flatten_pairs(student, teacher)
    pairs = len(student_specs)
    lambdas = (1.0,) * pairs if weights is None else checks.check_weights(weights, pairs)
    checks.check_options(pool, norm)
    requested = requested_backend(backend)
    if wants_operator(maps):
        checks.check_loss(student_specs, teacher_specs)
        return _loss_operator(maps, student_specs, teacher_specs, lambdas, pool, norm, requested)
    plan = _plan_here(student_specs, teacher_specs, pool, norm, requested)
    if torch._C._are_functorch_transforms_active():
        return _TransformedLoss.apply(plan, lambdas, *maps)[0]
    return planned_loss(plan, lambdas, maps)


def explain(
    student: Sequence[Pair],
    teacher: Sequence[Pair | Tensor],
    *,
    pool: str = "max",
    norm: str = "frobenius",
    backend: str | None = None,
) -> LossPlan:
    """How :func:`fsp_loss` would evaluate these arguments, without computing anything.

    The plan prints as a table of evaluation, chunking, flops, bytes and extra memory; the same are
    its attributes. As in the loss itself, gradients count where maps require them and grad mode is
    on. Raises as :func:`fsp_loss`.
    """
    _, student_specs, teacher_specs = checks.flatten_pairs(student, teacher)
    checks.check_options(pool, norm)
    return _plan_here(student_specs, teacher_specs, pool, norm, requested_backend(backend))


def _plan_here(
    student: tuple[PairSpec, ...],
    teacher: tuple[TeacherSpec, ...],
    pool: str,
    norm: str,
    requested: str | None,
) -> LossPlan:
    """The plan under the grad mode and the transforms in force."""
    # Inside a functorch transform a tensor does not tell whether an outer level wants its gradient.
    all_or_none = None
    if torch._C._are_functorch_transforms_active():
        all_or_none = torch.is_grad_enabled()
    elif not torch.is_grad_enabled():
        all_or_none = False
    return _checked_plan(student, teacher, pool, norm, requested, all_or_none)


@lru_cache(maxsize=1024)
def _checked_plan(
    student: tuple[PairSpec, ...],
    teacher: tuple[TeacherSpec, ...],
    pool: str,
    norm: str,
    requested: str | None,
    all_or_none: bool | None,
) -> LossPlan:
    """Checks and plan of a signature; a hit skips both, and failures are not remembered.

    ``all_or_none`` says that all maps want a gradient, or none, whatever each of them requires.
    """
    if all_or_none is not None:
        student, teacher = _want(student, all_or_none), _want(teacher, all_or_none)
    checks.check_loss(student, teacher)
    specs = [spec for entry in (*student, *teacher) for spec in entry]
    return plan_loss(student, teacher, pool, norm, _select(requested, specs))


def _select(requested: str | None, specs: Sequence[MapSpec]) -> str:
    return select_backend(requested, specs[0].device, tuple({s.dtype: None for s in specs})).name


def _want(specs: Any, wanted: bool) -> Any:
    """The same maps, all or none of which want a gradient."""
    return tuple(tuple(s._replace(requires_grad=wanted) for s in entry) for entry in specs)


def wants_operator(maps: Sequence[Tensor]) -> bool:
    """Whether something stands between this call and the kernels that must see an operator."""
    return (
        torch.compiler.is_compiling()
        or is_in_torch_dispatch_mode()
        or any(type(x) not in (Tensor, torch.nn.Parameter) for x in maps)
    )


def _loss_operator(
    maps: list[Tensor],
    student: tuple[PairSpec, ...],
    teacher: tuple[TeacherSpec, ...],
    weights: tuple[float, ...],
    pool: str,
    norm: str,
    requested: str | None,
) -> Tensor:
    specs = [spec for s, t in zip(student, teacher, strict=True) for spec in (*s, *t)]
    enabled = torch.is_grad_enabled()
    needs = [enabled and spec.requires_grad for spec in specs]
    ready = [len(entry) == 1 for entry in teacher]
    loss: Tensor = torch.ops.fsp.loss(
        maps, ready, needs, list(weights), pool, norm, _select(requested, specs)
    )[0]
    return loss


def planned_loss(plan: LossPlan, weights: tuple[float, ...], maps: Sequence[Tensor]) -> Tensor:
    """The loss as a plan has it, checked by nobody, with autograd."""
    loss: Tensor = _Loss.apply(plan, weights, *maps)
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


class _Loss(torch.autograd.Function):
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
        scaled: Sequence[Tensor]
        with without_autograd():
            scaled = get_backend(plan.backend).scale(
                ctx.gradients, plan.wanted_dtypes, incoming, in_place=not keep
            )
        if torch.is_grad_enabled():
            scaled = forbid_second_derivative(scaled, ctx.wanted)
        if not keep:
            ctx.gradients = ctx.wanted = None
        return None, None, *plan.spread(scaled)


class _TransformedLoss(torch.autograd.Function):
    """:class:`_Loss` in the form functorch transforms ask for: what backward needs is an output."""

    @staticmethod
    def forward(plan: LossPlan, weights: tuple[float, ...], *maps: Tensor) -> tuple[Tensor, ...]:
        loss, gradients = run_loss(maps, plan, weights)
        return loss, *gradients

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.plan, _, *maps = inputs
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(*output[1:], *maps)

    @staticmethod
    def backward(ctx: Any, incoming: Tensor, *_: Any) -> Any:
        dtypes = ctx.plan.wanted_dtypes
        gradients, maps = ctx.saved_tensors[: len(dtypes)], ctx.saved_tensors[len(dtypes) :]
        scaled = forbid_second_derivative(
            [(g * incoming).to(dtype) for g, dtype in zip(gradients, dtypes, strict=True)], maps
        )
        return None, None, *ctx.plan.spread(scaled)

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[Any, ...], plan: LossPlan, weights: Any, *maps: Tensor
    ) -> Any:
        """One loss for each slice: a mean over the batch does not fold into a larger batch."""
        slices = [
            _TransformedLoss.apply(
                plan,
                weights,
                *(
                    x if d is None else x.select(d, i)
                    for x, d in zip(maps, in_dims[2:], strict=True)
                ),
            )
            for i in range(info.batch_size)
        ]
        stacked = tuple(torch.stack(outputs) for outputs in zip(*slices, strict=True))
        return stacked, (0,) * len(stacked)


def forbid_second_derivative(
    gradients: Sequence[Tensor], maps: Sequence[Tensor]
) -> Sequence[Tensor]:
    """The same gradients, but to differentiate them by ``maps`` is an error, not a silent zero."""
    return _OnceDifferentiable.apply(len(gradients), *gradients, *maps)


class _OnceDifferentiable(torch.autograd.Function):
    @staticmethod
    def forward(count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(g.view_as(g) for g in tensors[:count])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *incoming: Tensor) -> Any:  # noqa: ARG004
        raise RuntimeError(ONCE_DIFFERENTIABLE)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], count: int, *tensors: Tensor) -> Any:  # noqa: ARG004
        return _OnceDifferentiable.apply(count, *tensors), in_dims[1 : count + 1]


def matrix(first: Tensor, second: Tensor, backend: str) -> Tensor:
    """``F1 F2^T / K``: ``(B, m, K), (B, n, K) -> (B, m, n)``, by the road the call needs."""
    if wants_operator((first, second)):
        result: Tensor = torch.ops.fsp.matrix(first, second, backend)
        return result
    return _Matrix.apply(first, second, backend)


def matrix_backward(gradient: Tensor, other: Tensor, channels_last: bool, backend: str) -> Tensor:
    """``G' F / K``: ``(B, m, n), (B, n, K) -> (B, m, K)``, what reaches one map of a matrix.

    With :func:`matrix` it is a closed set: the derivatives of both are made of these two.
    """
    if wants_operator((gradient, other)):
        result: Tensor = torch.ops.fsp.matrix_backward(gradient, other, channels_last, backend)
        return result
    return _MatrixBackward.apply(gradient, other, channels_last, backend)


class _Matrix(torch.autograd.Function):
    @staticmethod
    def forward(first: Tensor, second: Tensor, backend: str) -> Tensor:
        with outside_autocast(first.device.type):
            return get_backend(backend).matrix(first, second)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG004
        first, second, ctx.backend = inputs
        ctx.save_for_backward(first, second)

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
    def vmap(info: Any, in_dims: tuple[Any, ...], first: Tensor, second: Tensor, *rest: Any) -> Any:
        return _fold_into_batch(matrix, info.batch_size, in_dims, first, second, *rest)


class _MatrixBackward(torch.autograd.Function):
    @staticmethod
    def forward(gradient: Tensor, other: Tensor, channels_last: bool, backend: str) -> Tensor:
        with outside_autocast(gradient.device.type):
            return get_backend(backend).matrix_backward(gradient, other, channels_last)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG004
        gradient, other, _, ctx.backend = inputs
        ctx.save_for_backward(gradient, other)

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
    def vmap(
        info: Any, in_dims: tuple[Any, ...], gradient: Tensor, other: Tensor, *rest: Any
    ) -> Any:
        return _fold_into_batch(matrix_backward, info.batch_size, in_dims, gradient, other, *rest)


def _fold_into_batch(
    function: Callable[..., Tensor],
    size: int,
    in_dims: tuple[Any, ...],
    x: Tensor,
    y: Tensor,
    *rest: Any,
) -> tuple[Tensor, int]:
    """The vmap rule of both: the mapped axis joins the batch axis and leaves it again."""
    x, y = (
        t.unsqueeze(0).expand(size, *t.shape) if dim is None else t.movedim(dim, 0)
        for t, dim in zip((x, y), in_dims, strict=False)
    )
    return function(x.flatten(0, 1), y.flatten(0, 1), *rest).unflatten(0, (size, -1)), 0


def _channels_last(flat: Tensor) -> bool:
    """Whether a ``(B, C, K)`` map has its channels next to each other in memory."""
    return flat.stride(1) == 1 and flat.stride(2) != 1
