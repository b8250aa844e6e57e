"""``fsp_matrix`` and ``fsp_loss`` as citizens of autograd, autocast, ``torch.func`` and threads."""

from __future__ import annotations

import threading
from functools import partial

import pytest
import torch
from tolerances import TOLERANCES, assert_close, oracle
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.utils.checkpoint import checkpoint

import fsp_kernels as fsp
from fsp_kernels import reference
from fsp_kernels.backends.torch_backend import TorchBackend

ONCE = "fsp_loss is once differentiable.*fsp_matrix"


def maps(*shapes, dtype=torch.float32, requires_grad=True):
    return [torch.randn(*s).to(dtype).requires_grad_(requires_grad) for s in shapes]


def four_maps(batch=3, positions=(6, 6), **options):
    """Student first and second, teacher first and second."""
    m, n = (batch, 5, *positions), (batch, 4, *positions)
    return maps(m, n, m, n, **options)


# Channels are in axis 1 here, for maps of three axes too.
matrix_of = partial(fsp.fsp_matrix, channel_dim=1)


def loss_of(a, b, c, d, **options):
    return fsp.fsp_loss([(a, b)], [(c, d)], channel_dim=1, **options)


def reference_loss(a, b, c, d):
    return reference.fsp_loss([(a, b)], [(c, d)])


def oracle_of(a, b, c, d, **options):
    return oracle([(a, b)], [(c, d)], **options)


def assert_bitwise(actual, expected):
    for x, y in zip(actual, expected, strict=True):
        assert torch.equal(x, y)


# --- fsp_matrix ---------------------------------------------------------------------------------

MATRIX_SHAPES = {
    "tokens": ((2, 3, 5), (2, 4, 5)),
    "images": ((2, 3, 4, 3), (2, 2, 4, 3)),
    "volumes": ((2, 3, 2, 3, 2), (2, 2, 2, 3, 2)),
    "one of everything": ((1, 1, 1), (1, 1, 1)),
    "first pooled": ((1, 2, 4, 4), (1, 2, 2, 2)),
    "second pooled unevenly": ((1, 2, 3, 2), (1, 2, 4, 3)),
    "both pooled": ((1, 2, 3, 2), (1, 2, 2, 3)),
}


@pytest.mark.parametrize("pool", ["max", "avg"])
@pytest.mark.parametrize("shapes", MATRIX_SHAPES.values(), ids=MATRIX_SHAPES)
def test_matrix_is_that_of_the_definition(shapes, pool):
    first, second = maps(*shapes, dtype=torch.float64)
    assert_close(matrix_of(first, second, pool=pool), reference.fsp_matrix(first, second, pool))


@pytest.mark.parametrize("pool", ["max", "avg"])
@pytest.mark.parametrize("shapes", MATRIX_SHAPES.values(), ids=MATRIX_SHAPES)
def test_matrix_is_twice_differentiable(shapes, pool):
    inputs = maps(*shapes, dtype=torch.float64)
    assert gradcheck(lambda x, y: matrix_of(x, y, pool=pool), inputs)
    assert gradgradcheck(lambda x, y: matrix_of(x, y, pool=pool), inputs)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("shapes", [((2, 3, 5), (2, 4, 5)), ((2, 3, 2, 2), (2, 2, 2, 2))], ids=str)
def test_matrix_has_derivatives_of_every_kind(shapes):
    inputs = maps(*shapes, dtype=torch.float64)
    batched = {"check_batched_grad": True}
    forward = {"check_forward_ad": True, "check_batched_forward_grad": True}
    assert gradcheck(matrix_of, inputs, **batched, **forward)
    assert gradgradcheck(matrix_of, inputs, **batched, check_fwd_over_rev=True)


@pytest.mark.parametrize("position", [0, 1])
def test_forward_mode_of_the_matrix_in_one_map_alone(position):
    inputs = maps((2, 3, 4), (2, 2, 4), dtype=torch.float64)
    tangent = torch.randn_like(inputs[position])

    def derivative(matrix):
        with forward_ad.dual_level():
            mixed = list(inputs)
            mixed[position] = forward_ad.make_dual(mixed[position], tangent)
            return forward_ad.unpack_dual(matrix(*mixed)).tangent

    assert_close(derivative(matrix_of), derivative(reference.fsp_matrix))


