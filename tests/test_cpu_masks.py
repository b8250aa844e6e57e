"""Masks in the kernels of csrc/cpu/: positions that adjoin and others, layouts, dtypes, sizes.

Each call has one sample for every kind of mask, and is held to the definition sample by sample: the
gradient of a sample is large where few positions count.
"""

from __future__ import annotations

import pytest
import torch
from layouts import LAYOUTS
from tolerances import assert_close, assert_near, fused_bounds, oracle

import fsp_kernels as fsp
from fsp_kernels.backends import cpu, registered_backends
from fsp_kernels.plan import CPU_OPERAND_BYTES

BACKEND = registered_backends()["cpu"]
pytestmark = pytest.mark.skipif(
    BACKEND.why_unavailable() is not None, reason=str(BACKEND.why_unavailable())
)
NORMS = ("frobenius", "mse", "column")
HALF = (torch.bfloat16, torch.float16)
# Where positions do not adjoin they are copied.
KINDS = {
    "none": lambda k, _: k < 0,
    "all": lambda k, _: k >= 0,
    "the first half": lambda k, size: k < (size + 1) // 2,
    "the second half": lambda k, size: k >= size // 2,
    "the middle": lambda k, size: (k >= size // 3) & (k <= size // 2),
    "one": lambda k, size: k == size // 2,
    "every second": lambda k, _: k % 2 == 1,
    "the first and the last": lambda k, size: (k == 0) | (k == size - 1),
    "all but one": lambda k, size: k != size // 2,
    "at random": lambda k, _: torch.rand(k.shape) < 0.5,
}
BATCH = len(KINDS)


def batch_innermost(x):
    """Neither positions nor channels adjoin, and positions are farther apart."""
    return x.movedim((0, 1), (-1, -2)).contiguous().movedim((-1, -2), (0, 1))


LAYOUTS = {**LAYOUTS, "batch innermost": batch_innermost}
NETWORKS = ("both", "each its own", "student", "teacher")  # which have a mask


@pytest.fixture(autouse=True)
def _kernels_alone(monkeypatch):
    """No pair is left to the torch backend."""

    def refuse(*_):
        raise AssertionError("a pair was left to the torch backend")

    monkeypatch.setattr(cpu, "pair_loss", refuse)


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def every_kind(*size):
    """A mask with a sample of each kind."""
    positions = torch.arange(torch.Size(size).numel())
    return torch.stack([make(positions, len(positions)) for make in KINDS.values()]).view(-1, *size)


def masks_of(networks, *size):
    """The keyword arguments of a loss."""
    mask = every_kind(*size)
    other = mask if networks == "both" else every_kind(*size).roll(1, 0)
    return {
        **({} if networks == "teacher" else {"student_mask": mask}),
        **({} if networks == "student" else {"teacher_mask": other}),
    }


def network(channels, size, mask, dtype=torch.float32, layout="contiguous"):
    """Maps that are NaN where they do not count."""
    found = []
    for c in channels:
        x = torch.randn(BATCH, c, *size, dtype=torch.float64).to(dtype)
        if mask is not None and "for all" not in layout:  # one element: NaN would be everywhere
            x = x.masked_fill(~mask[:, None], float("nan"))
        found.append(LAYOUTS[layout](x).requires_grad_())
    return found


def check(maps, symmetric=False, **options):
    """Hold the loss and the gradients to the definition. ``maps``: a, b, c, d, or a, c."""
    a, b, c, d = [x for x in maps for _ in range(2)] if symmetric else maps
    plan = fsp.explain([(a, b)], [(c, d)], backend="cpu", channel_dim=1, **options)
    assert plan.pairs[0].symmetric == symmetric
    bounds = fused_bounds(plan.pairs[0], a.dtype) if plan.pairs[0].bf16_products else None
    loss = fsp.fsp_loss([(a, b)], [(c, d)], backend="cpu", channel_dim=1, **options)
    gradients = torch.autograd.grad(loss, maps)
    total, scale = 0.0, 0.0
    for i in range(BATCH):
        sample = {k: v[i : i + 1] if "mask" in k else v for k, v in options.items()}
        own = [x.detach()[i : i + 1] for x in (a, b, c, d)]
        exact = oracle([own[:2]], [own[2:]], **sample)
        total, scale = total + exact.loss / BATCH, scale + exact.loss_scale / BATCH
        expected, scales = exact.gradients, exact.gradient_scales
        if symmetric:
            expected = [expected[k] + expected[k + 1] for k in (0, 2)]
            scales = [scales[k] + scales[k + 1] for k in (0, 2)]
        for found, wanted, size in zip(gradients, expected, scales, strict=True):
            if bounds is None:
                assert_close(found[i : i + 1], wanted / BATCH, size / BATCH)
            else:
                assert_near(found[i : i + 1], wanted / BATCH, bounds.gradient, bounds.reason)
    if bounds is None:
        assert_close(loss, total, scale)
    else:
        assert_near(loss, total, bounds.loss, bounds.reason)
    for i, gradient in enumerate(gradients):
        mask = options.get("student_mask" if i < len(maps) // 2 else "teacher_mask")
        if mask is not None:
            assert not gradient.masked_fill(mask[:, None], 0).any()
    return loss, gradients


def call(networks, channels, size, **layout):
    masks = masks_of(networks, *size)
    student, teacher = (
        network(channels, size, masks.get(f"{of}_mask"), **layout) for of in ("student", "teacher")
    )
    return [*student, *teacher], masks


# 1, and around the rows, columns and panels of tiles: 6, 8, 16; 512 are read at a time.
@pytest.mark.parametrize(("m", "n"), [(1, 1), (5, 17), (16, 6), (48, 33)])
@pytest.mark.parametrize("positions", [1, 2, 7, 16, 49, 1100])
@pytest.mark.parametrize("layout", ["contiguous", "channels last"])
@pytest.mark.parametrize("networks", NETWORKS)
@pytest.mark.parametrize("norm", NORMS)
def test_every_kind_of_mask_gives_the_definition(m, n, positions, layout, networks, norm):
    maps, masks = call(networks, (m, n), (positions, 1), layout=layout)
    check(maps, norm=norm, **masks)


@pytest.mark.parametrize("positions", [2, 7, 16, 40])
@pytest.mark.parametrize("layout", ["contiguous", "channels last"])
@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
@pytest.mark.parametrize("symmetric", [False, True])
def test_the_gram_form_has_blocks_of_the_positions_that_count(positions, layout, dtype, symmetric):
    channels = (300,) if symmetric else (300, 280)
    maps, masks = call("both", channels, (positions, 1), layout=layout, dtype=dtype)
    pairs = [x for x in maps for _ in range(2)] if symmetric else maps
    plan = fsp.explain([pairs[:2]], [pairs[2:]], backend="cpu", **masks)
    assert plan.pairs[0].form == "gram"
    check(maps, symmetric, **masks)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
@pytest.mark.parametrize("networks", NETWORKS)
def test_maps_may_lie_in_memory_in_any_way(layout, dtype, networks):
    # With one column, spatial axes can be flattened in every layout.
    maps, masks = call(networks, (9, 20), (20, 1), layout=layout, dtype=dtype)
    check(maps, **masks)


@pytest.mark.parametrize("layouts", [("contiguous", "channels last"), ("channels last",) * 2])
@pytest.mark.parametrize("dtypes", [HALF, (torch.float32, torch.bfloat16)], ids=str)
@pytest.mark.parametrize("networks", NETWORKS)
def test_networks_may_differ_in_layout_and_dtype(layouts, dtypes, networks):
    masks = masks_of(networks, 5, 4)
    maps = []
    for of, dtype, layout in zip(("student", "teacher"), dtypes, layouts, strict=True):
        maps += network((9, 20), (5, 4), masks.get(f"{of}_mask"), dtype, layout)
    check(maps, **masks)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("networks", NETWORKS)
@pytest.mark.parametrize("layout", ["contiguous", "channels last"])
def test_a_pair_may_be_a_map_with_itself(norm, networks, layout):
    maps, masks = call(networks, (13,), (6, 7), layout=layout)
    check(maps, symmetric=True, norm=norm, **masks)


@pytest.mark.parametrize("pool", ["max", "avg"])
def test_the_network_without_a_mask_may_be_pooled(pool):
    mask = every_kind(5, 4)
    student = network((9, 20), (5, 4), mask)
    c, d = network((9, 20), (6, 6), None)
    small = d.detach()[..., ::2, ::2].clone().requires_grad_()
    check([*student, c, small], pool=pool, student_mask=mask)
    check([c, small, *student], pool=pool, teacher_mask=mask)


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (3,), (1, 2)])
def test_gradients_reach_those_maps_that_require_them(wanted):
    maps, masks = call("each its own", (9, 20), (5, 4))
    _, expected = check(maps, **masks)
    for i, x in enumerate(maps):
        x.requires_grad_(i in wanted)
    loss = fsp.fsp_loss([maps[:2]], [maps[2:]], backend="cpu", **masks)
    found = torch.autograd.grad(loss, [maps[i] for i in wanted])
    assert all(map(torch.equal, found, [expected[i] for i in wanted]))


