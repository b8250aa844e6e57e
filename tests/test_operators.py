"""``torch.ops.fsp``: what the compiler, export, fake tensors and subclasses see."""

from __future__ import annotations

import subprocess
import sys
from functools import partial

import pytest
import torch
from tolerances import assert_close, oracle
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.export import Dim, export
from torch.fx.experimental import symbolic_shapes
from torch.library import opcheck
from torch.utils.flop_counter import FlopCounterMode

import fsp_kernels as fsp
from fsp_kernels import reference

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@pytest.fixture(autouse=True)
def _nothing_compiled_before():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def maps(*shapes, dtype=torch.float32, requires_grad=True):
    return [torch.randn(*s).to(dtype).requires_grad_(requires_grad) for s in shapes]


def four_maps(batch=3, first=(6, 6), second=(6, 6), **options):
    """Student first and second, teacher first and second."""
    m, n = (batch, 5, *first), (batch, 4, *second)
    return maps(m, n, m, n, **options)


# Channels are in axis 1 here, for maps of three axes too.
matrix_of = partial(fsp.fsp_matrix, channel_dim=1)


def loss_of(a, b, c, d, **options):
    return fsp.fsp_loss([(a, b)], [(c, d)], channel_dim=1, **options)


def assert_same(actual, expected):
    """The same kernels ran, so the same numbers; those of eager calls are held to the reference."""
    for x, y in zip(actual, expected, strict=True):
        assert x.dtype == y.dtype
        assert_close(x.detach(), y.detach().double())


# --- opcheck ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shapes", [((2, 3, 5), (2, 4, 5)), ((1, 1, 1), (1, 1, 1)), ((3, 8, 2), (3, 2, 2))], ids=str
)
def test_matrix_operator_is_well_behaved(shapes, dtype):
    opcheck(torch.ops.fsp.matrix, (*maps(*shapes, dtype=dtype), "torch"))


def test_matrix_operator_of_mixed_dtypes_and_strides_is_well_behaved():
    (x,) = maps((2, 3, 6), dtype=torch.bfloat16)
    y = torch.randn(2, 6, 4).mT.requires_grad_()
    opcheck(torch.ops.fsp.matrix, (x, y, "torch"))
    opcheck(torch.ops.fsp.matrix, (x, x, "torch"))
    opcheck(torch.ops.fsp.matrix, (x.detach(), y, "torch"))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels_last", [False, True])
def test_matrix_backward_operator_is_well_behaved(channels_last, dtype):
    gradient, other = maps((2, 3, 4), (2, 4, 5), dtype=dtype)
    opcheck(torch.ops.fsp.matrix_backward, (gradient, other, channels_last, "torch"))


def loss_arguments(tensors, *, ready=(False,), needs=None, pool="max", norm="frobenius"):
    needs = [x.requires_grad for x in tensors] if needs is None else needs
    return tensors, list(ready), needs, [1.5] * len(ready), pool, norm, "torch"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_loss_operator_is_well_behaved_in_every_dtype(dtype):
    opcheck(torch.ops.fsp.loss, loss_arguments(four_maps(dtype=dtype)))


@pytest.mark.parametrize("pool", ["max", "avg"])
@pytest.mark.parametrize("norm", ["frobenius", "mse", "column"])
def test_loss_operator_is_well_behaved_with_every_option(norm, pool):
    tensors = four_maps(first=(4, 6), second=(5, 3))
    opcheck(torch.ops.fsp.loss, loss_arguments(tensors, pool=pool, norm=norm))


@pytest.mark.parametrize(
    "needs",
    [(True, False, False, False), (False, True, True, False), (False, False, False, False)],
    ids=str,
)
@pytest.mark.parametrize("size", [(1, 1), (6, 6)], ids=["gram", "matrix"])
def test_loss_operator_is_well_behaved_whatever_requires_gradients(size, needs):
    tensors = four_maps(first=size, second=size)
    for x, wanted in zip(tensors, needs, strict=True):
        x.requires_grad_(wanted)
    opcheck(torch.ops.fsp.loss, loss_arguments(tensors, needs=list(needs)))


def test_loss_operator_is_well_behaved_with_a_ready_matrix_and_several_pairs():
    a, b, c, d = four_maps()
    matrix, x, y = maps((3, 5, 4), (3, 5, 7), (3, 4, 7))
    arguments = loss_arguments([a, b, matrix, x, y, x.detach(), y.detach()], ready=(True, False))
    opcheck(torch.ops.fsp.loss, arguments)
    opcheck(torch.ops.fsp.loss, loss_arguments([a.detach(), b, c, d.detach()]))