def test_batched_gradients_of_the_matrix_reach_a_backend_one_by_one(monkeypatch):
    # Kernels read memory, and a batched tensor has none of its own.
    original, addresses = TorchBackend.matrix_backward, []

    def matrix_backward(self, gradient, *rest):
        addresses.append(gradient.data_ptr())
        return original(self, gradient, *rest)

    monkeypatch.setattr(TorchBackend, "matrix_backward", matrix_backward)
    x, y = maps((2, 3, 4), (2, 2, 4))
    incoming = torch.randn(3, 2, 3, 2)
    batched = torch.autograd.grad(
        matrix_of(x, y, backend="torch"), (x, y), incoming, is_grads_batched=True
    )
    for i, one in enumerate(incoming):
        assert_bitwise([g[i] for g in batched], torch.autograd.grad(matrix_of(x, y), (x, y), one))
    assert len(addresses) == 2 * 3 + 2 * 3


def test_gram_matrix_is_twice_differentiable():
    (x,) = maps((2, 3, 4), dtype=torch.float64)
    assert gradcheck(lambda x: matrix_of(x, x), (x,))
    assert gradgradcheck(lambda x: matrix_of(x, x), (x,))


@pytest.mark.parametrize("position", [0, 1])
def test_matrix_is_twice_differentiable_in_one_map_alone(position):
    inputs = maps((2, 3, 4), (2, 2, 4), dtype=torch.float64)
    inputs[position].requires_grad_(False)
    assert gradcheck(matrix_of, inputs)
    assert gradgradcheck(matrix_of, inputs)


HALVES = [torch.float16, torch.bfloat16]


@pytest.mark.parametrize(
    ("first", "second"), [(x, y) for x in TOLERANCES for y in TOLERANCES], ids=str
)
def test_matrix_has_the_promoted_dtype_and_gradients_their_inputs(first, second):
    x, y = maps((2, 3, 40))[0].to(first), maps((2, 4, 40))[0].to(second)
    x, y = x.detach().requires_grad_(), y.detach().requires_grad_()
    matrix = matrix_of(x, y)
    assert matrix.dtype == torch.promote_types(first, second)
    exact = [t.detach().double().requires_grad_() for t in (x, y)]
    expected = reference.fsp_matrix(*exact)
    assert_close(matrix, expected, expected.abs().max().item())
    incoming = torch.randn_like(matrix)
    gradients = torch.autograd.grad(matrix, (x, y), incoming)
    wanted = torch.autograd.grad(expected, exact, incoming.double())
    for t, gradient, w in zip((x, y), gradients, wanted, strict=True):
        assert gradient.dtype == t.dtype
        # Rounded to the promoted dtype and then to its own; the products are fp32's.
        row = TOLERANCES[matrix.dtype]
        assert (gradient.double() - w).abs().max() <= (
            (row.rtol + TOLERANCES[t.dtype].rtol) * w.abs().max()
        )


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_half_precision_matrix_accumulates_in_fp32(dtype):
    # Half precision stops counting at 2048 or 256, and loses the small terms long before.
    x = torch.ones(1, 1, 8192, dtype=dtype)
    x[..., 1::2] = 0.03125
    (y,) = maps((1, 6, 8192), dtype=dtype, requires_grad=False)
    y = y.abs()
    assert_close(matrix_of(x, y), reference.fsp_matrix(x.double(), y.double()))


def test_matrix_gradients_arrive_in_the_layout_of_their_inputs():
    x = torch.randn(3, 5, 6, 4).to(memory_format=torch.channels_last).requires_grad_()
    y = torch.randn(3, 7, 6, 4).requires_grad_()
    tokens = torch.randn(3, 24, 5).mT.requires_grad_()
    for first, second in ((x, y), (y, x), (x, x), (tokens, y.detach().flatten(2))):
        matrix = matrix_of(first, second)
        gradient = torch.autograd.grad(matrix, first, torch.randn_like(matrix))[0]
        assert gradient.stride() == first.stride()


@pytest.mark.parametrize("position", [0, 1])
def test_a_map_of_inference_mode_may_be_one_of_a_matrix(position):
    inputs = maps((2, 3, 4), (2, 2, 4), dtype=torch.float64)
    expected = torch.autograd.grad(reference.fsp_matrix(*inputs).sum(), inputs)[1 - position]
    with torch.inference_mode():
        inputs[position] = inputs[position].clone()
    matrix = matrix_of(*inputs)
    with torch.inference_mode():
        inputs[position].zero_()  # as an in-place activation does, which autograd does not see here
    assert_close(torch.autograd.grad(matrix.sum(), inputs[1 - position])[0], expected)


