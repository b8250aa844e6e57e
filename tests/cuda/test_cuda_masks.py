"""Masks in the kernels of csrc/: positions that do not count contribute nothing, even if NaN."""

from __future__ import annotations

import pytest
import torch
from calls import (
    BF16,
    DEVICE,
    DTYPES,
    FP16,
    FP32,
    MATRIX_ROADS,
    NORMS,
    ROADS,
    Regime,
    gradients_of,
    run,
    tensor,
)
from layouts import LAYOUTS
from tolerances import flatten, oracle

import fsp_kernels as fsp
from fsp_kernels import plan as planning

BATCH = 3
pytestmark = pytest.mark.usefixtures("backend", "small")
every_regime = pytest.mark.parametrize("regime", ROADS, indirect=True)
every_matrix_regime = pytest.mark.parametrize("regime", MATRIX_ROADS, indirect=True)


def prefix(*shape: int) -> torch.Tensor:
    """True up to some position, another one in each sample; in the last sample everywhere."""
    positions = torch.Size(shape[1:]).numel()
    lengths = positions - positions // 3 * torch.arange(shape[0] - 1, -1, -1)
    return (torch.arange(positions) < lengths[:, None]).view(shape).to(DEVICE)


def anywhere(*shape: int) -> torch.Tensor:
    return (torch.rand(shape) < 0.6).to(DEVICE)


def not_in_one_sample(*shape: int) -> torch.Tensor:
    mask = anywhere(*shape)
    mask[1] = False
    return mask


SHAPES = (prefix, anywhere, not_in_one_sample)


def masks_of(networks: str, shape, *size: int) -> dict[str, torch.Tensor]:
    """The masks of a loss, as its keyword arguments."""
    student, teacher = shape(BATCH, *size), shape(BATCH, *size).flip(0, 1)
    return {
        "same": {"student_mask": student, "teacher_mask": student},
        "different": {"student_mask": student, "teacher_mask": teacher},
        "student": {"student_mask": student},
        "teacher": {"teacher_mask": teacher},
    }[networks]


def network(regime: Regime, mask=None, layout="contiguous", **options) -> tuple:
    """Two maps that are NaN where they do not count."""
    size = options.pop("size", regime.size)
    options = {"dtype": regime.dtype} | options
    maps = [tensor(BATCH, channels, *size, **options).detach() for channels in regime.channels]
    if mask is not None:
        maps = [x.masked_fill(~mask[:, None], torch.nan) for x in maps]
    return tuple(LAYOUTS[layout](x).requires_grad_() for x in maps)


def networks_of(regime: Regime, masks, **options) -> tuple[list, list]:
    student, teacher = (
        network(regime, masks.get(f"{name}_mask"), **options) for name in ("student", "teacher")
    )
    return [student], [teacher]


def check(student, teacher, *regimes: Regime, masks, weights=None, **options) -> fsp.LossPlan:
    """Hold a loss and its gradients to the definition. Returns the plan."""
    options = {**options, **masks}
    plan = fsp.explain(student, teacher, channel_dim=1, **options)
    ways = [(pair.evaluation, pair.form, pair.parts) for pair in plan.pairs]
    assert ways == [(r.evaluation, r.form, r.parts) for r in regimes]
    assert all(pair.masked for pair in plan.pairs)
    tensors = flatten(student, teacher)
    loss = fsp.fsp_loss(student, teacher, weights=weights, channel_dim=1, **options)
    gradients = gradients_of(loss, tensors)
    oracle(student, teacher, weights, **options).check_fused(plan, loss, gradients)
    for x, gradient in zip(tensors, gradients, strict=True):
        assert gradient.stride() == torch.empty_like(x).stride()
        assert not gradient[x.isnan()].any()
    return plan


# --- the definition -------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("norm", NORMS)
@every_regime
def test_networks_may_have_one_mask(regime, norm, dtype, shape):
    masks = masks_of("same", shape, *regime.size)
    maps = networks_of(regime, masks, dtype=dtype)
    plan = check(*maps, regime.of(norm), masks=masks, norm=norm, weights=[128.0])
    assert plan.pairs[0].residual == "difference"


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("networks", ["different", "student", "teacher"])
@every_matrix_regime
def test_each_network_may_have_its_own_mask(regime, networks, norm, dtype, shape):
    masks = masks_of(networks, shape, *regime.size)
    maps = networks_of(regime, masks, dtype=dtype)
    plan = check(*maps, regime.of(norm), masks=masks, norm=norm, weights=[128.0])
    assert plan.pairs[0].residual == "apart"


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("norm", NORMS)
@every_matrix_regime
def test_a_ready_matrix_has_no_mask(regime, norm, dtype, shape):
    masks = masks_of("student", shape, *regime.size)
    student = network(regime, masks["student_mask"], dtype=dtype)
    matrix = tensor(BATCH, *regime.channels, dtype=dtype)
    plan = check([student], [matrix], regime.of(norm), masks=masks, norm=norm, weights=[128.0])
    assert plan.pairs[0].residual == "ready"