def test_loss_operator_is_well_behaved_with_mixed_dtypes_and_strides():
    a, b, c, d = four_maps()
    a = a.detach().to(memory_format=torch.channels_last).requires_grad_()
    b = b.detach().half().requires_grad_()
    d = d.detach()[:, :, ::2, ::2].requires_grad_()
    c = c.detach().bfloat16()[:, :, :3].requires_grad_()
    opcheck(torch.ops.fsp.loss, loss_arguments([a, b, c, d]))


def test_loss_operator_is_well_behaved_with_weights_that_change():
    *arguments, pool, norm, backend = loss_arguments(four_maps())
    arguments[3] = []
    opcheck(torch.ops.fsp.loss, (*arguments, pool, norm, backend, torch.tensor([1.5])))


# --- fake tensors -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_fake_tensors_tell_shape_dtype_and_layout(dtype):
    with FakeTensorMode():
        a, b, c, d = four_maps(dtype=dtype)
        loss = loss_of(a, b, c, d)
        gradients = torch.autograd.grad(loss, (a, b, c, d))
        matrix = matrix_of(a, b.float())
    assert loss.shape == ()
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert [g.shape for g in gradients] == [x.shape for x in (a, b, c, d)]
    assert {g.dtype for g in gradients} == {dtype}
    assert matrix.shape == (3, 5, 4)
    assert matrix.dtype == torch.promote_types(dtype, torch.float32)


def test_fake_gradients_have_the_layout_of_real_ones():
    with FakeTensorMode():
        a, b, c, d = four_maps()
        a = a.detach().to(memory_format=torch.channels_last).requires_grad_()
        (of_loss,) = torch.autograd.grad(loss_of(a, b, c, d), a)
        (of_matrix,) = torch.autograd.grad(matrix_of(a, b).sum(), a)
    assert of_loss.stride() == of_matrix.stride() == a.stride()


# --- torch.compile ------------------------------------------------------------------------------