def test_matrix_without_gradients_records_none():
    x, y = maps((2, 3, 4), (2, 2, 4))
    with torch.no_grad():
        assert not matrix_of(x, y).requires_grad
    assert not matrix_of(x.detach(), y.detach()).requires_grad


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_matrix_keeps_what_is_not_finite_in_its_sample(value):
    x, y = maps((3, 4, 6), (3, 5, 6), requires_grad=False)
    expected = reference.fsp_matrix(x.double(), y.double())
    x[1, 2, 3] = value
    matrix = matrix_of(x, y)
    assert not matrix[1, 2].isfinite().any()
    assert_close(matrix[[0, 2]], expected[[0, 2]])


# --- fsp_loss: backward, once or more -----------------------------------------------------------


@pytest.mark.parametrize("incoming", [1.0, 3.0, 0.0])
def test_a_retained_graph_gives_the_same_gradients_again(incoming):
    tensors = four_maps()
    expected = oracle_of(*tensors).gradients
    loss, factor = loss_of(*tensors), torch.tensor(incoming)
    first = torch.autograd.grad(loss, tensors, factor, retain_graph=True)
    kept = [g.clone() for g in first]
    second = torch.autograd.grad(loss, tensors, 2 * factor, retain_graph=True)
    third = torch.autograd.grad(loss, tensors, factor)
    assert_bitwise(first, kept)
    for once, twice, again, wanted in zip(first, second, third, expected, strict=True):
        assert_close(once, incoming * wanted)
        assert_close(twice, 2 * incoming * wanted)
        assert_close(again, incoming * wanted)


def test_retained_gradients_are_not_those_handed_out():
    tensors = four_maps()
    expected = oracle_of(*tensors).gradients
    loss = loss_of(*tensors)
    loss.backward(retain_graph=True)
    for x in tensors:
        x.grad.zero_()  # as optimizer.zero_grad(set_to_none=False) does
    loss.backward()
    for x, wanted in zip(tensors, expected, strict=True):
        assert_close(x.grad, wanted)


def test_a_second_backward_asks_for_retain_graph():
    tensors = four_maps()
    loss = loss_of(*tensors)
    loss.backward()
    with pytest.raises(RuntimeError, match="retain_graph=True"):
        loss.backward()


def test_gradients_of_several_losses_accumulate():
    a, b, c, d = four_maps()
    expected = oracle_of(a, b, c, d).gradients
    loss_of(a, b, c, d).backward()
    (2 * loss_of(a, b, c, d)).backward()
    for x, wanted in zip((a, b, c, d), expected, strict=True):
        assert_close(x.grad, 3 * wanted)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_the_loss_is_a_term_of_a_larger_one(alpha):
    tensors = four_maps()
    expected = oracle_of(*tensors).gradients
    total = alpha * loss_of(*tensors) + sum((i * x).sum() for i, x in enumerate(tensors))
    gradients = torch.autograd.grad(total, tensors)
    for i, (gradient, wanted) in enumerate(zip(gradients, expected, strict=True)):
        assert_close(gradient, alpha * wanted + i)


def test_gradients_flow_on_into_the_network():
    a, b, c, d = four_maps()
    weight = torch.randn(5, 5, dtype=torch.float64, requires_grad=True)
    total = loss_of(torch.einsum("oc,bchw->bohw", weight.float(), a), b, c, d)
    exact = [x.detach().double() for x in (a, b, c, d)]
    mapped = torch.einsum("oc,bchw->bohw", weight, exact[0])
    expected = reference.fsp_loss([(mapped, exact[1])], [(exact[2], exact[3])])
    (wanted,) = torch.autograd.grad(expected, weight)
    (gradient,) = torch.autograd.grad(total, weight)
    assert_close(gradient.float(), wanted)


def test_leaves_take_their_gradients_without_a_copy():
    tensors = four_maps()
    handed_out = {}
    for i, x in enumerate(tensors):
        x.register_hook(lambda g, i=i: handed_out.__setitem__(i, g.data_ptr()))
    (3 * loss_of(*tensors)).backward()
    assert [x.grad.data_ptr() for x in tensors] == [handed_out[i] for i in range(4)]


# --- fsp_loss: second derivatives ---------------------------------------------------------------


def test_create_graph_alone_changes_nothing():
    tensors = four_maps()
    expected = oracle_of(*tensors).gradients
    gradients = torch.autograd.grad(loss_of(*tensors), tensors, create_graph=True)
    for gradient, wanted in zip(gradients, expected, strict=True):
        assert_close(gradient.detach(), wanted)


