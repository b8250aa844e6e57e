"""``channel_dim``: channels in axis 1 or in the last one, against the definition."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from layouts import LAYOUTS
from tolerances import assert_close, flatten, oracle
from torch import nn
from torch.export import Dim, export
from torch.utils.flop_counter import FlopCounterMode

import fsp_kernels as fsp
from fsp_kernels import checks, reference

TOKENS = {"size": (6,)}
IMAGES = {"size": (3, 4)}


def maps(*channels, batch=3, size=(6,), dtype=torch.float64):
    """Maps ``(B, *size, C)``, as contiguous leaves."""
    return [torch.randn(batch, *size, c, dtype=dtype).requires_grad_() for c in channels]


def four_maps(**options):
    return maps(5, 4, 5, 4, **options)


def loss_of(a, b, c, d, **options):
    return fsp.fsp_loss([(a, b)], [(c, d)], channel_dim=-1, **options)


def first(x):
    """The same map with its channels in axis 1."""
    return x.movedim(-1, 1)


def oracle_of(a, b, c, d):
    return oracle([(first(a), first(b))], [(first(c), first(d))])


def held_to(expected, loss, gradients):
    expected.check(loss, [first(g) for g in gradients])


# --- the definition -----------------------------------------------------------------------------


@st.composite
def calls(draw):
    """Student and teacher with maps ``(B, *spatial, C)``, strided in many ways."""
    torch.manual_seed(draw(st.integers(0, 2**32), label="seed"))
    batch, axes = draw(st.integers(1, 4)), draw(st.integers(1, 3))

    def tensor(channels, size):
        x = torch.randn(batch, channels, *size, dtype=torch.float64)
        layout = LAYOUTS[draw(st.sampled_from(list(LAYOUTS)))]
        return layout(x).movedim(1, -1).detach().requires_grad_()

    sizes = st.lists(st.integers(1, 5), min_size=axes, max_size=axes)
    student, teacher = [], []
    for _ in range(draw(st.integers(1, 2))):
        channels = draw(st.tuples(st.integers(1, 20), st.integers(1, 20)))
        student.append(tuple(tensor(c, draw(sizes)) for c in channels))
        if draw(st.booleans()):
            teacher.append(torch.randn(batch, *channels, dtype=torch.float64).requires_grad_())
        else:
            teacher.append(tuple(tensor(c, draw(sizes)) for c in channels))
    pool, norm = draw(st.sampled_from(["max", "avg"])), draw(st.sampled_from(["mse", "column"]))
    return student, teacher, {"pool": pool, "norm": norm}


@given(calls())
def test_the_loss_of_channels_last_is_that_of_the_moved_maps(call):
    student, teacher, options = call
    loss = fsp.fsp_loss(student, teacher, channel_dim=-1, **options)
    tensors = flatten(student, teacher)
    gradients = torch.autograd.grad(loss, tensors)
    moved = (
        [tuple(map(first, pair)) for pair in student],
        [
            entry if isinstance(entry, torch.Tensor) else tuple(map(first, entry))
            for entry in teacher
        ],
    )
    are_maps = [
        is_map
        for entry in teacher
        for is_map in (True, True, *([False] if isinstance(entry, torch.Tensor) else [True] * 2))
    ]
    back = [first(g) if m else g for g, m in zip(gradients, are_maps, strict=True)]
    oracle(*moved, **options).check(loss, back)


@pytest.mark.parametrize("shape", [TOKENS, IMAGES], ids=["tokens", "images"])
def test_the_matrix_of_channels_last_is_that_of_the_moved_maps(shape):
    x, y = maps(5, 4, **shape)
    matrix = fsp.fsp_matrix(x, y, channel_dim=-1)
    expected = reference.fsp_matrix(first(x), first(y))
    assert_close(matrix, expected.detach())
    found = torch.autograd.grad(matrix.square().sum(), (x, y))
    wanted = torch.autograd.grad(expected.square().sum(), (x, y))
    for leaf, gradient, exact in zip((x, y), found, wanted, strict=True):
        assert_close(gradient, exact)
        assert gradient.stride() == leaf.stride()


def test_the_matrix_of_channels_last_is_twice_differentiable():
    inputs = maps(3, 2, size=(4,))
    assert torch.autograd.gradgradcheck(lambda x, y: fsp.fsp_matrix(x, y, channel_dim=-1), inputs)


@pytest.mark.parametrize("pool", ["max", "avg"])
def test_maps_of_channels_last_are_pooled_over_their_positions(pool):
    (x,), (y,) = maps(5, size=(4, 4)), maps(4, size=(2, 2))
    matrix = fsp.fsp_matrix(x, y, pool=pool, channel_dim=-1)
    assert_close(matrix.detach(), reference.fsp_matrix(first(x), first(y), pool).detach())


@pytest.mark.parametrize("shape", [TOKENS, IMAGES], ids=["tokens", "images"])
def test_gradients_have_the_layout_of_their_maps(shape):
    tensors = [x if i % 2 else first(x).detach() for i, x in enumerate(four_maps(**shape))]
    tensors = [x if i % 2 else x.contiguous().movedim(1, -1) for i, x in enumerate(tensors)]
    loss_of(*(x.requires_grad_() for x in tensors)).backward()
    assert [x.grad.stride() for x in tensors] == [x.stride() for x in tensors]


def test_maps_are_read_where_they_lie():
    a, b, c, d = four_maps()
    tensors, *_ = checks.flatten_pairs([(a, b)], [(c, d)], channel_dim=-1)
    assert [x.data_ptr() for x in tensors] == [x.data_ptr() for x in (a, b, c, d)]
    assert [tuple(x.shape) for x in tensors] == [(3, 5, 6), (3, 4, 6)] * 2


def test_one_is_the_default_of_images():
    student, teacher = [maps(8, 8, size=(3, 4))], [maps(8, 8, size=(3, 4))]
    by_default = fsp.fsp_loss(student, teacher)
    assert torch.equal(fsp.fsp_loss(student, teacher, channel_dim=1), by_default)
    assert not torch.equal(fsp.fsp_loss(student, teacher, channel_dim=-1), by_default)


def test_a_ready_matrix_is_no_map():
    a, b, c, d = four_maps(**IMAGES)
    ready = fsp.fsp_matrix(c, d, channel_dim=-1).detach()
    expected = reference.fsp_loss([(first(a), first(b))], [ready]).detach()
    assert_close(fsp.fsp_loss([(a, b)], [ready], channel_dim=-1).detach(), expected)
    assert_close(fsp.fsp_loss([(first(a), first(b))], [ready]).detach(), expected)


def test_networks_of_images_and_of_tokens_may_be_compared():
    a, b = maps(5, 4, size=(3, 4))
    c, d = maps(5, 4, size=(7,))
    loss = loss_of(a, b, c, d)
    expected = reference.fsp_loss([(first(a), first(b))], [(first(c), first(d))])
    assert_close(loss.detach(), expected.detach())


# --- the module and the plan ----------------------------------------------------------------------


def test_the_module_hands_it_on():
    a, b, c, d = four_maps()
    loss = fsp.FSPLoss(channel_dim=-1)
    assert torch.equal(loss([(a, b)], [(c, d)]), loss_of(a, b, c, d))


def test_the_plan_tells_channels_from_positions():
    a, b, c, d = four_maps()
    (pair,) = fsp.explain([(a, b)], [(c, d)], channel_dim=-1).pairs
    assert (pair.channels, pair.positions) == ((5, 4), 6)
    (pair,) = fsp.explain([(a, a)], [(c, c)], channel_dim=1).pairs
    assert (pair.channels, pair.positions) == ((6, 6), 5)


# --- the compiler and transforms ------------------------------------------------------------------


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("shape", [TOKENS, IMAGES], ids=["tokens", "images"])
def test_a_compiled_call_takes_it(shape, dynamic):
    torch._dynamo.reset()
    tensors = four_maps(**shape)
    compiled = torch.compile(loss_of, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    loss = compiled(*tensors)
    held_to(oracle_of(*tensors), loss, torch.autograd.grad(loss, tensors))


class Tokens(nn.Module):
    def forward(self, a, b, c, d):
        return loss_of(a, b, c, d), fsp.fsp_matrix(a, b, channel_dim=-1)


def test_an_exported_call_takes_it():
    torch._dynamo.reset()
    tensors = [x.detach() for x in four_maps()]
    batch = Dim("batch", min=2, max=64)
    program = export(Tokens(), tuple(tensors), dynamic_shapes=[{0: batch}] * 4)
    others = [x.detach() for x in four_maps(batch=5)]
    loss, matrix = program.module()(*others)
    assert_close(loss, oracle_of(*others).loss)
    assert_close(matrix, reference.fsp_matrix(first(others[0]), first(others[1])))


def test_a_dispatch_mode_sees_the_same():
    tensors = four_maps()
    with FlopCounterMode(display=False):
        loss = loss_of(*tensors)
    held_to(oracle_of(*tensors), loss, torch.autograd.grad(loss, tensors))


def test_gradients_by_torch_func():
    tensors = [x.detach() for x in four_maps()]
    gradients = torch.func.grad(loss_of, argnums=(0, 1, 2, 3))(*tensors)
    held_to(oracle_of(*tensors), oracle_of(*tensors).loss, gradients)


@pytest.mark.parametrize("in_dims", [0, 1, -1])
def test_vmap_maps_an_axis_besides(in_dims):
    slices = [[x.detach() for x in four_maps()] for _ in range(2)]
    stacked = [torch.stack(tensors, in_dims) for tensors in zip(*slices, strict=True)]
    losses = torch.vmap(loss_of, in_dims)(*stacked)
    matrices = torch.vmap(lambda x, y: fsp.fsp_matrix(x, y, channel_dim=-1), in_dims)(*stacked[:2])
    for tensors, loss, matrix in zip(slices, losses, matrices, strict=True):
        assert_close(loss, oracle_of(*tensors).loss)
        assert_close(matrix, reference.fsp_matrix(first(tensors[0]), first(tensors[1])))


def test_a_second_derivative_is_still_an_error():
    a, b, c, d = four_maps()
    (gradient,) = torch.autograd.grad(loss_of(a, b, c, d), a, create_graph=True)
    with pytest.raises(RuntimeError, match="once differentiable"):
        gradient.sum().backward()
