"""``fsp_loss(..., reduction="none")``: one loss for each pair, each with a gradient of its own."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tolerances import TOLERANCES, assert_close, flatten, oracle
from torch.autograd import gradcheck
from torch.library import opcheck

import fsp_kernels as fsp
from fsp_kernels import reference

DTYPES = tuple(TOLERANCES)
NORMS = ("frobenius", "mse", "column")
FACTORS = (0.5, -2.0, 0.0)


def random(*shape, dtype=torch.float32):
    return torch.randn(shape).to(dtype).requires_grad_()


def three_pairs(dtype=torch.float32):
    """In difference form, in Gram form, and with a ready matrix; the first two share a map."""
    a, b = random(4, 5, 6, 6, dtype=dtype), random(4, 3, 3, 3, dtype=dtype)
    c, d = random(4, 5, 6, 6, dtype=dtype), random(4, 3, 3, 3, dtype=dtype)
    few = [random(4, 40, 1, 2, dtype=dtype) for _ in range(3)]
    matrix = random(4, 3, 7, dtype=dtype)
    student = [(a, b), (few[0], few[1]), (b, random(4, 7, 3, 3, dtype=dtype))]
    return student, [(c, d), (few[2], few[1]), matrix]


def losses_of(student, teacher, **options):
    return fsp.fsp_loss(student, teacher, reduction="none", **options)


def alone(student, teacher, **options):
    """Each pair's loss by a call of its own."""
    return [fsp.fsp_loss([s], [t], **options) for s, t in zip(student, teacher, strict=True)]


def variables(student, teacher):
    """Every tensor once."""
    return list({id(x): x for x in flatten(student, teacher)}.values())


def assert_bitwise(found, expected):
    for x, y in zip(found, expected, strict=True):
        assert (x.dtype, x.stride()) == (y.dtype, y.stride())
        assert torch.equal(x, y)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_each_loss_is_that_of_a_call_of_its_own(dtype, norm):
    student, teacher = three_pairs(dtype)
    losses = losses_of(student, teacher, norm=norm)
    assert losses.shape == (3,)
    assert_bitwise(losses, alone(student, teacher, norm=norm))


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_each_loss_has_a_gradient_of_its_own(dtype, norm):
    student, teacher = three_pairs(dtype)
    tensors = flatten(student, teacher)
    losses = losses_of(student, teacher, norm=norm)
    for index, (s, t) in enumerate(zip(student, teacher, strict=True)):
        own = [*s, *([t] if isinstance(t, torch.Tensor) else t)]
        expected = torch.autograd.grad(fsp.fsp_loss([s], [t], norm=norm), own)
        assert_bitwise(torch.autograd.grad(losses[index], own, retain_graph=True), expected)
        strangers = [x for x in tensors if all(x is not y for y in own)]
        for gradient in torch.autograd.grad(losses[index], strangers, retain_graph=True):
            assert not gradient.any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_each_gradient_is_multiplied_by_that_of_its_loss(dtype):
    student, teacher = three_pairs(dtype)
    tensors = variables(student, teacher)
    losses = losses_of(student, teacher)
    found = torch.autograd.grad(losses, tensors, losses.new_tensor(FACTORS))
    whole = sum(f * x for f, x in zip(FACTORS, alone(student, teacher), strict=True))
    for x, y in zip(found, torch.autograd.grad(whole, tensors), strict=True):
        rtol = 2 * TOLERANCES[dtype].rtol
        torch.testing.assert_close(x, y, rtol=rtol, atol=rtol * y.abs().max().item())


def test_the_sum_of_the_losses_is_the_loss():
    student, teacher = three_pairs()
    tensors = variables(student, teacher)
    losses, loss = losses_of(student, teacher), fsp.fsp_loss(student, teacher)
    torch.testing.assert_close(losses.sum(), loss)
    # The gradient that comes in is expanded: its elements are one in memory.
    found = torch.autograd.grad(losses.sum(), tensors)
    assert_bitwise(found, torch.autograd.grad(loss, tensors))