def test_a_second_derivative_by_grad_is_an_error_that_names_the_alternative():
    tensors = four_maps()
    gradients = torch.autograd.grad(loss_of(*tensors), tensors, create_graph=True)
    for gradient in gradients:
        with pytest.raises(RuntimeError, match=ONCE):
            torch.autograd.grad(gradient.sum(), tensors[0], retain_graph=True, allow_unused=True)


def test_a_second_derivative_by_backward_is_an_error_that_names_the_alternative():
    a, b, c, d = four_maps()
    (gradient,) = torch.autograd.grad(loss_of(a, b, c, d), a, create_graph=True)
    penalty = loss_of(a.detach(), b, c, d) + gradient.square().sum()
    with pytest.raises(RuntimeError, match=ONCE):
        penalty.backward()


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph")
def test_a_second_derivative_after_backward_is_an_error_that_names_the_alternative():
    a, b, c, d = four_maps()
    loss_of(a, b, c, d).backward(create_graph=True)
    with pytest.raises(RuntimeError, match=ONCE):
        a.grad.sum().backward()
    for x in (a, b, c, d):
        x.grad = None  # breaks the cycle of tensor and graph


def test_a_second_derivative_by_torch_func_is_an_error_that_names_the_alternative():
    a, b, c, d = four_maps(requires_grad=False)
    gradient = torch.func.grad(lambda x: loss_of(x, b, c, d))
    with pytest.raises(RuntimeError, match=ONCE):
        torch.func.grad(lambda x: gradient(x).sum())(a)


def test_a_second_derivative_of_batched_gradients_is_an_error_that_names_the_alternative():
    tensors = four_maps()
    gradients = torch.autograd.grad(
        loss_of(*tensors), tensors, torch.ones(3), is_grads_batched=True, create_graph=True
    )
    for gradient in gradients:
        with pytest.raises(RuntimeError, match=ONCE):
            gradient.sum().backward(retain_graph=True)


def test_gradients_are_differentiable_in_the_incoming_factor():
    tensors = four_maps(dtype=torch.float64)

    def derivative(function):
        factor = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
        gradients = torch.autograd.grad(function(*tensors), tensors, factor, create_graph=True)
        total = sum((g * x.detach()).sum() for g, x in zip(gradients, tensors, strict=True))
        return torch.autograd.grad(total, factor)[0]

    assert_close(derivative(loss_of), derivative(reference_loss))


def test_jvp_by_two_backwards_of_the_loss():
    tensors = tuple(four_maps(dtype=torch.float64, requires_grad=False))
    (_, tangent), (_, expected) = (
        torch.autograd.functional.jvp(function, tensors, tensors)
        for function in (loss_of, reference_loss)
    )
    assert_close(tangent, expected)


def test_gradients_carry_the_tangent_of_the_incoming_factor():
    tensors = four_maps()
    expected = oracle_of(*tensors).gradients
    with forward_ad.dual_level():
        factor = forward_ad.make_dual(torch.tensor(2.0), torch.tensor(3.0))
        gradients = torch.autograd.grad(loss_of(*tensors), tensors, factor)
        for gradient, wanted in zip(gradients, expected, strict=True):
            value, tangent = forward_ad.unpack_dual(gradient)
            assert_close(value, 2 * wanted)
            assert_close(tangent, 3 * wanted)


# --- fsp_loss: forward mode ---------------------------------------------------------------------


def dual_loss(*tensors):
    with forward_ad.dual_level():
        return loss_of(*(forward_ad.make_dual(x, x) for x in tensors))


FORWARD_MODES = {
    "dual tensors": dual_loss,
    "jvp": lambda *x: torch.func.jvp(loss_of, x, x),
    "jacfwd": torch.func.jacfwd(loss_of),
    "hessian": torch.func.hessian(loss_of),
    "jvp of grad": lambda *x: torch.func.jvp(torch.func.grad(loss_of), x, x),
    "linearize": lambda *x: torch.func.linearize(loss_of, *x)[1](*x),
    "functional.jacobian": lambda *x: torch.autograd.functional.jacobian(
        loss_of, x, vectorize=True, strategy="forward-mode"
    ),
}


@pytest.mark.parametrize("derivative", FORWARD_MODES.values(), ids=FORWARD_MODES)
def test_forward_mode_of_the_loss_is_an_error_that_names_the_alternative(derivative):
    with pytest.raises(RuntimeError, match=r"fsp_loss has no forward-mode derivative.*fsp_matrix"):
        derivative(*four_maps(requires_grad=False))


