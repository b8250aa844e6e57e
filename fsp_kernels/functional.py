"""``fsp_matrix`` and ``fsp_loss``: they check their inputs, plan, and call autograd's functions."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fsp_kernels import checks
from fsp_kernels.autograd import matrix, needs_operator, planned_loss
from fsp_kernels.backends import Backend, requested_backend, select_backend
from fsp_kernels.backends.devices import fp32_precision
from fsp_kernels.backends.tensors import counts
from fsp_kernels.loss_plan import (
    LossPlan,
    MapSpec,
    MaskIndices,
    Masks,
    by_network,
    seconds_of,
)
from fsp_kernels.plan import accumulation_dtype, plan_loss, symmetric_pairs
from fsp_kernels.pooling import match_spatial

Pair = tuple[Tensor, Tensor]


def fsp_matrix(
    first: Tensor,
    second: Tensor,
    *,
    pool: str = "max",
    backend: str | None = None,
    channel_dim: int | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """FSP matrix of two feature maps, ``G = F1 F2^T / K`` (Yim et al., CVPR 2017, equation 1).

    Twice differentiable, in reverse and in forward mode. With ``first is second`` it is the Gram
    matrix of style transfer, with two networks' maps it is bilinear pooling.

    Args:
        first: feature map ``(B, m, *spatial)``, one to three spatial axes, any strides;
            fp64, fp32, fp16 or bf16.
        second: feature map ``(B, n, *spatial)`` with as many spatial axes. Where the spatial sizes
            differ, the larger is pooled to the smaller, axis by axis.
        pool: ``"max"`` (the paper) or ``"avg"``; the windows are those of ``adaptive_max_pool2d``
            and ``adaptive_avg_pool2d``.
        backend: a name of :func:`available_backends`, or ``None`` for the best that works.
        channel_dim: the axis of both maps' channels: 1 for ``(B, C, *spatial)``, -1 for
            ``(B, *spatial, C)``, which is not copied. ``None`` means 1 for maps of four and five
            axes. It is an error for maps of three axes, because ``(B, C, K)`` and a transformer's
            ``(B, T, C)`` look the same.
        mask: ``(B, *spatial)`` of bool, true where a position counts, for padded sequences and
            ragged crops. Other positions contribute nothing, whatever they hold, and ``K`` is the
            number of positions that count in each sample. A sample without any has a zero matrix.
            Both maps must have the mask's spatial size.

    Returns:
        ``(B, m, n)`` in the promoted dtype of the maps; half precision accumulates in fp32.

    Raises:
        TypeError: an argument is not a dense floating-point tensor.
        ValueError: a shape, device, ``pool`` or ``backend`` is wrong; the message says which.
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
    if mask is not None:
        checks.check_mask(mask, *specs, channel_dim)
    name = _select(requested_backend(backend), specs).name
    if mask is not None:
        return _masked_matrix(first.flatten(2), second.flatten(2), mask.flatten(1), name)
    if specs[0].shape[2:] != specs[1].shape[2:]:
        first, second = match_spatial(first, second, pool)
    return matrix(first.flatten(2), second.flatten(2), name)


def _masked_matrix(first: Tensor, second: Tensor, mask: Tensor, backend: str) -> Tensor:
    """The matrix of ``(B, m, K)`` and ``(B, n, K)`` over the positions of ``mask (B, K)``."""
    hidden = ~mask[:, None]
    result = matrix(first.masked_fill(hidden, 0), second.masked_fill(hidden, 0), backend)
    wide = result.to(accumulation_dtype(result.dtype))
    rescale = mask.shape[1] / counts(mask, wide.dtype)
    return (wide * rescale[:, None, None]).to(result.dtype)