def test_a_retained_graph_gives_the_same_gradients_again():
    student, teacher = three_pairs()
    tensors, factors = variables(student, teacher), torch.tensor(FACTORS)
    losses = losses_of(student, teacher)
    first = torch.autograd.grad(losses, tensors, factors, retain_graph=True)
    kept = [g.clone() for g in first]
    torch.autograd.grad(losses, tensors, 2 * factors, retain_graph=True)
    assert_bitwise(first, kept)
    assert_bitwise(torch.autograd.grad(losses, tensors, factors), kept)


@pytest.mark.parametrize("make", [list, torch.tensor], ids=["numbers", "a tensor"])
def test_losses_are_weighted(make):
    student, teacher = three_pairs()
    losses = losses_of(student, teacher, weights=make([0.5, 2.0, 0.0]))
    one_by_one = zip(student, teacher, (0.5, 2.0, 0.0), strict=True)
    assert_bitwise(losses, [fsp.fsp_loss([s], [t], weights=[w]) for s, t, w in one_by_one])


def test_weights_get_the_gradient_of_each_loss():
    student, teacher = three_pairs()
    weights = torch.tensor([0.5, 2.0, 1.0], requires_grad=True)
    losses = losses_of(student, teacher, weights=weights)
    (found,) = torch.autograd.grad(losses, weights, torch.tensor(FACTORS))
    expected = torch.stack(alone(student, teacher)) * torch.tensor(FACTORS)
    torch.testing.assert_close(found, expected.detach())


def test_weights_that_require_a_gradient_cost_no_more_calls(monkeypatch):
    calls = []
    loss = fsp.backends.TorchBackend.loss

    def count(self, maps, plan, *rest):
        calls.append(plan)
        return loss(self, maps, plan, *rest)

    monkeypatch.setattr(fsp.backends.TorchBackend, "loss", count)
    student, teacher = three_pairs()
    fsp.fsp_loss(student, teacher, weights=torch.ones(3, requires_grad=True), backend="torch")
    assert [len(plan.pairs) for plan in calls] == [3]


def test_derivatives_are_right_in_fp64():
    shapes = (2, 2, 3), (2, 3, 3), (2, 2, 3), (2, 3, 3), (2, 9, 1), (2, 9, 1), (2, 3, 2)

    def losses(a, b, c, d, e, f, matrix):
        student, teacher = [(a, b), (e, e), (b, a)], [(c, d), (f, f), matrix]
        return losses_of(student, teacher, channel_dim=1)

    tensors = [random(*shape, dtype=torch.float64) for shape in shapes]
    assert gradcheck(losses, tensors, check_batched_grad=True)


def test_chunks_of_a_pair_are_added(planner):
    student, teacher = three_pairs()
    whole = losses_of(student, teacher, backend="torch")
    planner(CHUNK_BYTES=1, CHUNK_SAMPLES=1)
    plan = fsp.explain(student, teacher, backend="torch")
    assert all(pair.samples == 1 for pair in plan.pairs)
    torch.testing.assert_close(losses_of(student, teacher, backend="torch"), whole)


sizes = st.tuples(st.integers(1, 4), st.integers(1, 4), *[st.integers(1, 3)] * 4)


@given(sizes=st.lists(sizes, min_size=1, max_size=4), norm=st.sampled_from(NORMS))
def test_losses_are_those_of_the_definition(sizes, norm):
    student, teacher = (
        [(random(2, m, h, w), random(2, n, y, x)) for m, n, h, w, y, x in sizes] for _ in range(2)
    )
    losses = losses_of(student, teacher, norm=norm)
    exact = [oracle([s], [t], norm=norm).loss for s, t in zip(student, teacher, strict=True)]
    assert_close(losses, torch.stack(exact))


def test_the_reference_has_it_too():
    student, teacher = three_pairs(torch.float64)
    found = reference.fsp_loss(student, teacher, weights=[1.0, 2.0, 0.5], reduction="none")
    assert_close(losses_of(student, teacher, weights=[1.0, 2.0, 0.5]), found)
    assert found.sum() == reference.fsp_loss(student, teacher, weights=[1.0, 2.0, 0.5])


# --- the operator -------------------------------------------------------------------------------