def test_the_alternative_the_error_names_is_twice_differentiable():
    student = maps((2, 3, 4), (2, 2, 4), dtype=torch.float64)
    teacher = maps((2, 3, 4), (2, 2, 4), dtype=torch.float64)

    def alternative(*tensors):
        student, teacher = tensors[:2], tensors[2:]
        return ((matrix_of(*student) - matrix_of(*teacher)) ** 2).sum() / 2

    assert_close(alternative(*student, *teacher), loss_of(*student, *teacher))
    assert gradgradcheck(alternative, (*student, *teacher))


# --- fsp_loss: options --------------------------------------------------------------------------


def test_plans_of_equal_shapes_keep_apart_what_requires_gradients():
    for wanted in [(0,), (1, 2), (), (0, 1, 2, 3), (3,)]:
        tensors = four_maps(requires_grad=False)
        for i in wanted:
            tensors[i].requires_grad_()
        loss = loss_of(*tensors)
        assert loss.requires_grad == bool(wanted)
        if wanted:
            loss.backward()
        assert [x.grad is not None for x in tensors] == [i in wanted for i in range(4)]
        oracle_of(*tensors).check(loss, [x.grad for x in tensors])


def test_weights_may_change_between_calls():
    a, b, c, d = tensors = four_maps()
    for weights in ([1, 1], [0.5, 2], [0, 3], None):
        loss = fsp.fsp_loss([(a, b), (b, a)], [(c, d), (d, c)], weights=weights)
        expected = oracle([(a, b), (b, a)], [(c, d), (d, c)], weights)
        assert_close(loss, expected.loss)
        first = expected.gradients
        wanted = [first[i] + first[j] for i, j in ((0, 5), (1, 4), (2, 7), (3, 6))]
        for gradient, w in zip(torch.autograd.grad(loss, tensors), wanted, strict=True):
            assert_close(gradient, w)


def test_options_may_change_between_calls():
    sizes = (3, 5, 8, 8), (3, 4, 4, 4)
    a, b, c, d = tensors = maps(*sizes, *sizes)
    for pool in ("max", "avg"):
        for norm in ("frobenius", "mse", "column"):
            loss = loss_of(*tensors, pool=pool, norm=norm)
            expected = oracle_of(a, b, c, d, pool=pool, norm=norm)
            expected.check(loss, torch.autograd.grad(loss, tensors))


# --- fsp_loss: weights that are a tensor --------------------------------------------------------


def two_pairs():
    a, b, c, d = four_maps()
    return [(a, b), (b, a)], [(c, d), (d, c)]


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_a_tensor_of_weights_is_read_like_numbers(dtype):
    student, teacher = two_pairs()
    loss = fsp.fsp_loss(student, teacher, weights=torch.tensor([0.5, 2], dtype=dtype))
    assert_bitwise([loss], [fsp.fsp_loss(student, teacher, weights=[0.5, 2])])


def test_a_tensor_of_weights_that_requires_a_gradient_gets_it():
    student, teacher = two_pairs()
    weights = torch.tensor([0.5, 2.0], requires_grad=True)
    loss = fsp.fsp_loss(student, teacher, weights=weights)
    *gradients, to_weights = torch.autograd.grad(loss, (*student[0], *teacher[0], weights))
    exact = oracle(student, teacher, [0.5, 2.0])
    assert_close(loss, exact.loss)
    assert_close(gradients[0], exact.gradients[0] + exact.gradients[5])
    alone = [oracle([s], [t]).loss for s, t in zip(student, teacher, strict=True)]
    assert_close(to_weights, torch.stack(alone))


WEIGHT_TRANSFORMS = {
    "grad": torch.func.grad,
    "jacfwd": torch.func.jacfwd,
    "vmap": lambda loss: lambda weights: torch.vmap(loss)(weights.expand(2, -1)),
}


@pytest.mark.parametrize("transform", WEIGHT_TRANSFORMS.values(), ids=WEIGHT_TRANSFORMS)
def test_transforms_see_a_tensor_of_weights(transform):
    student, teacher = ([tuple(x.detach() for x in p) for p in pairs] for pairs in two_pairs())
    weights = torch.tensor([0.5, 2.0])
    found = transform(lambda w: fsp.fsp_loss(student, teacher, weights=w))(weights)
    assert_close(
        found,
        transform(lambda w: reference.fsp_loss(student, teacher, weights=w))(weights).double(),
    )


# --- autocast and loss scaling ------------------------------------------------------------------