LOSS_CALLS = {
    "frobenius": ({}, {}),
    "mse": ({"norm": "mse"}, {}),
    "column": ({"norm": "column"}, {}),
    "max pooled": ({"pool": "max"}, {"second": (3, 3)}),
    "avg pooled": ({"pool": "avg"}, {"first": (5, 5), "second": (3, 7)}),
    "gram": ({}, {"first": (1, 1), "second": (1, 1)}),
    "half precision": ({}, {"dtype": torch.float16}),
    "tokens": ({}, {"first": (6,), "second": (6,)}),
    "weighted": ({"weights": [0.5]}, {}),
}


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize(("options", "shapes"), LOSS_CALLS.values(), ids=LOSS_CALLS)
def test_the_compiled_loss_equals_the_eager_one(options, shapes, dynamic):
    tensors = four_maps(**shapes)

    def network(*tensors):
        return 2 * loss_of(*(x * 1.0 for x in tensors), **options)

    compiled = torch.compile(network, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    loss, expected = compiled(*tensors), network(*tensors)
    gradients = torch.autograd.grad(loss, tensors)
    assert_same((loss, *gradients), (expected, *torch.autograd.grad(expected, tensors)))


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_a_compiled_call_takes_one_ready_matrix_for_all_samples(dynamic):
    a, b, matrix = maps((3, 5, 6, 6), (3, 4, 6, 6), (1, 5, 4))

    def loss(a, b, matrix):
        return fsp.fsp_loss([(a, b)], [matrix])

    compiled = torch.compile(loss, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    value = compiled(a, b, matrix)
    found = torch.autograd.grad(value, (a, b, matrix))
    oracle([(a, b)], [matrix]).check(value, found)
    # And a batch of one afterwards, which needs no view.
    a, b = a.detach()[:1].requires_grad_(), b.detach()[:1].requires_grad_()
    value = compiled(a, b, matrix)
    found = torch.autograd.grad(value, (a, b, matrix))
    oracle([(a, b)], [matrix]).check(value, found)


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("second", [(6, 6), (3, 3), (7, 4)], ids=str)
def test_the_compiled_matrix_equals_the_eager_one(second, dynamic):
    x, y = maps((3, 5, 6, 6), (3, 4, *second))
    compiled = torch.compile(matrix_of, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    matrix, expected = compiled(x, y), matrix_of(x, y)
    incoming = torch.randn_like(expected)
    gradients = torch.autograd.grad(matrix, (x, y), incoming)
    assert_same((matrix, *gradients), (expected, *torch.autograd.grad(expected, (x, y), incoming)))


def test_the_compiled_loss_leaves_out_gradients_nobody_requires():
    a, b, c, d = four_maps()
    c, d = c.detach(), d.detach()
    compiled = torch.compile(loss_of, fullgraph=True, backend="aot_eager")
    loss = compiled(a, b, c, d)
    oracle([(a, b)], [(c, d)]).check(loss, [*torch.autograd.grad(loss, (a, b)), None, None])
    with torch.no_grad():
        value = compiled(a, b, c, d)
    assert not value.requires_grad
    assert_same([value], [loss])


def test_the_compiled_loss_takes_ready_matrices():
    a, b, *_ = four_maps()
    (matrix,) = maps((3, 5, 4))
    compiled = torch.compile(fsp.fsp_loss, fullgraph=True, backend="aot_eager")
    loss = compiled([(a, b)], [matrix])
    gradients = torch.autograd.grad(loss, (a, b, matrix))
    oracle([(a, b)], [matrix]).check(loss, gradients)


@pytest.mark.parametrize("second", [(6, 6), (3, 3)], ids=["plain", "pooled"])
def test_a_dynamic_batch_compiles_once(second):
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(loss_of, fullgraph=True, dynamic=True, backend=counter)
    for batch in (2, 3, 5, 8, 13):
        a, b, c, d = tensors = four_maps(batch, second=second)
        loss = compiled(*tensors)
        oracle([(a, b)], [(c, d)]).check(loss, torch.autograd.grad(loss, tensors))
    assert counter.frame_count == 1


def test_a_dynamic_batch_of_matrices_compiles_once():
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(matrix_of, fullgraph=True, dynamic=True, backend=counter)
    for batch in (2, 3, 5, 8, 13):
        x, y = maps((batch, 5, 6, 6), (batch, 4, 6, 6))
        assert_close(compiled(x, y).detach(), reference.fsp_matrix(x.double(), y.double()).detach())
    assert counter.frame_count == 1


KNOWS_CHANGING_NUMBERS = hasattr(symbolic_shapes, "has_static_value")  # since PyTorch 2.8
CHANGING_WEIGHTS = [  # how they come, what compiles, dynamic, compilations at most
    pytest.param(lambda w: [w], "aot_eager", None, 2, id="numbers"),
    pytest.param(
        lambda w: [w], "aot_eager", True, 1 if KNOWS_CHANGING_NUMBERS else 2, id="numbers-dynamic"
    ),
    pytest.param(lambda w: [w], "inductor", None, 2, id="numbers-inductor", marks=pytest.mark.slow),
    pytest.param(lambda w: torch.tensor([w]), "aot_eager", None, 1, id="tensor"),
]


@pytest.mark.parametrize(("make", "backend", "dynamic", "most"), CHANGING_WEIGHTS)
def test_weights_of_a_compiled_call_may_change(make, backend, dynamic, most):
    a, b, c, d = four_maps()
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(loss_of, fullgraph=True, dynamic=dynamic, backend=counter)
    for weight in (1.0, 0.5, 2.0, 0.25, 0.0):
        loss = compiled(a, b, c, d, weights=make(weight))
        gradients = torch.autograd.grad(loss, (a, b, c, d))
        oracle([(a, b)], [(c, d)], [weight]).check(loss, gradients)
    assert counter.frame_count <= most


def test_a_compiled_tensor_of_weights_may_require_a_gradient():
    a, b, c, d = four_maps()
    weights = torch.tensor([0.5], requires_grad=True)
    compiled = torch.compile(loss_of, fullgraph=True, backend="aot_eager")
    loss, expected = (f(a, b, c, d, weights=weights) for f in (compiled, loss_of))
    assert_same(
        torch.autograd.grad(loss, (a, weights)), torch.autograd.grad(expected, (a, weights))
    )


@pytest.mark.parametrize("make", [lambda w: [w], lambda w: torch.tensor([w])], ids=["list", "1-D"])
def test_a_bad_weight_of_a_compiled_call_is_named_when_it_comes(make):
    tensors = four_maps()
    compiled = torch.compile(loss_of, fullgraph=True, dynamic=True, backend="aot_eager")
    for weight in (0.5, 0.25):
        compiled(*tensors, weights=make(weight))
    with pytest.raises(ValueError, match=r"weights\[0\]: got -1.0, expected a finite number >= 0"):
        compiled(*tensors, weights=make(-1.0))


def test_the_compiled_matrix_may_be_inside_a_larger_gradient():
    x, y = maps((3, 5, 6, 6), (3, 4, 6, 6))

    def network(x, y):
        return (matrix_of(x.relu(), y) - matrix_of(x, y.tanh())).square().sum()

    compiled = torch.compile(network, fullgraph=True, backend="aot_eager")
    loss, expected = compiled(x, y), network(x, y)
    assert_same(
        (loss, *torch.autograd.grad(loss, (x, y))),
        (expected, *torch.autograd.grad(expected, (x, y))),
    )


class Distillation(nn.Module):
    """Two small networks and the loss between them."""

    def __init__(self):
        super().__init__()
        self.student, self.teacher = self._network(), self._network().requires_grad_(False)
        self.criterion = fsp.FSPLoss(weights=[1.0, 0.5])

    @staticmethod
    def _network():
        sizes = ((3, 6, 1), (6, 8, 2), (8, 8, 1))
        return nn.ModuleList(nn.Conv2d(i, o, 3, stride=s, padding=1) for i, o, s in sizes)

    @staticmethod
    def _features(network, x):
        features = []
        for layer in network:
            x = layer(x).relu()
            features.append(x)
        return fsp.pairs_of(features)

    def forward(self, x):
        with torch.no_grad():
            teacher = self._features(self.teacher, x)
        return self.criterion(self._features(self.student, x), teacher)


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_a_model_with_the_loss_inside_compiles_whole(backend, dynamic):
    model = Distillation()
    x = torch.randn(4, 3, 8, 8)
    expected = model(x)
    gradients = torch.autograd.grad(expected, list(model.student.parameters()))
    compiled = torch.compile(model, fullgraph=True, dynamic=dynamic, backend=backend)
    loss = compiled(x)
    loss.backward()
    assert_same((loss, *(p.grad for p in model.student.parameters())), (expected, *gradients))
    assert all(p.grad is None for p in model.teacher.parameters())


def every_gradient(function):
    return torch.func.grad(function, argnums=(0, 1, 2, 3))


LOSS_TRANSFORMS = {
    "grad": every_gradient,
    "jacrev": lambda f: torch.func.jacrev(f, argnums=(0, 3)),
    "vmap": lambda f: lambda *x: torch.vmap(f)(*(torch.stack((t, 2 * t)) for t in x)),
    "vmap of grad": lambda f: lambda *x: torch.vmap(every_gradient(f))(*(t[:, None] for t in x)),
}


@pytest.mark.parametrize("transform", LOSS_TRANSFORMS.values(), ids=LOSS_TRANSFORMS)
def test_a_compiled_transform_of_the_loss_equals_the_eager_one(transform):
    tensors = four_maps(requires_grad=False)
    compiled = torch.compile(transform(loss_of), fullgraph=True, backend="aot_eager")
    found, expected = compiled(*tensors), transform(loss_of)(*tensors)
    assert_same(*((x,) if isinstance(x, torch.Tensor) else x for x in (found, expected)))


MATRIX_TRANSFORMS = {
    "grad": lambda f: torch.func.grad(lambda x, y: f(x, y).square().sum()),
    "hessian": lambda f: torch.func.hessian(lambda x, y: f(x, y).square().sum()),
    "jvp": lambda f: lambda x, y: torch.func.jvp(f, (x, y), (y[:, :3], x))[1],
    "vmap": lambda f: lambda x, y: torch.vmap(f, (0, None))(torch.stack((x, 2 * x)), y),
}


@pytest.mark.parametrize("transform", MATRIX_TRANSFORMS.values(), ids=MATRIX_TRANSFORMS)
def test_a_compiled_transform_of_the_matrix_is_that_of_the_definition(transform):
    x, y = maps((2, 3, 4), (2, 3, 4), dtype=torch.float64, requires_grad=False)
    compiled = torch.compile(transform(matrix_of), fullgraph=True, backend="aot_eager")
    assert_close(compiled(x, y), transform(reference.fsp_matrix)(x, y))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_call_has_the_tangents_of_its_dual_tensors(backend):
    x, y = maps((2, 3, 4), (2, 3, 4), dtype=torch.float64, requires_grad=False)

    def tangent(matrix):
        with forward_ad.dual_level():
            result = matrix(forward_ad.make_dual(x, y), y)
            return forward_ad.unpack_dual(result).tangent

    compiled = torch.compile(tangent, backend=backend)
    assert_close(compiled(matrix_of), tangent(reference.fsp_matrix))


COMPILED_ERRORS = {
    "jvp": (lambda *x: torch.func.jvp(loss_of, x, x), "no forward-mode derivative"),
    "grad of grad": (
        torch.func.grad(lambda *x: torch.func.grad(loss_of)(*x).sum()),
        "once differentiable",
    ),
}


@pytest.mark.parametrize(("derivative", "message"), COMPILED_ERRORS.values(), ids=COMPILED_ERRORS)
def test_what_the_loss_has_no_derivative_for_is_an_error_of_compiled_calls_too(derivative, message):
    with pytest.raises(Exception, match=message):
        torch.compile(derivative, fullgraph=True, backend="aot_eager")(
            *four_maps(requires_grad=False)
        )


def test_a_second_derivative_of_the_operator_names_the_alternative():
    a, b, c, d = four_maps()
    arguments = loss_arguments([a, b, c, d])
    loss = torch.ops.fsp.loss(*arguments)[0]
    (gradient,) = torch.autograd.grad(loss, a, create_graph=True)
    with pytest.raises(RuntimeError, match=r"once differentiable.*fsp_matrix"):
        gradient.sum().backward()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda a, b: fsp.fsp_loss([(a, b)], [(b, a)]), "project the student's map"),
        (lambda a, b: fsp.fsp_loss([(a, b)], [(a, b)], norm="l3"), "norm: got 'l3'"),
        (lambda a, b: fsp.fsp_loss([(a, b)], [(a, b)], weights=[-1]), r"weights\[0\]: got -1"),
        (lambda a, b: matrix_of(a, b[:1]), "second: has batch size 1, expected 3"),
    ],
    ids=["channels", "norm", "weights", "batch"],
)
def test_errors_of_compiled_calls_are_the_clear_ones(call, message):
    a, b, *_ = four_maps()
    with pytest.raises(ValueError, match=message):
        torch.compile(call, backend="aot_eager")(a, b)
    # With no way back to eager it is the compiler that complains, and quotes. For weights,
    # torch 2.8 names the kind of error alone.
    torch._dynamo.reset()
    unquoted = torch.__version__.startswith("2.8.") and "weights" in message
    with pytest.raises(Exception, match="ValueError" if unquoted else message):
        torch.compile(call, fullgraph=True, backend="aot_eager")(a, b)