def fsp_loss(
    student: Sequence[Pair],
    teacher: Sequence[Pair | Tensor],
    *,
    weights: Sequence[float] | Tensor | None = None,
    pool: str = "max",
    norm: str = "frobenius",
    reduction: str = "sum",
    backend: str | None = None,
    channel_dim: int | None = None,
    student_mask: Tensor | None = None,
    teacher_mask: Tensor | None = None,
) -> Tensor:
    """FSP distillation loss ``1/B sum_b sum_i lambda_i ||G_i^T - G_i^S||^2`` (ibid., equation 2).

    Value and gradients are computed together in one pass over the maps. The FSP matrices of the
    networks are never formed; their difference is formed only for a chunk of samples at a time
    (:func:`explain` tells how many). The loss is once differentiable, in reverse mode. Every map
    that requires a gradient gets it, the teacher's maps too. Under ``torch.no_grad()`` only the
    value is computed.

    A pair may be a map with itself, as in style transfer. If both are the same tensor, in the
    teacher too unless its matrix is ready, up to half of the work is saved.

    Args:
        student: pairs ``(first, second)`` of feature maps ``(B, m, *spatial)``,
            ``(B, n, *spatial)``; see :func:`fsp_matrix` for ranks, strides and dtypes, which may
            differ from map to map.
        teacher: as many pairs with the same batch and channel counts (spatial sizes may differ).
            A pair may be replaced by a ready FSP matrix ``(B, m, n)``, or ``(1, m, n)`` for all
            samples. If :func:`fsp_matrix` computed it from fp32 maps equal to the student's, loss
            and gradient are zero on a CPU. On a GPU, or if the matrix was rounded to half
            precision, rounding errors may remain; ``norm="column"`` turns them into a direction of
            length 1.
        weights: ``lambda_i >= 0``, one for each pair; ``None`` for ones. Numbers, or a 1-D
            floating-point tensor on the CPU or on the maps' device. A tensor on the CPU that
            requires no gradient is read like numbers. The values of any other tensor are neither
            read nor checked; the weights get a gradient if they require one.
        pool: how the larger map of a pair is pooled to the smaller: ``"max"`` or ``"avg"``.
        norm: ``"frobenius"``, the batch mean of the sum of squares (the paper); ``"mse"``, the mean
            over batch and entries (RepDistiller, Knowledge-Distillation-Zoo, TextBrewer);
            ``"column"``, the batch mean of the sum over columns of their L2 norms (torchdistill).
        reduction: ``"sum"`` for the weighted sum over the pairs; ``"none"`` for the weighted loss
            of each pair, ``(pairs,)``, from the same launches: to log them, or to combine them by
            weights that a network learns. Each has its own gradient.
        backend: a name of :func:`available_backends`, or ``None`` for the best that works.
        channel_dim: the axis of all maps' channels, 1 or -1, as in :func:`fsp_matrix`; maps of
            three axes need it, ready matrices do not.
        student_mask: ``(B, *spatial)`` of bool, true where a position of the student's maps counts,
            as in :func:`fsp_matrix`. All of the student's maps must have its spatial size.
        teacher_mask: the same for the teacher's maps; ready matrices have none. If both networks
            see the same positions, pass the same tensor: then the maps are subtracted before they
            are multiplied, which keeps the gradient accurate as the student nears the teacher.

    Returns:
        A scalar, or ``(pairs,)`` with ``reduction="none"``; fp64 if any input is, else fp32; never
        negative.

        With ``eps`` the rounding error and ``s = (||a - c|| ||b|| + ||c|| ||b - d||) / K`` for
        pooled maps ``a, b`` of the student and ``c, d`` of the teacher, the residual ``G^S - G^T``
        has an error of about ``eps s``. That is small where the maps of the networks are close. It
        is larger than in the naive op where the matrices agree although the maps differ in scale.
        Averages are rounded before they are subtracted, which adds an error of
        ``eps (||a|| ||b|| + ||c|| ||d||) / K``, as in the naive op. On a GPU, and for fp64 maps,
        the loss in Gram form has an error of ``eps s^2``.

        NaN or infinity in a map makes the loss NaN or infinite, even with a weight of zero. The
        gradients have NaN or infinity where the formula has them; in some cases NaN stands for
        infinity. The gradients of other samples are not affected.

    Raises:
        TypeError: an argument is not a dense floating-point tensor, a pair or a real number.
        ValueError: a shape, device or option is wrong; the message says which and how.
        RuntimeError: ``backend`` does not work on this machine; the call is inside
            ``torch.jit.trace``; or a second or forward-mode derivative was asked for, which the
            loss does not have: the message says what to write instead.
    """
    checks.check_not_traced()
    maps, ready, same = checks.flatten_pairs(student, teacher, channel_dim)
    masks = checks.distinct_masks(student_mask, teacher_mask)
    checks.check_options(pool, norm, reduction)
    requested = requested_backend(backend)
    lambdas: tuple[float, ...] | Tensor = (1.0,) * len(ready)
    if weights is not None:
        lambdas = _read_weights(weights, maps, ready)
    if isinstance(lambdas, Tensor) or needs_operator((*maps, *masks.tensors)):
        checks.check_loss(*checks.specs_of(maps, ready), channel_dim, _specs_of_masks(masks))
        if isinstance(lambdas, Tensor) and not _is_readable(lambdas):
            losses = fsp_loss(
                student,
                teacher,
                pool=pool,
                norm=norm,
                reduction="none",
                backend=backend,
                channel_dim=channel_dim,
                student_mask=student_mask,
                teacher_mask=teacher_mask,
            )
            weighted = losses * lambdas.to(losses)
            return weighted if reduction == "none" else weighted.sum()
        return _loss_operator(maps, ready, same, lambdas, pool, norm, reduction, requested, masks)
    plan = _plan_here(maps, ready, same, pool, norm, reduction, requested, channel_dim, masks)
    return planned_loss(plan, lambdas, maps, masks.flat())