@pytest.mark.parametrize("networks", ["different", "student", "teacher"])
@every_matrix_regime
def test_networks_may_have_other_sizes(regime, networks):
    height, width = regime.size
    masks, size = masks_of(networks, anywhere, height, width), (height, width - 1)
    sizes = {}
    if networks == "different":
        masks["teacher_mask"] = masks["teacher_mask"][..., 1:]
    for name in ("student", "teacher"):
        sizes[name] = masks[f"{name}_mask"].shape[1:] if f"{name}_mask" in masks else size
    student, teacher = (
        network(regime, masks.get(f"{name}_mask"), size=sizes[name]) for name in sizes
    )
    check([student], [teacher], regime, masks=masks)


@pytest.mark.parametrize("pool", ["max", "avg"])
@every_matrix_regime
def test_a_network_without_a_mask_may_be_pooled(regime, pool):
    masks = masks_of("student", anywhere, *regime.size)
    student = network(regime, masks["student_mask"])
    first, second = network(regime)
    first = first.detach().repeat_interleave(2, dim=2)
    first = (first + torch.rand_like(first)).requires_grad_()
    check([student], [(first, second)], regime, masks=masks, pool=pool)


# --- how maps lie ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize(
    "layout", ["channels last", "spatial axes permuted", "every second position", "cropped"]
)
@every_regime
def test_maps_may_lie_in_memory_in_any_way(regime, layout, dtype):
    masks = masks_of("same", anywhere, *regime.size)
    student, teacher = networks_of(regime, masks, layout=layout, dtype=dtype)
    check(student, teacher, regime, masks=masks)


@pytest.mark.parametrize("networks", ["same", "different"])
@pytest.mark.parametrize("regime", ["one pass", "tiles in parts"], indirect=True)
def test_each_network_may_have_its_own_layout(regime, networks):
    masks = masks_of(networks, anywhere, *regime.size)
    student = network(regime, masks["student_mask"])
    teacher = network(regime, masks["teacher_mask"], layout="channels last")
    check([student], [teacher], regime, masks=masks)


