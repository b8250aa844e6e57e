"""The last step of forward, a sum, and all of backward, a scaling."""

from __future__ import annotations

import pytest
import torch
from calls import DEVICE, DTYPES, FP16, FP32, Regime, four_of, scaling_of, tensor
from tolerances import TOLERANCES, assert_near, flatten, oracle

import fsp_kernels as fsp
from fsp_kernels.backends import get_backend

ONE_PASS = Regime((7, 13), (6, 3), "one pass")


def factor_of(value: float) -> torch.Tensor:
    return torch.tensor(value, device=DEVICE)


@pytest.fixture
def scale(backend):
    def call(gradients, factor, in_place, dtypes=None):
        scaling = scaling_of(gradients, dtypes)
        return get_backend(backend).scale(gradients, scaling, factor_of(factor), in_place)

    return call


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.parametrize("factor", [1.0, 3.0, 0.0, -0.5])
def test_gradients_are_scaled(scale, factor, in_place, dtype):
    gradients = [tensor(*s, dtype=dtype, grad=False) for s in ((3, 5), (1,), (2, 3, 400))]
    wanted = [factor * g.double() for g in gradients]
    for found, w in zip(scale(gradients, factor, in_place), wanted, strict=True):
        assert found.dtype == dtype
        assert_near(found, w, TOLERANCES[dtype].rtol, "rounded once")


def test_in_place_is_in_place_and_otherwise_nothing_is_overwritten(scale):
    gradients = [tensor(3, 5, grad=False), tensor(7, grad=False)]
    before = [g.clone() for g in gradients]
    apart = scale(gradients, 3.0, in_place=False)
    assert all(torch.equal(g, b) for g, b in zip(gradients, before, strict=True))
    assert all(x.data_ptr() != g.data_ptr() for x, g in zip(apart, gradients, strict=True))
    given = scale(gradients, 3.0, in_place=True)
    assert all(x is g for x, g in zip(given, gradients, strict=True))
    assert all(torch.equal(x, y) for x, y in zip(given, apart, strict=True))


@pytest.mark.parametrize("factor", [1.0, 1024.0])
@pytest.mark.parametrize("in_place", [True, False])
def test_gradients_that_wait_in_fp32_become_fp16(scale, factor, in_place):
    gradient = 2.0**-20 * tensor(4, 300, grad=False)
    (found,) = scale([gradient], factor, in_place, dtypes=[FP16])
    assert torch.equal(found, (gradient * factor).half())


@pytest.mark.parametrize("wanted", DTYPES, ids=str)
@pytest.mark.parametrize("held", DTYPES, ids=str)
def test_a_gradient_may_be_wanted_in_another_dtype_than_it_is_held_in(scale, held, wanted):
    gradient = tensor(3, 7, dtype=held, grad=False)
    exact = 3 * gradient.double()
    (found,) = scale([gradient], 3.0, in_place=True, dtypes=[wanted])
    assert found.dtype == wanted
    assert_near(found, exact, TOLERANCES[wanted].rtol, "rounded once")


@pytest.mark.parametrize("layout", ["channels last", "every second position"])
def test_scaled_gradients_lie_as_gradients_do(scale, layout):
    gradient = torch.empty_like(tensor(2, 3, 4, 5, layout=layout, grad=False)).normal_()
    (found,) = scale([gradient], 2.0, in_place=False)
    assert found.stride() == gradient.stride()
    assert torch.equal(found, 2 * gradient)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_factor_that_is_not_finite_reaches_every_element(scale, value):
    (found,) = scale([tensor(5, grad=False)], value, in_place=True)
    assert not found.isfinite().any()


def test_there_may_be_more_tensors_than_one_launch_takes(scale):
    gradients = [tensor(i + 1, grad=False) for i in range(110)]
    wanted = [3 * g.double() for g in gradients]
    for found, w in zip(scale(gradients, 3.0, in_place=True), wanted, strict=True):
        assert_near(found, w, TOLERANCES[FP32].rtol, "rounded once")


# --- backward of a loss ---------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("incoming", [1.0, 3.0, 0.0])
def test_a_retained_graph_gives_the_same_gradients_again(incoming, dtype):
    student, teacher = four_of(ONE_PASS, dtypes=(dtype, dtype))
    tensors = flatten(student, teacher)
    expected = oracle(student, teacher).gradients
    loss = fsp.fsp_loss(student, teacher)
    factor = factor_of(incoming)
    first = torch.autograd.grad(loss, tensors, factor, retain_graph=True)
    kept = [g.clone() for g in first]
    second = torch.autograd.grad(loss, tensors, 2 * factor, retain_graph=True)
    third = torch.autograd.grad(loss, tensors, factor)
    assert all(torch.equal(x, y) for x, y in zip(first, kept, strict=True))
    assert all(torch.equal(x, y) for x, y in zip(first, third, strict=True))
    bound = 1e-5 + 2 * TOLERANCES[dtype].rtol
    for once, twice, wanted in zip(first, second, expected, strict=True):
        assert_near(once, incoming * wanted, bound, "rounded at most twice")
        assert_near(twice, 2 * incoming * wanted, bound, "rounded at most twice")


def test_retained_gradients_are_not_those_handed_out():
    student, teacher = four_of(ONE_PASS)
    tensors = flatten(student, teacher)
    loss = fsp.fsp_loss(student, teacher)
    loss.backward(retain_graph=True)
    for x in tensors:
        x.grad.zero_()
    loss.backward()
    for x, wanted in zip(tensors, oracle(student, teacher).gradients, strict=True):
        assert_near(x.grad, wanted, 1e-5, "fp32")


def test_the_last_backward_gives_its_gradients_away(backend, monkeypatch):
    student, teacher = four_of(ONE_PASS)
    tensors = flatten(student, teacher)
    computed = []
    kind = type(get_backend(backend))
    compute = kind.loss

    def remember(self, *arguments):
        loss, gradients = compute(self, *arguments)
        computed.extend(g.data_ptr() for g in gradients)
        return loss, gradients

    monkeypatch.setattr(kind, "loss", remember)
    (3 * fsp.fsp_loss(student, teacher)).backward()
    assert [x.grad.data_ptr() for x in tensors] == computed