def test_maps_of_the_networks_may_have_different_numbers_of_positions():
    student, teacher = every_kind(5, 4), every_kind(3, 9).roll(2, 0)
    maps = [*network((9, 20), (5, 4), student), *network((9, 20), (3, 9), teacher)]
    check(maps, student_mask=student, teacher_mask=teacher)


def test_what_is_not_finite_where_it_counts_stays_in_its_sample():
    maps, masks = call("both", (9, 20), (5, 4))
    _, before = check(maps, **masks)
    with torch.no_grad():
        maps[1][1, 0, 2, 2] = float("nan")  # all positions of this sample count
    loss = fsp.fsp_loss([maps[:2]], [maps[2:]], backend="cpu", **masks)
    after = torch.autograd.grad(loss, maps)
    assert loss.isnan()
    for x, y in zip(before, after, strict=True):
        assert y[1].isnan().any()
        assert torch.equal(x[2:], y[2:])
        assert torch.equal(x[:1], y[:1])


@pytest.mark.parametrize("size", [(3, 3), (20, 28)], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels last"])
@pytest.mark.parametrize("networks", ["both", "each its own"])
def test_bits_do_not_depend_on_threads(threads, size, layout, networks):
    maps, masks = call(networks, (40, 24), size, layout=layout)
    threads(1)
    loss, gradients = check(maps, **masks)
    for number in (2, BATCH):
        threads(number)
        again = fsp.fsp_loss([maps[:2]], [maps[2:]], backend="cpu", channel_dim=1, **masks)
        assert torch.equal(again, loss)
        assert all(map(torch.equal, torch.autograd.grad(again, maps), gradients))


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("networks", ["both", "student"])
def test_the_scratch_of_a_plan_holds_the_copies_of_masked_maps(networks, symmetric):
    maps, masks = call(networks, (13,) if symmetric else (13, 9), (6, 7))
    a, b, c, d = [x for x in maps for _ in range(2)] if symmetric else maps
    (pair,) = fsp.explain([(a, b)], [(c, d)], backend="cpu", **masks).pairs
    rows = (13 + 3 if symmetric else 13 + 9 + 6) * len(masks)  # 3 beside each map
    product = 4 * a.shape[1] * b.shape[1]
    assert pair.scratch_bytes == CPU_OPERAND_BYTES + product + 4 * 6 * 7 * rows