@pytest.mark.parametrize("axes", [1, 3], ids=["tokens", "volumes"])
@pytest.mark.parametrize("layout", ["contiguous", "channels last"])
@every_regime
def test_maps_may_have_one_to_three_spatial_axes(regime, layout, axes):
    positions = torch.Size(regime.size).numel()
    size = (positions,) if axes == 1 else (1, positions // 3, 3)
    masks = masks_of("same", anywhere, *size)
    check(*networks_of(regime, masks, size=size, layout=layout), regime, masks=masks)


# --- samples and pairs ----------------------------------------------------------------------------


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("networks", ["same", "different", "student"])
def test_a_workspace_serves_some_samples_after_the_others(
    regimes, small, monkeypatch, networks, norm
):
    regime = regimes["tiles"]
    m, n = regime.channels
    monkeypatch.setitem(planning.CHUNK_BYTES, "cuda", 2 * FP32.itemsize * m * n)
    small()
    masks = masks_of(networks, not_in_one_sample, *regime.size)
    plan = check(*networks_of(regime, masks), regime, masks=masks, norm=norm)
    assert plan.pairs[0].samples == 2


def test_a_ready_matrix_is_served_after_the_others(regimes, small, monkeypatch):
    regime = regimes["tiles"]
    m, n = regime.channels
    monkeypatch.setitem(planning.CHUNK_BYTES, "cuda", 2 * FP32.itemsize * m * n)
    small()
    masks = masks_of("student", anywhere, *regime.size)
    student, matrix = network(regime, masks["student_mask"]), tensor(BATCH, m, n)
    plan = check([student], [matrix], regime, masks=masks)
    assert plan.pairs[0].samples == 2


@pytest.mark.parametrize("networks", ["same", "different", "student", "teacher"])
def test_pairs_of_every_road_share_masks(regimes, networks):
    size = (3, 5)  # so that each may go in Gram form
    chosen = [
        regimes["one pass"]._replace(size=size),
        regimes["gram"],
        regimes["tiles"]._replace(size=size),
    ]
    masks = masks_of(networks, anywhere, *size)
    student, teacher = (
        [
            network(regime, masks.get(f"{name}_mask"), dtype=dtype)
            for dtype in (FP32, BF16, FP16)
            for regime in chosen
        ]
        for name in ("student", "teacher")
    )
    options = {"channel_dim": 1, **masks}
    losses = fsp.fsp_loss(student, teacher, reduction="none", **options)
    plan = fsp.explain(student, teacher, **options)
    for loss, *pairs, planned in zip(losses, student, teacher, plan.pairs, strict=True):
        single = fsp.explain([pairs[0]], [pairs[1]], **options)
        assert single.pairs == (planned,)
        found = torch.autograd.grad(loss, [*pairs[0], *pairs[1]], retain_graph=True)
        oracle([pairs[0]], [pairs[1]], **masks).check_fused(single, loss, found)


def test_there_may_be_more_pairs_than_one_launch_takes(regimes):
    regime = regimes["one pass"]
    masks = masks_of("different", anywhere, *regime.size)
    pairs = [networks_of(regime, masks) for _ in range(7)]
    student, teacher = ([each[i][0] for each in pairs] for i in range(2))
    weights = [2.0**i for i in range(7)]
    check(student, teacher, *[regime] * 7, masks=masks, weights=weights)


@pytest.mark.parametrize("networks", ["same", "different"])
@every_matrix_regime
def test_a_pair_may_be_a_map_with_itself(regime, networks):
    masks = masks_of(networks, anywhere, *regime.size)
    (x, _), (y, _) = (network(regime, masks[f"{name}_mask"]) for name in ("student", "teacher"))
    options = {"channel_dim": 1, **masks}
    plan = fsp.explain([(x, x)], [(y, y)], **options)
    loss = fsp.fsp_loss([(x, x)], [(y, y)], **options)
    to_x, to_y = torch.autograd.grad(loss, (x, y))
    assert plan.pairs[0].symmetric
    found = [to_x / 2, to_x / 2, to_y / 2, to_y / 2]  # of each of the maps
    oracle([(x, x)], [(y, y)], **masks).check_fused(plan, loss, found)


# --- numbers --------------------------------------------------------------------------------------


@pytest.mark.parametrize("networks", ["same", "different"])
@pytest.mark.parametrize("value", [torch.nan, 3e38], ids=["nan", "overflow"])
@every_regime
def test_the_gradient_is_zero_where_nothing_counts_even_if_it_is_not_finite_elsewhere(
    regime, networks, value
):
    masks = masks_of(networks, prefix, *regime.size)
    [student], [teacher] = networks_of(regime, masks)
    with torch.no_grad():
        for x in student:
            x[:, 1, 0, 0] = value  # this position counts
    loss = fsp.fsp_loss([student], [teacher], **masks)
    gradients = torch.autograd.grad(loss, (*student, *teacher))
    assert not loss.isfinite()
    for gradient, name in zip(gradients, ("student",) * 2 + ("teacher",) * 2, strict=True):
        hidden = ~masks[f"{name}_mask"][:, None].expand_as(gradient)
        assert not gradient.isfinite().all()
        assert not gradient[hidden].any()


@pytest.mark.parametrize("norm", NORMS)
@every_regime
def test_without_gradients_only_the_loss_is_computed(regime, norm):
    masks = masks_of("same", anywhere, *regime.size)
    student, teacher = networks_of(regime, masks)
    expected = oracle(student, teacher, norm=norm, **masks)
    with torch.no_grad():
        plan = fsp.explain(student, teacher, norm=norm, **masks)
        loss = fsp.fsp_loss(student, teacher, norm=norm, **masks)
    expected.check_fused(plan, loss, [None] * 4)


@every_regime
def test_a_mask_that_is_true_everywhere_changes_nothing(regime):
    mask = torch.ones(BATCH, *regime.size, dtype=torch.bool, device=DEVICE)
    student, teacher = networks_of(regime, {})
    expected = run(student, teacher)
    found = run(student, teacher, student_mask=mask, teacher_mask=mask)
    assert all(map(torch.equal, found, expected))