@pytest.mark.parametrize("positions", [(1, 1), (6, 6)], ids=["gram", "matrix"])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_autocast_leaves_the_loss_alone(dtype, positions):
    tensors = four_maps(positions=positions)
    plain = loss_of(*tensors)
    expected = torch.autograd.grad(plain, tensors)
    with torch.autocast("cpu", dtype):
        loss = loss_of(*tensors)
        inside = torch.autograd.grad(loss, tensors, retain_graph=True)
    outside = torch.autograd.grad(loss, tensors)
    assert_bitwise((loss, *inside), (plain, *expected))
    assert_bitwise(outside, expected)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_autocast_leaves_the_matrix_alone(dtype):
    x, y = maps((2, 3, 4, 4), (2, 5, 4, 4))
    plain = matrix_of(x, y)
    incoming = torch.randn_like(plain)
    expected = torch.autograd.grad(plain, (x, y), incoming)
    with torch.autocast("cpu", dtype):
        matrix = matrix_of(x, y)
        inside = torch.autograd.grad(matrix, (x, y), incoming, retain_graph=True)
    assert_bitwise((matrix, *inside), (plain, *expected))


def test_maps_made_under_autocast_are_taken_as_they_come():
    a, b, c, d = four_maps()
    layer = torch.nn.Conv2d(5, 5, 1)
    with torch.autocast("cpu", torch.bfloat16):
        mapped = layer(a)
        assert mapped.dtype == torch.bfloat16
        loss = loss_of(mapped, b, c, d)
    assert_close(loss, oracle_of(mapped, b, c, d).loss)
    loss.backward()
    assert layer.weight.grad.dtype == torch.float32
    assert a.grad.abs().sum() > 0


def test_a_gradient_scaler_trains_as_without_one():
    scaler = torch.amp.GradScaler("cpu", init_scale=65536.0)
    tensors = four_maps()
    optimizer = torch.optim.SGD(tensors, lr=1.0)
    before = [x.detach().double() for x in tensors]
    expected = oracle_of(*tensors).gradients
    scaler.scale(loss_of(*tensors)).backward()
    scaler.step(optimizer)
    scaler.update()
    for x, start, wanted in zip(tensors, before, expected, strict=True):
        assert_close(x.detach(), start - wanted)


# --- torch.func ---------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", ["frobenius", "mse", "column"])
def test_func_grad_of_the_loss(norm):
    tensors = four_maps(requires_grad=False)
    gradients = torch.func.grad(lambda *x: loss_of(*x, norm=norm), argnums=(0, 1, 2, 3))(*tensors)
    expected = oracle_of(*tensors, norm=norm)
    expected.check(loss_of(*tensors, norm=norm), gradients)


def test_func_grad_of_the_loss_in_some_maps_and_with_a_factor():
    a, b, c, d = four_maps(requires_grad=False)
    gradient = torch.func.grad(lambda x: 3 * loss_of(x, b, c, d))(a)
    assert_close(gradient, 3 * oracle_of(a, b, c, d).gradients[0])


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_func_grad_of_the_loss_in_half_precision(dtype):
    tensors = four_maps(requires_grad=False, dtype=dtype)
    gradients = torch.func.grad(loss_of, argnums=(0, 1, 2, 3))(*tensors)
    assert all(g.dtype == dtype for g in gradients)
    a, b, c, d = (x.requires_grad_() for x in tensors)
    plan = fsp.explain([(a, b)], [(c, d)])
    oracle_of(a, b, c, d).check(loss_of(a, b, c, d).detach(), gradients, plan)


def test_func_grad_of_the_matrix():
    x, y = maps((2, 3, 4, 4), (2, 5, 4, 4), requires_grad=False)
    gradients = torch.func.grad(lambda x, y: matrix_of(x, y).square().sum(), argnums=(0, 1))(x, y)
    exact = [t.double().requires_grad_() for t in (x, y)]
    wanted = torch.autograd.grad(reference.fsp_matrix(*exact).square().sum(), exact)
    for gradient, w in zip(gradients, wanted, strict=True):
        assert_close(gradient, w)


def test_vjp_of_the_loss():
    tensors = four_maps(requires_grad=False)
    loss, vjp = torch.func.vjp(loss_of, *tensors)
    oracle_of(*tensors).check(loss, vjp(torch.ones_like(loss)))