def explain(
    student: Sequence[Pair],
    teacher: Sequence[Pair | Tensor],
    *,
    pool: str = "max",
    norm: str = "frobenius",
    backend: str | None = None,
    channel_dim: int | None = None,
    student_mask: Tensor | None = None,
    teacher_mask: Tensor | None = None,
) -> LossPlan:
    """How :func:`fsp_loss` would evaluate these arguments, without computing anything.

    The plan prints as a table of evaluation, chunking, flops, bytes and extra memory. It has these
    as attributes too. As in the loss itself, gradients count where maps require them and grad mode
    is on. It raises what :func:`fsp_loss` raises.
    """
    maps, ready, same = checks.flatten_pairs(student, teacher, channel_dim)
    masks = checks.distinct_masks(student_mask, teacher_mask)
    checks.specs_of(maps, ready)  # raises if a map is not a dense tensor
    checks.check_options(pool, norm)
    options = pool, norm, "sum", requested_backend(backend), channel_dim
    return _plan_here(maps, ready, same, *options, masks)


def _specs_of_masks(masks: Masks) -> tuple[MapSpec | None, MapSpec | None]:
    of_student, of_teacher = (
        None if i is None else MapSpec.of(masks.tensors[i]) for i in (masks.student, masks.teacher)
    )
    return of_student, of_teacher


_METADATA_OF = attrgetter("shape", "dtype", "device", "layout", "requires_grad")


def _plan_here(
    maps: Sequence[Tensor],
    ready: tuple[bool, ...],
    same: tuple[bool, ...],
    pool: str,
    norm: str,
    reduction: str,
    requested: str | None,
    channel_dim: int | None,
    masks: Masks,
) -> LossPlan:
    """The plan under the current grad mode and transforms."""
    # Inside a functorch transform a tensor does not know whether an outer level wants its gradient.
    all_or_none = None
    if torch._C._are_functorch_transforms_active():
        all_or_none = torch.is_grad_enabled()
    elif not torch.is_grad_enabled():
        all_or_none = False
    try:
        metadata, strides = tuple(map(_METADATA_OF, maps)), tuple(map(Tensor.stride, maps))
    except RuntimeError:  # a tensor without strides
        checks.check_loss(*checks.specs_of(maps, ready), channel_dim)
        raise
    options = pool, norm, reduction, requested, channel_dim, all_or_none, fp32_precision()
    masked = (_specs_of_masks(masks), masks.of_networks) if masks.tensors else ()
    return _checked_plan(metadata, strides, ready, same, *options, *masked)


