"""Pairs of a map with itself by fused kernels: one gradient is computed, twice as large."""

from __future__ import annotations

import pytest
import torch
from calls import BF16, DTYPES, FP16, NORMS, ROADS, tensor
from tolerances import assert_near, fused_bounds, oracle

import fsp_kernels as fsp
from fsp_kernels.backends import get_backend

LOSS_SCALE = 256  # as in training: fp16 would round small gradients to subnormal numbers


def map_of(regime, **options):
    """A map whose pair with itself is evaluated as the pairs of a regime are."""
    options = {"dtype": regime.dtype, "batch": 2} | options
    return tensor(options.pop("batch"), regime.channels[0], *regime.size, **options)


def check(maps, entries, norm="frobenius", symmetric=True):
    """Hold pairs ``(x, x)`` to the definition, where the gradient of ``x`` is that of both maps."""
    student = [(x, x) for x in maps]
    teacher = [x if x.dim() == 3 and x.shape[1] == x.shape[2] else (x, x) for x in entries]
    plan = fsp.explain(student, teacher, norm=norm, channel_dim=1)
    assert [p.symmetric for p in plan.pairs] == [symmetric] * len(maps)
    losses = fsp.fsp_loss(student, teacher, norm=norm, channel_dim=1, reduction="none")
    assert torch.equal(
        losses, fsp.fsp_loss(student, teacher, norm=norm, channel_dim=1, reduction="none")
    )
    for loss, x, entry, s, t, planned in zip(
        losses, maps, entries, student, teacher, plan.pairs, strict=True
    ):
        found = torch.autograd.grad(LOSS_SCALE * loss, [x, entry], retain_graph=True)
        exact = oracle([s], [t], norm=norm)
        a, b, c, *d = (LOSS_SCALE * g for g in exact.gradients)
        bound = fused_bounds(planned, x.dtype)
        assert_near(loss, exact.loss, bound.loss, "the loss")
        assert_near(found[0], a + b, bound.gradient, bound.reason)
        assert_near(found[1], c + sum(d), bound.gradient, bound.reason)
    return plan


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("norm", ["frobenius", "mse"])
@pytest.mark.parametrize("regime", ROADS, indirect=True)
def test_each_evaluation_gives_the_definition(regime, norm, dtype):
    maps = [map_of(regime, dtype=dtype) for _ in range(2)]
    plan = check(maps[:1], maps[1:], norm)
    [pair] = plan.pairs
    expected = regime.of(norm)
    if dtype == regime.dtype:
        assert (pair.evaluation, pair.form, pair.parts) == expected[2:5]
    assert len(plan.wanted) == 2  # one of each network
    if pair.form == "matrix":  # two products for the residual, one for each gradient
        assert pair.flops == 4 * 2 * maps[0].numel() * maps[0].shape[1]
    if pair.evaluation == "tiles":
        assert not plan.doubled
    else:
        assert plan.doubled == (0, 1)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("regime", [r for r in ROADS if r != "gram"], indirect=True)
def test_networks_may_have_maps_of_other_sizes(regime):
    x, y = map_of(regime), map_of(regime._replace(size=tuple(s + 1 for s in regime.size)))
    assert check([x], [y]).pairs[0].residual == "apart"


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("regime", ROADS, indirect=True)
def test_the_column_norm_takes_both_gradients(regime):
    plan = check([map_of(regime)], [map_of(regime)], "column", symmetric=False)
    assert len(plan.wanted) == 4


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("regime", ["one pass", "tiles"], indirect=True)
def test_a_ready_matrix_takes_both_gradients(regime, norm):
    x = map_of(regime)
    matrix = tensor(2, x.shape[1], x.shape[1])
    plan = check([x], [matrix], norm, symmetric=False)
    assert len(plan.wanted) == 3


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("dtype", [FP16, BF16], ids=str)
def test_pairs_of_every_road_go_together(regimes, small, dtype, norm):
    small()
    maps = [[map_of(regimes[road], dtype=dtype) for road in ROADS] for _ in range(2)]
    check(*maps, norm, symmetric=norm != "column")


def test_gradients_by_blas_are_doubled_too(backend, small):
    if backend == "cuda":
        pytest.skip("its gradients are all its own kernels'")
    small(GPU_BLAS_INTENSITY=0)
    plan = check([tensor(2, 32, 4, 8, dtype=BF16)], [tensor(2, 32, 4, 8, dtype=BF16)])
    assert plan.launches == ("residual", "bmm", "bmm", "finish")


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("regime", ["one pass", "tiles"], indirect=True)
def test_ordinary_pairs_beside_them_are_not_doubled(regime):
    x, y, z = (map_of(regime) for _ in range(3))
    losses = fsp.fsp_loss([(x, y), (x, x), (y, x)], [(z, z)] * 3, channel_dim=1, reduction="none")
    for loss, pair in zip(losses, [(x, y), (x, x), (y, x)], strict=True):
        exact = oracle([pair], [(z, z)])
        first, second, *_ = exact.gradients
        for own in (x, y):
            wanted = sum(g for g, m in zip((first, second), pair, strict=True) if m is own)
            (found,) = torch.autograd.grad(loss, own, retain_graph=True)
            if torch.is_tensor(wanted):
                assert_near(found, wanted, 1e-5, "fp32")
            else:
                assert not found.any()


def test_the_operator_refuses_flags_that_would_give_wrong_gradients(backend):
    x, matrix = tensor(2, 3, 4), tensor(2, 3, 3)
    needs, options = [True, False, False], ([1.0], "max", "frobenius", backend)
    with pytest.raises(AssertionError, match="symmetric_pairs"):
        torch.ops.fsp.loss([x, x, matrix], [True], needs, *options, symmetric=[True])


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("norm", NORMS)
def test_the_operator_gives_the_same(regimes, backend, norm):
    maps = [map_of(regimes[road]) for road in ROADS[:3]]
    others = [map_of(regimes[road]) for road in ROADS[:3]]
    matrix = tensor(2, maps[0].shape[1], maps[0].shape[1])
    tensors = [*maps, *others, matrix]

    def loss(*tensors):
        *given, matrix = tensors
        student = [(x, x) for x in (*given[:3], given[0])]
        teacher = [*((x, x) for x in given[3:]), matrix]
        return fsp.fsp_loss(student, teacher, norm=norm, channel_dim=1, backend=backend)

    assert get_backend(backend).transposes is False
    found = torch.func.grad(loss, argnums=tuple(range(7)))(*tensors)
    expected = torch.autograd.grad(loss(*tensors), tensors)
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-6 * y.abs().max().item())