@pytest.mark.parametrize(
    "in_dims", [(0, 0), (1, 0), (0, 2), (-1, 1), (None, 0), (3, None)], ids=str
)
@pytest.mark.parametrize("positions", [(6,), (4, 4)], ids=["tokens", "images"])
def test_vmap_of_the_matrix(positions, in_dims):
    x, y = maps((2, 3, *positions), (2, 5, *positions), requires_grad=False)
    slices = 6
    stacked = [
        t if dim is None else torch.stack([t + i for i in range(slices)], dim)
        for t, dim in zip((x, y), in_dims, strict=True)
    ]
    matrices = torch.vmap(matrix_of, in_dims)(*stacked)
    assert matrices.shape == (slices, 2, 3, 5)
    for i, matrix in enumerate(matrices):
        pair = [t if dim is None else t + i for t, dim in zip((x, y), in_dims, strict=True)]
        assert_close(matrix, reference.fsp_matrix(*(t.double() for t in pair)))


def test_transforms_take_one_ready_matrix_for_all_samples():
    a, b, matrix = maps((3, 5, 6, 6), (3, 4, 6, 6), (1, 5, 4), requires_grad=False)

    def loss(a, b, matrix):
        return fsp.fsp_loss([(a, b)], [matrix])

    expected = oracle([(a, b)], [matrix])
    expected.check(loss(a, b, matrix), torch.func.grad(loss, argnums=(0, 1, 2))(a, b, matrix))
    losses = torch.vmap(loss, in_dims=(None, None, 0))(a, b, torch.stack([matrix, 2 * matrix]))
    for value, each in zip(losses, (matrix, 2 * matrix), strict=True):
        assert_close(value, oracle([(a, b)], [each]).loss)


def test_vmap_over_pooled_maps():
    x, y = maps((4, 2, 3, 8, 8), (4, 2, 5, 4, 4), requires_grad=False)
    matrices = torch.vmap(matrix_of)(x, y)
    for i, matrix in enumerate(matrices):
        assert_close(matrix, reference.fsp_matrix(x[i].double(), y[i].double()))


def test_vmap_over_no_slices():
    x, y = maps((0, 2, 3, 6), (2, 5, 6), requires_grad=False)
    assert torch.vmap(matrix_of, (0, None))(x, y).shape == (0, 2, 3, 5)
    tensors = [x.expand(0, *x.shape) for x in four_maps(requires_grad=False)]
    losses = torch.vmap(loss_of)(*tensors)
    assert (losses.shape, losses.dtype) == ((0,), torch.float32)


@pytest.mark.parametrize("create_graph", [False, True])
def test_batched_gradients_of_the_loss(create_graph):
    tensors = four_maps()
    expected = oracle_of(*tensors).gradients
    factors = torch.tensor([1.0, -2.0, 0.0])
    gradients = torch.autograd.grad(
        loss_of(*tensors), tensors, factors, is_grads_batched=True, create_graph=create_graph
    )
    for gradient, wanted in zip(gradients, expected, strict=True):
        for slice_, factor in zip(gradient.detach(), factors, strict=True):
            assert_close(slice_, factor.item() * wanted)


def test_gradients_under_a_vmap_of_backward():
    tensors = four_maps()
    expected = oracle_of(*tensors).gradients
    loss = loss_of(*tensors)
    gradients = torch.vmap(lambda v: torch.autograd.grad(loss, tensors, v))(torch.tensor([1.0, 3]))
    for gradient, wanted in zip(gradients, expected, strict=True):
        assert_close(gradient[1], 3 * wanted)


def test_a_vectorised_jacobian_of_the_loss():
    tensors = tuple(four_maps())
    jacobian = torch.autograd.functional.jacobian(loss_of, tensors, vectorize=True)
    oracle_of(*tensors).check(loss_of(*tensors), jacobian)


def test_nested_vmap_of_the_matrix():
    x, y = maps((2, 4, 2, 3, 6), (4, 2, 5, 6), requires_grad=False)
    matrices = torch.vmap(torch.vmap(matrix_of), (0, None))(x, y)
    for i, j in ((0, 0), (1, 3)):
        assert_close(matrices[i, j], reference.fsp_matrix(x[i, j].double(), y[j].double()))


@pytest.mark.parametrize("in_dims", [(0, 0, 0, 0), (0, None, 0, None), (1, 2, -1, 0)], ids=str)
def test_vmap_of_the_loss(in_dims):
    tensors = four_maps(requires_grad=False)
    stacked = [
        t if dim is None else torch.stack([t * (i + 1) for i in range(4)], dim)
        for t, dim in zip(tensors, in_dims, strict=True)
    ]
    losses = torch.vmap(loss_of, in_dims)(*stacked)
    for i, loss in enumerate(losses):
        slices = [t if d is None else t * (i + 1) for t, d in zip(tensors, in_dims, strict=True)]
        assert_close(loss, oracle_of(*slices).loss)