# --- torch.export -------------------------------------------------------------------------------


class Loss(nn.Module):
    def forward(self, a, b, c, d):
        return loss_of(a, b, c, d, norm="mse")


class Matrix(nn.Module):
    def forward(self, first, second):
        return matrix_of(first, second)


@pytest.mark.parametrize("strict", [False, True], ids=["non-strict", "strict"])
@pytest.mark.parametrize(("module", "count"), [(Loss(), 4), (Matrix(), 2)], ids=["loss", "matrix"])
@pytest.mark.parametrize("second", [(6, 6), (3, 3)], ids=["plain", "pooled"])
def test_an_exported_program_serves_any_batch(module, count, second, strict):
    example = four_maps(4, second=second, requires_grad=False)[:count]
    batch = Dim("batch", min=2, max=64)
    program = export(
        module, tuple(example), dynamic_shapes=tuple({0: batch} for _ in example), strict=strict
    )
    operator = "loss" if count == 4 else "matrix"
    assert f"torch.ops.fsp.{operator}" in program.graph_module.code
    for size in (2, 9):
        arguments = four_maps(size, second=second, requires_grad=False)[:count]
        assert_same([program.module()(*arguments)], [module(*arguments)])


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(("module", "count"), [(Loss(), 4), (Matrix(), 2)], ids=["loss", "matrix"])
def test_a_trace_by_torchscript_is_refused_and_names_export(module, count):
    with pytest.raises(RuntimeError, match=r"torch\.jit\.trace.*use torch\.export\.export"):
        torch.jit.trace(module, tuple(four_maps(requires_grad=False)[:count]))


