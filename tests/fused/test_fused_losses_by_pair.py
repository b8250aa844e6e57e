"""One loss for each pair by fused kernels: their sums, and the scaling of each pair's gradients."""

from __future__ import annotations

import pytest
import torch
from calls import BF16, DEVICE, DTYPES, FP16, FP32, NORMS, ROADS, pair_of, tensor
from tolerances import TOLERANCES, assert_near, flatten, oracle

import fsp_kernels as fsp
import fsp_kernels.plan as planning
from fsp_kernels.backends import cuda
from fsp_kernels.loss_plan import LAUNCH_SUMS

FACTORS = (0.5, -2.0, 0.0, 1.0, 3.0)


@pytest.fixture
def every_road(regimes, small):
    """A pair of each road, and one with a ready matrix that wants a gradient."""
    small()

    def make(norm="frobenius", batch=3, **options):
        student, teacher = (
            [pair_of(regimes[road].of(norm), batch=batch, **options) for road in ROADS]
            for _ in range(2)
        )
        first, second = (x.shape[1] for x in student[0])
        student.append(pair_of(regimes["one pass"], batch=batch, **options))
        return student, [*teacher, tensor(batch, first, second)]

    return make


def losses_of(student, teacher, **options):
    return fsp.fsp_loss(student, teacher, reduction="none", channel_dim=1, **options)


def check(student, teacher, factors, dtype=FP32, **options):
    losses = losses_of(student, teacher, **options)
    incoming = torch.tensor(factors, device=DEVICE)
    tensors = flatten(student, teacher)
    gradients = torch.autograd.grad(losses, tensors, incoming, retain_graph=True)
    each = [
        [*s, *([t] if isinstance(t, torch.Tensor) else t)]
        for s, t in zip(student, teacher, strict=True)
    ]
    found = iter(zip(gradients, tensors, strict=True))
    for loss, factor, s, t, own in zip(losses, factors, student, teacher, each, strict=True):
        plan = fsp.explain([s], [t], channel_dim=1, **options)
        exact = oracle([s], [t], **options)
        exact.check_fused(plan, loss, list(torch.autograd.grad(loss, own, retain_graph=True)))
        rtol = 1e-4 + 2 * TOLERANCES[dtype].rtol
        for wanted in exact.gradients:
            gradient, x = next(found)
            assert gradient.dtype == x.dtype
            assert gradient.stride() == torch.empty_like(x).stride()
            assert_near(gradient, factor * wanted, rtol, "scaled after it was computed")


@pytest.mark.parametrize("norm", NORMS)
def test_pairs_of_every_road_have_their_own_losses_and_gradients(every_road, norm):
    check(*every_road(norm), FACTORS, norm=norm)


@pytest.mark.parametrize("dtype", [FP16, BF16], ids=str)
def test_half_precision_maps_have_them_too(every_road, dtype):
    student, teacher = every_road(dtypes=(dtype, dtype))
    check(student, teacher, FACTORS, dtype)


def test_the_sum_adds_them_all(every_road):
    student, teacher = every_road()
    loss = fsp.fsp_loss(student, teacher, channel_dim=1)
    torch.testing.assert_close(losses_of(student, teacher).sum(), loss, rtol=1e-6, atol=0)


def test_weights_belong_to_their_pairs(every_road):
    student, teacher = every_road()
    weights = [0.5, 2.0, 0.0, 1.0, 3.0]
    expected = losses_of(student, teacher) * torch.tensor(weights, device=DEVICE)
    torch.testing.assert_close(losses_of(student, teacher, weights=weights), expected)


@pytest.mark.parametrize("samples", [1, 2])
def test_chunks_of_a_pair_are_added(every_road, regimes, small, monkeypatch, samples):
    m, n = regimes["tiles"].channels
    monkeypatch.setitem(planning.CHUNK_BYTES, "cuda", samples * 4 * m * n)
    small()
    student, teacher = every_road()
    groups = fsp.explain(student, teacher, channel_dim=1).launch_groups
    assert len({group.chunk for group in groups}) > 1
    check(student, teacher, FACTORS)


def test_the_launches_are_those_of_the_sum(every_road, programs):
    student, teacher = every_road()
    losses_of(student, teacher)
    fsp.fsp_loss(student, teacher, channel_dim=1)
    by_pair, summed = programs
    assert by_pair[0].by_pair
    assert by_pair[0].launches == summed[0].launches


def test_there_may_be_more_pairs_than_one_launch_adds(small):
    small()
    pairs = 2 * LAUNCH_SUMS + 1
    student, teacher = ([(tensor(2, 3, 4), tensor(2, 2, 4))] * pairs for _ in range(2))
    weights = list(range(pairs))
    losses = losses_of(student, teacher, weights=weights)
    one = oracle(student[:1], teacher[:1]).loss
    each = torch.tensor(weights, device=losses.device)
    assert_near(losses, one * each, 1e-5, "fp32")
    x = student[0][0]
    (alone,) = torch.autograd.grad(fsp.fsp_loss(student[:1], teacher[:1], channel_dim=1), x)
    (found,) = torch.autograd.grad(losses, x, each.float())
    assert_near(found, alone.double() * each.square().sum(), 1e-5, "fp32")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_an_expanded_gradient_may_come_in(every_road, dtype):
    student, teacher = every_road(dtypes=(dtype, dtype))
    tensors = flatten(student, teacher)
    found = torch.autograd.grad(losses_of(student, teacher).sum(), tensors)
    expected = torch.autograd.grad(fsp.fsp_loss(student, teacher, channel_dim=1), tensors)
    assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))


def test_they_are_the_same_each_time(every_road):
    student, teacher = every_road()
    assert torch.equal(losses_of(student, teacher), losses_of(student, teacher))


def test_both_backends_add_as_many_in_a_launch(cuda_extension):  # noqa: ARG001
    assert cuda.extension.module().most_sums == LAUNCH_SUMS