@lru_cache(maxsize=1024)
def _checked_plan(
    metadata: Sequence[tuple[Any, ...]],
    strides: Sequence[tuple[int, ...]],
    ready: Sequence[bool],
    same: Sequence[bool],
    pool: str,
    norm: str,
    reduction: str,
    requested: str | None,
    channel_dim: int | None,
    all_or_none: bool | None,
    precision: str,
    masks: tuple[MapSpec | None, MapSpec | None] = (None, None),
    mask_of: MaskIndices = (None, None),
) -> LossPlan:
    """Check and plan maps of some metadata. The cache skips both; errors are not cached.

    ``all_or_none``, unless ``None``, says whether all maps want a gradient or none does. It comes
    before what the metadata say.
    """
    specs = [MapSpec._make((*each, stride)) for each, stride in zip(metadata, strides, strict=True)]
    if all_or_none is not None:
        specs = [spec._replace(requires_grad=all_or_none) for spec in specs]
    student, teacher = by_network(specs, ready)
    checks.check_loss(student, teacher, channel_dim, masks)
    backend = _select(requested, specs)
    how = reduction, symmetric_pairs(same, ready, norm, backend), mask_of
    return plan_loss(student, teacher, pool, norm, backend, precision, *how)


def _select(requested: str | None, maps: Sequence[MapSpec | Tensor]) -> Backend:
    return select_backend(requested, maps[0].device, tuple({x.dtype: None for x in maps}))


def _read_weights(
    weights: Sequence[float] | Tensor, maps: Sequence[Any], ready: Sequence[bool]
) -> tuple[float, ...] | Tensor:
    """The checked weights: numbers if their values are known now, else a tensor."""
    if torch.compiler.is_compiling() and isinstance(weights, (list, tuple)):
        from torch.fx.experimental import symbolic_shapes

        # A number may change from call to call. The compiler would take it for a constant. Before
        # PyTorch 2.8 it does not tell which ones have changed.
        is_static = getattr(symbolic_shapes, "has_static_value", lambda _: False)
        numbers = [x for x in weights if isinstance(x, (int, float))]
        if len(numbers) == len(weights) and not all(is_static(x) for x in numbers):
            weights = torch.stack([x * torch.ones((), dtype=torch.float64) for x in weights])
    if not isinstance(weights, Tensor):
        return checks.check_weights(weights, len(ready))
    student, _ = checks.specs_of(maps, ready)
    checks.check_weight_tensor(weights, len(ready), student[0][0].device)
    if _is_readable(weights) and not needs_operator((weights,)):
        return checks.check_weights(weights.tolist(), len(ready))
    return weights


def _is_readable(weights: Tensor) -> bool:
    """Whether weights can be read as numbers: only their values matter, and no device must wait."""
    return weights.device.type == "cpu" and not (
        weights.requires_grad
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
    )


def _loss_operator(
    maps: list[Tensor],
    ready: tuple[bool, ...],
    same: tuple[bool, ...],
    weights: tuple[float, ...] | Tensor,
    pool: str,
    norm: str,
    reduction: str,
    requested: str | None,
    masks: Masks,
) -> Tensor:
    # Inside a functorch transform a tensor does not know whether an outer level wants its gradient.
    any_map, enabled = torch._C._are_functorch_transforms_active(), torch.is_grad_enabled()
    needs = [enabled and (any_map or x.requires_grad) for x in maps]
    backend = _select(requested, maps)
    symmetric = symmetric_pairs(same, ready, norm, backend)
    for i in seconds_of(ready, symmetric):
        needs[i] = False
    numbers, changing = ([], weights) if isinstance(weights, Tensor) else (list(weights), None)
    flags = list(symmetric) if any(symmetric) else []
    options = pool, norm, backend.name, changing, reduction, flags
    masked: tuple[Any, ...] = ()
    if masks.tensors:
        flat, shares = masks.flat(), masks.student == masks.teacher
        of_student = None if masks.student is None else flat[0]
        of_teacher = None if masks.teacher is None or shares else flat[-1]
        masked = of_student, of_teacher, shares
    outputs = torch.ops.fsp.loss(maps, list(ready), needs, numbers, *options, *masked)
    loss: Tensor = outputs[0]
    return loss