# --- subclasses and modes -----------------------------------------------------------------------


class Tagged(torch.Tensor):
    """A tensor subclass that changes nothing."""


def test_a_tensor_subclass_is_taken_for_a_tensor():
    tensors = [x.detach().as_subclass(Tagged).requires_grad_() for x in four_maps()]
    plain = [x.as_subclass(torch.Tensor).detach() for x in tensors]
    loss = loss_of(*tensors)
    gradients = torch.autograd.grad(loss, tensors)
    a, b, c, d = plain
    expected = oracle([(a, b)], [(c, d)])
    expected.check(loss.as_subclass(torch.Tensor), [g.as_subclass(torch.Tensor) for g in gradients])
    assert isinstance(loss, Tagged)
    matrix = matrix_of(tensors[0], tensors[1])
    assert isinstance(matrix, Tagged)
    assert_same([matrix.as_subclass(torch.Tensor)], [matrix_of(a, b)])


def test_maps_of_a_subclass_may_change_after_the_call():
    a, b, c, d = (x.detach().as_subclass(Tagged) for x in four_maps())
    a.requires_grad_()
    doubled = 2 * a
    wanted = 2 * oracle([(doubled, b)], [(c, d)]).gradients[0].as_subclass(torch.Tensor)
    loss = loss_of(doubled, b, c, d)
    doubled.zero_()
    (gradient,) = torch.autograd.grad(loss, a)
    assert_close(gradient.as_subclass(torch.Tensor), wanted)


