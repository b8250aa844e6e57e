"""Masks by fused kernels: positions that do not count hold NaN here, and the loss is the same."""

from __future__ import annotations

import math

import pytest
import torch
from calls import (
    DEVICE,
    DTYPES,
    MATRIX_ROADS,
    NORMS,
    ROADS,
    four_of,
    gradients_of,
    pair_of,
    tensor,
)
from tolerances import assert_near, flatten, fused_bounds, oracle

import fsp_kernels as fsp
from fsp_kernels import plan as planning

BATCH = 3
HOLES = ("prefix", "random")  # which positions count
NETWORKS = ("same", "different", "student", "teacher")  # whose positions are masked
every_road = pytest.mark.parametrize("regime", ROADS, indirect=True)
every_matrix_road = pytest.mark.parametrize("regime", MATRIX_ROADS, indirect=True)


def mask_of(holes, size, turn=0):
    """``(BATCH, *size)``; another ``turn`` gives another one."""
    positions = math.prod(size)
    if holes == "prefix":
        lengths = torch.tensor([positions, 1, positions // 2 + 1]).roll(turn)
        mask = torch.arange(positions) < lengths[:, None]
    else:
        mask = torch.rand(BATCH, positions) < 0.6
        mask[1 + turn] = False  # a sample where no position counts
    return mask.view(BATCH, *size).to(DEVICE)


def masks_of(networks, holes, size):
    """The masks of student and teacher."""
    one, other = mask_of(holes, size), mask_of(holes, size, turn=1)
    return {
        "same": (one, one),
        "different": (one, other),
        "student": (one, None),
        "teacher": (None, other),
    }[networks]


def evaluated(regime, networks, norm="frobenius"):
    """How the maps of a regime are evaluated; differences need masks that are the same."""
    return regime.of(norm if networks == "same" else "column")


def hide(maps, mask):
    """Positions that do not count get NaN; maps ``(B, C, *spatial)``."""
    with torch.no_grad():
        for x in maps:
            x.masked_fill_(~mask[:, None], float("nan"))


def check(student, teacher, *regimes, masks, weights=None, **options):
    """Hold loss and gradients to the definition. Returns the plan.

    Each pair must be evaluated as its regime says. Where a mask is false, gradients must be zero.
    """
    for pairs, mask in zip((student, teacher), masks, strict=True):
        for entry in pairs:
            if mask is not None and not isinstance(entry, torch.Tensor):
                hide(entry, mask)
    options |= {"student_mask": masks[0], "teacher_mask": masks[1]}
    plan = fsp.explain(student, teacher, channel_dim=1, **options)
    ways = [(pair.evaluation, pair.form, pair.parts) for pair in plan.pairs]
    assert ways == [(r.evaluation, r.form, r.parts) for r in regimes]
    loss = fsp.fsp_loss(student, teacher, weights=weights, channel_dim=1, **options)
    tensors = flatten(student, teacher)
    gradients = gradients_of(loss, tensors)
    oracle(student, teacher, weights, **options).check_fused(plan, loss, gradients)
    planned = [(m, pair) for pair in plan.pairs for m in pair.maps]
    for x, gradient, (m, pair) in zip(tensors, gradients, planned, strict=True):
        if gradient is None:
            continue
        assert gradient.dtype == x.dtype
        assert gradient.stride() == torch.empty_like(x).stride()
        if m.mask is not None:
            mask = masks[0 if any(m is y for y in pair.student) else 1]
            assert not gradient.masked_fill(mask[:, None], 0).any()
    return plan


# --- the definition -------------------------------------------------------------------------------


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("holes", HOLES)
@pytest.mark.parametrize("networks", NETWORKS)
@every_road
def test_loss_and_gradients_are_those_of_the_positions_that_count(
    regime, networks, holes, norm, dtype
):
    maps = four_of(regime, batch=BATCH, dtypes=(dtype, dtype))
    masks = masks_of(networks, holes, regime.size)
    weights = [128.0]  # the gradient of a mean of squares would be subnormal in fp16
    expected = evaluated(regime, networks, norm)
    plan = check(*maps, expected, masks=masks, norm=norm, weights=weights)
    assert (plan.pairs[0].residual == "apart") == (networks != "same")


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("holes", HOLES)
@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no grad"])
@every_matrix_road
def test_the_student_may_have_a_mask_beside_a_ready_matrix(regime, grad, holes, norm, dtype):
    matrix = tensor(BATCH, *regime.channels, grad=grad)
    student = [pair_of(regime, batch=BATCH, dtypes=(dtype, dtype))]
    masks = mask_of(holes, regime.size), None
    check(student, [matrix], regime.of(norm), masks=masks, norm=norm, weights=[128.0])


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("networks", NETWORKS[1:])
@every_matrix_road
def test_the_networks_may_have_maps_of_unequal_sizes(regime, networks):
    height, width = regime.size
    masks = [
        None if mask is None else mask[..., : width - i]
        for i, mask in enumerate(masks_of(networks, "random", regime.size))
    ]
    teacher = [pair_of(regime, batch=BATCH, size=(height, width - 1))]
    check([pair_of(regime, batch=BATCH)], teacher, regime, masks=masks)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("networks", NETWORKS)
@every_road
def test_a_mask_without_holes_changes_nothing(regime, networks):
    student, teacher = four_of(regime, batch=BATCH)
    masks = masks_of(networks, "random", regime.size)
    for mask in filter(torch.is_tensor, masks):
        mask.fill_(True)
    check(student, teacher, evaluated(regime, networks), masks=masks)
    found = fsp.fsp_loss(student, teacher, student_mask=masks[0], teacher_mask=masks[1])
    torch.testing.assert_close(found, fsp.fsp_loss(student, teacher), rtol=1e-5, atol=0)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("networks", NETWORKS)
@every_road
def test_masks_without_any_position_leave_no_loss_of_their_network(regime, networks):
    student, teacher = four_of(regime, batch=BATCH)
    masks = masks_of(networks, "random", regime.size)
    for mask in filter(torch.is_tensor, masks):
        mask.fill_(False)
    expected = evaluated(regime, networks)
    check(student, teacher, expected, masks=masks)
    loss = fsp.fsp_loss(student, teacher, student_mask=masks[0], teacher_mask=masks[1])
    assert (loss == 0) == (networks in ("same", "different"))


# --- gradients, those wanted ----------------------------------------------------------------------


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("wanted", range(4))
@pytest.mark.parametrize("networks", NETWORKS)
@every_road
def test_each_map_alone_gets_its_gradient(regime, networks, wanted):
    student, teacher = four_of(regime, batch=BATCH, grad=False)
    flatten(student, teacher)[wanted].requires_grad_()
    masks = masks_of(networks, "random", regime.size)
    check(student, teacher, evaluated(regime, networks), masks=masks)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("networks", NETWORKS)
@every_road
def test_without_gradients_only_the_loss_is_computed(regime, networks, norm):
    student, teacher = four_of(regime, batch=BATCH, grad=False)
    masks = masks_of(networks, "random", regime.size)
    check(student, teacher, evaluated(regime, networks, norm), masks=masks, norm=norm)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("norm", NORMS)
@every_road
def test_where_nothing_counts_the_gradient_is_zero_whatever_the_loss_is(regime, norm):
    student, teacher = four_of(regime, batch=BATCH)
    mask = mask_of("random", regime.size)
    hide((*student[0], *teacher[0]), mask)
    with torch.no_grad():
        student[0][0][:, 0] = float("inf")
    loss = fsp.fsp_loss(student, teacher, norm=norm, student_mask=mask, teacher_mask=mask)
    assert not loss.isfinite()
    for gradient in gradients_of(loss, flatten(student, teacher)):
        assert not gradient.isfinite().all()
        assert not gradient.masked_fill(mask[:, None], 0).any()


# --- how maps and masks lie -----------------------------------------------------------------------


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["channels last", "cropped", "every second channel"])
@pytest.mark.parametrize("networks", ["same", "different"])
@every_road
def test_maps_may_lie_in_memory_in_any_way(regime, networks, layout, dtype):
    maps = four_of(regime, batch=BATCH, layout=layout, dtypes=(dtype, dtype))
    masks = masks_of(networks, "random", regime.size)
    check(*maps, evaluated(regime, networks), masks=masks)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("networks", NETWORKS)
@every_road
def test_channels_of_tokens_may_be_last(regime, networks):
    positions = math.prod(regime.size)
    first = [tensor(BATCH, positions, c) for c in regime.channels * 2]
    masks = masks_of(networks, "prefix", (positions,))
    moved = [x.detach().movedim(-1, 1) for x in first]
    for pair, mask in ((moved[:2], masks[0]), (moved[2:], masks[1])):
        if mask is not None:
            hide(pair, mask)
    options = {"student_mask": masks[0], "teacher_mask": masks[1]}
    student, teacher = [tuple(first[:2])], [tuple(first[2:])]
    plan = fsp.explain(student, teacher, channel_dim=-1, **options)
    loss = fsp.fsp_loss(student, teacher, channel_dim=-1, **options)
    gradients = torch.autograd.grad(loss, first)
    exact = oracle([tuple(moved[:2])], [tuple(moved[2:])], **options)
    exact.check_fused(plan, loss, [g.movedim(-1, 1) for g in gradients])


@pytest.mark.usefixtures("small")
@every_road
def test_masks_may_lie_in_memory_in_any_way(regime):
    positions = math.prod(regime.size)
    whole = torch.rand(BATCH + 1, positions, device=DEVICE) < 0.6
    one = whole[1:].view(BATCH, *regime.size)  # begins beside a multiple of 16 bytes
    other = whole.t().contiguous().t()[:-1].unflatten(1, regime.size)
    check(*four_of(regime, batch=BATCH), evaluated(regime, "other"), masks=(one, other))
    all_alike = one[:1].expand(BATCH, *regime.size)
    check(*four_of(regime, batch=BATCH), regime, masks=(all_alike, all_alike))


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("regime", ["one pass", "tiles"], indirect=True)
def test_a_mask_is_read_at_every_call(regime, programs):
    student, teacher = four_of(regime, batch=BATCH)
    for holes in HOLES:
        maps = [
            [tuple(x.detach().clone().requires_grad_() for x in pair)]
            for pair in (student[0], teacher[0])
        ]
        check(
            *maps, evaluated(regime, "different"), masks=masks_of("different", holes, regime.size)
        )
    assert len(programs) == 1


# --- several pairs, chunks of samples -------------------------------------------------------------


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("networks", NETWORKS)
def test_a_mask_serves_all_pairs(regimes, networks, norm):
    """Of maps of one size, beside a ready matrix."""
    size = regimes["gram"].size
    roads = [regimes["one pass"]._replace(size=size), regimes["gram"]]
    student, teacher = ([pair_of(r, batch=BATCH) for r in roads] for _ in range(2))
    student.append(pair_of(roads[0], batch=BATCH))
    teacher.append(tensor(BATCH, *roads[0].channels))
    masks = masks_of(networks, "random", size)
    expected = [evaluated(r, networks, norm) for r in (*roads, roads[0])]
    check(student, teacher, *expected, masks=masks, norm=norm, weights=[1.0, 0.5, 2.0])


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("networks", ["same", "different"])
def test_each_pair_may_have_its_own_loss(regimes, networks):
    size = regimes["gram"].size
    roads = [regimes["one pass"]._replace(size=size), regimes["gram"]]
    student, teacher = ([pair_of(r, batch=BATCH) for r in roads] for _ in range(2))
    masks = masks_of(networks, "random", size)
    for pairs, mask in zip((student, teacher), masks, strict=True):
        for pair in pairs:
            hide(pair, mask)
    options = {"student_mask": masks[0], "teacher_mask": masks[1]}
    losses = fsp.fsp_loss(student, teacher, reduction="none", channel_dim=1, **options)
    for loss, s, t in zip(losses, student, teacher, strict=True):
        plan = fsp.explain([s], [t], channel_dim=1, **options)
        found = torch.autograd.grad(loss, [*s, *t], retain_graph=True)
        oracle([s], [t], **options).check_fused(plan, loss, found)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("networks", NETWORKS)
@pytest.mark.parametrize("samples", [1, 2])
def test_a_chunk_of_samples_has_its_own_rows_of_a_mask(
    regimes, small, monkeypatch, samples, networks, norm
):
    regime = regimes["tiles"]
    m, n = regime.channels
    monkeypatch.setitem(planning.CHUNK_BYTES, "cuda", samples * 4 * m * n)
    small()
    masks = masks_of(networks, "random", regime.size)
    maps = four_of(regime, batch=BATCH)
    plan = check(*maps, regime.of(norm), masks=masks, norm=norm)
    assert plan.pairs[0].samples == samples


@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no grad"])
def test_a_chunk_beside_ready_matrices_has_its_own_rows_too(regimes, small, monkeypatch, grad):
    regime = regimes["tiles"]
    monkeypatch.setitem(planning.CHUNK_BYTES, "cuda", 8 * math.prod(regime.channels))
    small()
    matrix = tensor(BATCH, *regime.channels, grad=grad)
    masks = mask_of("random", regime.size), None
    plan = check([pair_of(regime, batch=BATCH)], [matrix], regime, masks=masks)
    assert plan.pairs[0].samples == 2


def test_a_chunk_in_gram_form_has_its_own_rows_too(backend, regimes, small, monkeypatch):
    if backend == "cuda":
        pytest.skip("its Gram form takes one pass, over all samples")
    regime = regimes["gram"]
    masks = masks_of("same", "prefix", regime.size)
    small()
    maps = four_of(regime, batch=BATCH)
    stored = fsp.explain(*maps, student_mask=masks[0], teacher_mask=masks[1]).pairs[0].scratch_bytes
    monkeypatch.setitem(planning.CHUNK_BYTES, "cuda", 2 * stored // BATCH)
    small()
    assert check(*maps, regime, masks=masks).pairs[0].samples == 2


# --- pairs of a map with itself -------------------------------------------------------------------


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("networks", NETWORKS)
@every_road
def test_a_pair_may_be_a_map_with_itself(regime, networks, norm, dtype):
    x, y = (tensor(BATCH, regime.channels[0], *regime.size, dtype=dtype) for _ in range(2))
    masks = masks_of(networks, "random", regime.size)
    for own, mask in zip((x, y), masks, strict=True):
        if mask is not None:
            hide([own], mask)
    options = {"norm": norm, "student_mask": masks[0], "teacher_mask": masks[1]}
    pairs = [(x, x)], [(y, y)]
    (planned,) = fsp.explain(*pairs, channel_dim=1, **options).pairs
    assert planned.symmetric == (norm != "column")
    loss = fsp.fsp_loss(*pairs, channel_dim=1, weights=[128.0], **options)
    found = torch.autograd.grad(loss, (x, y))
    exact = oracle(*pairs, [128.0], **options)
    bound = fused_bounds(planned, dtype)
    assert_near(loss, exact.loss, bound.loss, "the loss")
    a, b, c, d = exact.gradients
    for gradient, wanted, mask in zip(found, (a + b, c + d), masks, strict=True):
        assert_near(gradient, wanted, bound.gradient, bound.reason)
        if mask is not None:
            assert not gradient.masked_fill(mask[:, None], 0).any()