def test_per_sample_gradients_of_the_loss():
    tensors = four_maps(batch=4, requires_grad=False)

    def one_sample(*sample):
        return loss_of(*(x.unsqueeze(0) for x in sample))

    gradients = torch.vmap(torch.func.grad(one_sample, argnums=(0, 1, 2, 3)))(*tensors)
    for i in range(4):
        expected = oracle_of(*(x[i : i + 1] for x in tensors))
        for gradient, wanted in zip(gradients, expected.gradients, strict=True):
            assert_close(gradient[i], wanted[0])


def test_gradient_of_a_vmapped_loss():
    tensors = four_maps(batch=4)
    stacked = [x.unsqueeze(1) for x in tensors]
    total = torch.vmap(loss_of)(*stacked).mean()
    oracle_of(*tensors).check(total, torch.autograd.grad(total, tensors))


def jacrev_twice(function):
    return torch.func.jacrev(torch.func.jacrev(function))


@pytest.mark.parametrize(
    "jacobian", [torch.func.jacrev, jacrev_twice, torch.func.jacfwd, torch.func.hessian]
)
def test_jacobian_and_hessian_of_the_matrix(jacobian):
    x, y = maps((2, 3, 4), (2, 2, 4), dtype=torch.float64, requires_grad=False)
    assert_close(
        jacobian(lambda x: matrix_of(x, y * x[:, :2]))(x),
        jacobian(lambda x: reference.fsp_matrix(x, y * x[:, :2]))(x),
    )


def test_hessian_of_the_alternative_loss():
    a, b, c, d = maps((2, 2, 3), (2, 2, 3), (2, 2, 3), (2, 2, 3), dtype=torch.float64)

    def loss(matrix, x):
        return (matrix(x, b) - matrix(c, d)).square().sum()

    hessian = torch.autograd.functional.hessian(lambda x: loss(matrix_of, x), a)
    expected = torch.autograd.functional.hessian(lambda x: loss(reference.fsp_matrix, x), a)
    assert_close(hessian, expected)


# --- around it ----------------------------------------------------------------------------------


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_recomputes_it(use_reentrant):
    a, b, c, d = tensors = four_maps()

    def block(a, b, c, d):
        return loss_of(a.tanh(), b.tanh(), c, d) + matrix_of(a.tanh(), b).sum()

    loss = checkpoint(block, *tensors, use_reentrant=use_reentrant)
    gradients = torch.autograd.grad(loss, tensors) if not use_reentrant else None
    if use_reentrant:
        loss.backward()
        gradients = [x.grad for x in tensors]
    exact = [x.detach().double().requires_grad_() for x in tensors]
    a, b, c, d = exact
    expected = reference.fsp_loss([(a.tanh(), b.tanh())], [(c, d)])
    expected = expected + reference.fsp_matrix(a.tanh(), b).sum()
    assert_close(loss, expected)
    for gradient, wanted in zip(gradients, torch.autograd.grad(expected, exact), strict=True):
        assert_close(gradient, wanted)


def test_threads_do_not_disturb_one_another():
    work = [four_maps(batch=2 + i % 3, positions=(3 + i % 2, 4)) for i in range(8)]

    def run(tensors):
        loss = loss_of(*tensors)
        return [loss, *torch.autograd.grad(loss, tensors)]

    alone = [run(tensors) for tensors in work]
    together: list = [None] * len(work)
    start = threading.Barrier(len(work))

    def target(i):
        start.wait()
        for _ in range(20):
            together[i] = run(work[i])

    threads = [threading.Thread(target=target, args=(i,)) for i in range(len(work))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for results, expected in zip(together, alone, strict=True):
        assert_bitwise(results, expected)


def test_backward_may_run_in_another_thread():
    tensors = four_maps()
    expected = oracle_of(*tensors)
    loss = loss_of(*tensors)
    thread = threading.Thread(target=loss.backward)
    thread.start()
    thread.join()
    expected.check(loss, [x.grad for x in tensors])


def test_a_profile_names_both():
    a, b, c, d = four_maps()
    with torch.autograd.profiler.profile() as profile:
        (loss_of(a, b, c, d) + matrix_of(a, b).sum()).backward()
    names = {event.key for event in profile.key_averages()}
    for name in ("FSPLoss", "FSPMatrix"):
        assert {f"{name}Function", f"{name}FunctionBackward"} <= names


def test_parameters_are_maps_too():
    a, b, c, d = four_maps()
    parameter = torch.nn.Parameter(a.detach())
    loss_of(parameter, b, c, d).backward()
    assert_close(parameter.grad, oracle_of(a, b, c, d).gradients[0])