class Recorder(torch.utils._python_dispatch.TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.operators = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.operators.append(function.name())
        return function(*args, **(kwargs or {}))


def test_a_dispatch_mode_sees_operators():
    a, b, c, d = four_maps(requires_grad=False)
    with Recorder() as recorder:
        loss, matrix = loss_of(a, b, c, d), matrix_of(a, b)
    assert {"fsp::loss", "fsp::matrix"} <= set(recorder.operators)
    assert_same([loss, matrix], [loss_of(a, b, c, d), matrix_of(a, b)])


def test_a_dispatch_mode_does_not_hide_forward_mode():
    a, b, c, d = four_maps(requires_grad=False)

    def derivative(function, *tensors):
        with forward_ad.dual_level():
            result = function(*(forward_ad.make_dual(x, x) for x in tensors))
            return forward_ad.unpack_dual(result).tangent

    with Recorder() as recorder:
        tangent = derivative(matrix_of, a, b)
        with pytest.raises(RuntimeError, match="fsp_loss has no forward-mode derivative"):
            derivative(loss_of, a, b, c, d)
    assert recorder.operators.count("fsp::matrix") == 3
    assert_same([tangent], [derivative(matrix_of, a, b)])


def test_a_dispatch_mode_sees_the_operators_of_a_transform():
    tensors = four_maps(requires_grad=False)
    with Recorder() as recorder:
        gradients = every_gradient(loss_of)(*tensors)
    assert recorder.operators.count("fsp::loss") == 1
    assert_same(gradients, every_gradient(loss_of)(*tensors))


# --- tools that look at operators ---------------------------------------------------------------


def counted(function):
    with FlopCounterMode(display=False) as counter:
        function()
    return {packet.__name__: flops for packet, flops in counter.get_flop_counts()["Global"].items()}


@pytest.mark.parametrize("size", [(1, 1), (6, 6)], ids=["gram", "matrix"])
def test_flops_of_the_loss_are_those_of_its_plan(size):
    a, b, c, d = four_maps(first=size, second=size)
    plan = fsp.explain([(a, b)], [(c, d)])
    assert counted(lambda: loss_of(a, b, c, d).backward())["loss"] == plan.flops > 0


def test_flops_of_the_matrix_are_those_of_its_products():
    x, y = maps((3, 5, 6, 6), (3, 4, 6, 6))
    product = 2 * 3 * 5 * 4 * 36
    flops = counted(lambda: fsp.fsp_matrix(x, y).sum().backward())
    assert (flops["matrix"], flops["matrix_backward"]) == (product, 2 * product)


def test_meta_tensors_tell_shapes():
    a, b, c, d = (x.detach().to("meta").requires_grad_() for x in four_maps())
    gradients = torch.autograd.grad(loss_of(a, b, c, d), (a, b, c, d))
    assert [g.shape for g in gradients] == [x.shape for x in (a, b, c, d)]
    assert fsp.fsp_matrix(a, b).shape == (3, 5, 4)


COMPILED = """
import torch, fsp_kernels as fsp
maps = [torch.rand(2, c, 5, 5, requires_grad=c < 5) for c in (3, 4, 3, 4)]
def loss(a, b, c, d):
    return fsp.fsp_loss([(a, b)], [(c, d)])
torch.compile(loss, fullgraph=True, backend="eager")(*maps).backward()
"""


def test_the_compiler_has_nothing_to_warn_of():
    # In a process of its own, since it warns of a thing once.
    warnings_are_errors = ("-W", "error::UserWarning")
    subprocess.run([sys.executable, *warnings_are_errors, "-c", COMPILED], check=True)