def test_the_operator_is_well_behaved():
    student, teacher = three_pairs()
    tensors = flatten(student, teacher)
    needs = [x.requires_grad for x in tensors]
    ready = [False, False, True]
    options = "max", "frobenius", "torch"
    opcheck(
        torch.ops.fsp.loss,
        (tensors, ready, needs, [1.0, 2.0, 0.5], *options),
        {"reduction": "none"},
    )
    opcheck(
        torch.ops.fsp.loss,
        (tensors, ready, needs, [], *options, torch.tensor([1.0, 2.0, 0.5]), "none"),
    )


@pytest.mark.parametrize("weighted", [False, True])
def test_a_compiled_call_gives_the_same(weighted):
    torch._dynamo.reset()
    student, teacher = three_pairs()
    tensors, factors = variables(student, teacher), torch.tensor(FACTORS)
    weights = torch.tensor([0.5, 2.0, 1.0], requires_grad=True) if weighted else None
    wanted = [*tensors, weights] if weighted else tensors
    compiled = torch.compile(losses_of, fullgraph=True, backend="aot_eager")
    losses, expected = (f(student, teacher, weights=weights) for f in (compiled, losses_of))
    assert torch.equal(losses, expected)
    found = torch.autograd.grad(losses, wanted, factors)
    for x, y in zip(found, torch.autograd.grad(expected, wanted, factors), strict=True):
        torch.testing.assert_close(x, y)


def test_it_can_be_exported():
    class Losses(torch.nn.Module):
        def forward(self, a, b, c, d):
            return losses_of([(a, b), (b, a)], [(c, d), (d, c)])

    maps = [random(2, 3, 4, 4).detach() for _ in range(4)]
    program = torch.export.export(Losses(), tuple(maps))
    assert torch.equal(program.module()(*maps), Losses()(*maps))


def test_a_jacobian_has_a_row_for_each_loss():
    student, teacher = three_pairs()
    a = student[0][0]

    def losses(x):
        return losses_of([(x, student[0][1]), *student[1:]], teacher)

    rows = torch.func.jacrev(losses)(a)
    (expected,) = torch.autograd.grad(losses(a)[0], a)
    torch.testing.assert_close(rows[0], expected)
    assert not rows[1:].any()


def test_gradients_may_be_batched():
    student, teacher = three_pairs()
    tensors = variables(student, teacher)
    losses = losses_of(student, teacher)
    batched = torch.autograd.grad(
        losses, tensors, torch.eye(3), is_grads_batched=True, retain_graph=True
    )
    for index in range(3):
        own = torch.autograd.grad(losses[index], tensors, retain_graph=True)
        for x, y in zip(batched, own, strict=True):
            torch.testing.assert_close(x[index], y)


def test_vmap_gives_the_losses_of_each_slice():
    student, teacher = three_pairs()
    scales = torch.tensor([1.0, 2.0])

    def losses(scale):
        return losses_of([(scale * a, b) for a, b in student], teacher)

    found = torch.vmap(losses)(scales)
    torch.testing.assert_close(found, torch.stack([losses(scale) for scale in scales]))


def test_a_second_derivative_says_what_to_write_instead():
    student, teacher = three_pairs()
    a = student[0][0]
    (gradient,) = torch.autograd.grad(
        losses_of(student, teacher), a, torch.ones(3), create_graph=True
    )
    with pytest.raises(RuntimeError, match="once differentiable"):
        gradient.sum().backward()


# --- options ------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [fsp.fsp_loss, fsp.FSPLoss], ids=["function", "module"])
def test_an_unknown_reduction_is_refused(make):
    arguments = three_pairs() if make is fsp.fsp_loss else ()
    with pytest.raises(ValueError, match=r"^reduction: got 'mean', expected one of 'sum', 'none'"):
        make(*arguments, reduction="mean")


def test_a_module_has_it_too():
    student, teacher = three_pairs()
    criterion = fsp.FSPLoss(weights=[0.5, 2.0, 1.0], norm="mse", reduction="none")
    expected = losses_of(student, teacher, weights=[0.5, 2.0, 1.0], norm="mse")
    assert torch.equal(criterion(student, teacher), expected)
    assert repr(criterion).endswith("norm='mse', reduction='none')")
