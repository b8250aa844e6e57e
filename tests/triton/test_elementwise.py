"""The last step of forward, a sum, and all of backward, a scaling."""

from __future__ import annotations

import pytest
import torch
from calls import BF16, DEVICE, DTYPES, FP16, FP32, REGIMES, four_of, tensor
from tolerances import TOLERANCES, assert_near, flatten, oracle

import fsp_kernels as fsp
from fsp_kernels.backends import get_backend
from fsp_kernels.backends.triton import elementwise
from fsp_kernels.backends.triton.launch import Launch


def factor_of(value: float) -> torch.Tensor:
    return torch.tensor(value, device=DEVICE)


def scale(gradients, factor, in_place, dtypes=None):
    dtypes = [g.dtype for g in gradients] if dtypes is None else dtypes
    return get_backend("triton").scale(gradients, dtypes, factor_of(factor), in_place)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.parametrize("factor", [1.0, 3.0, 0.0, -0.5])
def test_gradients_are_scaled(factor, in_place, dtype):
    gradients = [tensor(*s, dtype=dtype, grad=False) for s in ((3, 5), (1,), (2, 3, 400))]
    wanted = [factor * g.double() for g in gradients]
    for found, w in zip(scale(gradients, factor, in_place), wanted, strict=True):
        assert found.dtype == dtype
        assert_near(found, w, TOLERANCES[dtype].rtol, "rounded once")


def test_in_place_is_in_place_and_otherwise_nothing_is_overwritten():
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
def test_gradients_that_wait_in_fp32_become_fp16(factor, in_place):
    gradient = 2.0**-20 * tensor(4, 300, grad=False)
    (found,) = scale([gradient], factor, in_place, dtypes=[FP16])
    assert torch.equal(found, (gradient * factor).half())


@pytest.mark.parametrize("layout", ["channels last", "every second position"])
def test_scaled_gradients_lie_as_gradients_do(layout):
    gradient = torch.empty_like(tensor(2, 3, 4, 5, layout=layout, grad=False)).normal_()
    (found,) = scale([gradient], 2.0, in_place=False)
    assert found.stride() == gradient.stride()
    assert torch.equal(found, 2 * gradient)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_factor_that_is_not_finite_reaches_every_element(value):
    (found,) = scale([tensor(5, grad=False)], value, in_place=True)
    assert not found.isfinite().any()


def test_there_may_be_more_tensors_than_one_launch_takes():
    gradients = [tensor(i + 1, grad=False) for i in range(70)]
    wanted = [3 * g.double() for g in gradients]
    for found, w in zip(scale(gradients, 3.0, in_place=True), wanted, strict=True):
        assert_near(found, w, TOLERANCES[FP32].rtol, "rounded once")


def test_more_elements_than_programs_times_block(monkeypatch):
    monkeypatch.setattr(elementwise, "_PROGRAMS", 2)
    elementwise._scale_launch.cache_clear()
    gradient = tensor(5 * elementwise.BLOCK + 3, grad=False)
    (found,) = scale([gradient], 3.0, in_place=False)
    elementwise._scale_launch.cache_clear()
    assert torch.equal(found, 3 * gradient)


def test_each_launch_sees_tensors_of_the_same_dtypes_every_time(monkeypatch):
    # What it compiled for the first is what it launches for the others.
    seen: dict[int, set] = {}
    call = Launch.__call__

    def record(self, stream, tensors, *scalars):
        seen.setdefault(id(self), set()).add(tuple(x.dtype for pair in tensors[0] for x in pair))
        return call(self, stream, tensors, *scalars)

    monkeypatch.setattr(Launch, "__call__", record)
    kinds = [FP32] * elementwise._MOST_TENSORS + [BF16] * elementwise._MOST_TENSORS
    scale([tensor(4, dtype=dtype, grad=False) for dtype in kinds], 3.0, in_place=True)
    assert len(seen) == 2
    assert all(len(dtypes) == 1 for dtypes in seen.values())


@pytest.mark.parametrize("count", [1, 1023, 1024, 1025, 5000])
def test_the_sum_takes_every_partial_loss(count):
    partials = torch.randn(count, dtype=torch.float64).to(DEVICE, FP32)
    result = partials.new_empty(())
    Launch(elementwise.fsp_finish, 1, 8, count, elementwise.BLOCK)(
        elementwise.raw_stream(partials.device), (partials, result)
    )
    scale_of_terms = partials.double().abs().sum()
    assert (result.double() - partials.double().sum()).abs() <= 1e-6 * scale_of_terms


# --- backward of a loss ---------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("incoming", [1.0, 3.0, 0.0])
def test_a_retained_graph_gives_the_same_gradients_again(incoming, dtype):
    student, teacher = four_of(REGIMES["one pass"], dtypes=(dtype, dtype))
    tensors = flatten(student, teacher)
    expected = oracle(student, teacher).gradients
    loss = fsp.fsp_loss(student, teacher, backend="triton")
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
    student, teacher = four_of(REGIMES["one pass"])
    tensors = flatten(student, teacher)
    loss = fsp.fsp_loss(student, teacher, backend="triton")
    loss.backward(retain_graph=True)
    for x in tensors:
        x.grad.zero_()
    loss.backward()
    for x, wanted in zip(tensors, oracle(student, teacher).gradients, strict=True):
        assert_near(x.grad, wanted, 1e-5, "fp32")


def test_the_last_backward_gives_its_gradients_away(monkeypatch):
    student, teacher = four_of(REGIMES["one pass"])
    tensors = flatten(student, teacher)
    computed = []
    backend = type(get_backend("triton"))
    compute = backend.loss

    def remember(self, *arguments):
        loss, gradients = compute(self, *arguments)
        computed.extend(g.data_ptr() for g in gradients)
        return loss, gradients

    monkeypatch.setattr(backend, "loss", remember)
    (3 * fsp.fsp_loss(student, teacher, backend="triton")).backward()
    assert [x.grad.data_ptr() for x in tensors] == computed
