"""Pairs of a map with itself: the same numbers for half of the work."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from layouts import LAYOUTS
from products import Products
from tolerances import (
    RESIDUAL_EPS,
    TOLERANCES,
    assert_close,
    flatten,
    oracle,
    residual_terms,
    row_of,
)
from torch.autograd import gradcheck
from torch.library import opcheck
from torch.utils.flop_counter import FlopCounterMode

import fsp_kernels as fsp
import fsp_kernels.plan as planning
from benchmarks.memory import profiled_peak
from fsp_kernels import reference
from fsp_kernels.backends.torch_backend import TorchBackend

DTYPES = tuple(TOLERANCES)
NORMS = ("frobenius", "mse", "column")
TEACHERS = ("maps", "maps of another size", "matrices", "a matrix for all")
MATRIX, GRAM = (3, 5, 4, 3), (3, 40, 2, 1)  # shapes that are evaluated in these forms


def random(*shape, dtype=torch.float32, layout="contiguous"):
    return LAYOUTS[layout](torch.randn(shape, dtype=torch.float64).to(dtype)).requires_grad_()


def entry_of(teacher, shape, **options):
    """A teacher's entry for a student's map of some shape."""
    batch, channels, *size = shape
    if teacher == "matrices":
        return random(batch, channels, channels, **options)
    if teacher == "a matrix for all":
        return random(1, channels, channels, **options)
    size = size if teacher == "maps" else [x + 2 for x in size]
    return (random(batch, channels, *size, **options),) * 2


def call_of(teacher, shape=MATRIX, **options):
    x = random(*shape, **options)
    return [(x, x)], [entry_of(teacher, shape, **options)]


def variables(student, teacher):
    """Every tensor that wants a gradient, once."""
    found = {id(x): x for x in flatten(student, teacher)}
    return [x for x in found.values() if x.requires_grad]


def is_symmetric(student, teacher, **options):
    return [p.symmetric for p in fsp.explain(student, teacher, channel_dim=1, **options).pairs]


def check(student, teacher, weights=None, **options):
    """Hold the loss and all gradients to the definition; that of a map is a sum over its places."""
    loss = fsp.fsp_loss(student, teacher, weights=weights, channel_dim=1, **options)
    tensors = variables(student, teacher)
    gradients = torch.autograd.grad(loss, tensors)
    entries = [
        x.expand(len(pair[0]), -1, -1) if isinstance(x, torch.Tensor) else x
        for pair, x in zip(student, teacher, strict=True)
    ]
    exact = oracle(student, entries, weights, **options)
    row = row_of(fsp.explain(student, teacher, channel_dim=1, **options))
    assert_close(loss, exact.loss, exact.loss_scale, row)
    places = [id(x) for x in flatten(student, teacher)]
    for x, gradient in zip(tensors, gradients, strict=True):
        mine = [i for i, place in enumerate(places) if place == id(x)]
        expected = sum(exact.gradients[i] for i in mine)
        scale = sum(exact.gradient_scales[i] for i in mine)
        if expected.shape != x.shape:  # a matrix for all samples
            expected, scale = expected.sum(0, keepdim=True), scale * len(expected)
        assert gradient.dtype == x.dtype
        assert_close(gradient, expected, scale, row)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("teacher", TEACHERS)
@pytest.mark.parametrize("shape", [MATRIX, GRAM, (2, 4, 6), (2, 3, 2, 3, 2)], ids=str)
def test_loss_and_gradients_are_those_of_the_definition(shape, teacher, norm, dtype):
    student, entries = call_of(teacher, shape, dtype=dtype)
    assert is_symmetric(student, entries, norm=norm) == [True]
    check(student, entries, norm=norm)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [MATRIX, GRAM], ids=["matrix", "gram"])
def test_maps_may_lie_in_memory_in_any_way(shape, layout):
    student, teacher = call_of("maps", shape, layout=layout)
    check(student, teacher)


@pytest.mark.parametrize("wanted", ["student", "teacher"])
@pytest.mark.parametrize("teacher", TEACHERS)
@pytest.mark.parametrize("shape", [MATRIX, GRAM], ids=["matrix", "gram"])
def test_one_network_may_want_gradients_alone(shape, teacher, wanted):
    student, entries = call_of(teacher, shape)
    first, last = student[0][0], flatten(student, entries)[-1]
    (first if wanted == "teacher" else last).requires_grad_(False)
    check(student, entries)


@given(
    shape=st.tuples(*[st.integers(1, 5)] * 4),
    layouts=st.tuples(*[st.sampled_from(sorted(LAYOUTS))] * 2),
    dtypes=st.tuples(*[st.sampled_from(DTYPES)] * 2),
    teacher=st.sampled_from(TEACHERS[:2]),
    norm=st.sampled_from(NORMS),
)
def test_any_maps_give_the_definition(shape, layouts, dtypes, teacher, norm):
    size = [x + (teacher == TEACHERS[1]) for x in shape[2:]]
    a = random(*shape, dtype=dtypes[0], layout=layouts[0])
    c = random(*shape[:2], *size, dtype=dtypes[1], layout=layouts[1])
    check([(a, a)], [(c, c)], norm=norm)


def test_pairs_of_both_kinds_may_be_mixed():
    a, b, c, d = (random(3, 5, 4, 4) for _ in range(4))
    matrix = random(3, 5, 5)
    student, teacher = [(a, a), (a, b), (b, b)], [(c, c), (c, d), matrix]
    assert is_symmetric(student, teacher) == [True, False, True]
    check(student, teacher, weights=[0.5, 2.0, 1.0])


@pytest.mark.parametrize("shape", [MATRIX, GRAM], ids=["matrix", "gram"])
def test_channels_may_come_last(shape):
    a, c = (random(*shape).detach().movedim(1, -1).contiguous() for _ in range(2))
    a.requires_grad_()
    student, teacher = [(a, a)], [(c, c)]
    assert fsp.explain(student, teacher, channel_dim=-1).pairs[0].symmetric
    (found,) = torch.autograd.grad(fsp.fsp_loss(student, teacher, channel_dim=-1), a)
    first, other = (x.detach().movedim(-1, 1).requires_grad_() for x in (a, c))
    (expected,) = torch.autograd.grad(fsp.fsp_loss([(first, first)], [(other, other)]), first)
    torch.testing.assert_close(found, expected.movedim(1, -1))


# --- accuracy -----------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(4, 64, 9, 9), (4, 256, 3, 3)], ids=["matrix", "gram"])
def test_the_gradient_survives_convergence(shape):
    c = random(*shape).detach()
    a = (c + 1e-5 * torch.randn_like(c)).requires_grad_()
    exact = [x.detach().double().requires_grad_() for x in (a, c)]
    loss = reference.fsp_loss([(exact[0],) * 2], [(exact[1],) * 2])
    (expected,) = torch.autograd.grad(loss, exact[0])
    (found,) = torch.autograd.grad(fsp.fsp_loss([(a, a)], [(c, c)]), a)
    assert (found - expected).norm() <= 1e-6 * expected.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(4, 16, 9, 9), (4, 96, 3, 3)], ids=["matrix", "gram"])
def test_the_error_of_a_residual_has_its_bound(shape, dtype):
    c = random(*shape, dtype=dtype).detach()
    a = c.flip(-1)  # far apart, with equal matrices
    error = RESIDUAL_EPS[dtype][0] * residual_terms((a, a), (c, c))
    if dtype == torch.float64 and shape[1] == 96:
        error = error.square().mean() / RESIDUAL_EPS[dtype][0]
    else:
        error = error.square().mean()
    assert 0 <= fsp.fsp_loss([(a, a)], [(c, c)]) <= error


@pytest.mark.parametrize("shape", [MATRIX, GRAM], ids=["matrix", "gram"])
@pytest.mark.parametrize("ready", [False, True])
def test_equal_maps_have_no_loss_and_no_gradient(shape, ready):
    a = random(*shape)
    c = a.detach().clone()
    loss = fsp.fsp_loss([(a, a)], [fsp.fsp_matrix(c, c) if ready else (c, c)])
    assert loss == 0
    assert not torch.autograd.grad(loss, a)[0].any()


# --- what is recognised, and what it saves --------------------------------------------------------


def test_only_the_same_tensor_is_recognised():
    a, c = random(*MATRIX), random(*MATRIX)
    matrix = random(3, 5, 5)
    assert is_symmetric([(a, a)], [(c, c)]) == [True]
    assert is_symmetric([(a, a)], [matrix]) == [True]
    assert is_symmetric([(a, a.view_as(a))], [(c, c)]) == [False]
    assert is_symmetric([(a, a)], [(c, c.clone())]) == [False]
    assert is_symmetric([(a, c)], [matrix]) == [False]


@pytest.mark.parametrize("teacher", TEACHERS)
@pytest.mark.parametrize("shape", [MATRIX, GRAM], ids=["matrix", "gram"])
def test_a_copy_of_the_map_gives_the_same(shape, teacher):
    student, entries = call_of(teacher, shape)
    (x, _), entry = student[0], entries[0]
    loss = fsp.fsp_loss(student, entries)
    other = x.clone(), entry if isinstance(entry, torch.Tensor) else (entry[0], entry[0].clone())
    ordinary = fsp.fsp_loss([(x, other[0])], [other[1]])
    torch.testing.assert_close(loss, ordinary)
    torch.testing.assert_close(
        torch.autograd.grad(loss, x), torch.autograd.grad(ordinary, x), rtol=1e-5, atol=1e-6
    )


def products_of(student, teacher, norm="frobenius"):
    """What the backend does by the plan, and the plan."""
    plan = fsp.explain(student, teacher, norm=norm, channel_dim=1, backend="torch")
    maps = [x.detach() for x in flatten(student, teacher)]
    with torch.no_grad(), Products() as products:
        TorchBackend().loss(maps, plan, (1.0,) * len(plan.pairs))
    return products, plan


@pytest.mark.parametrize(
    ("shape", "teacher", "norm", "products"),
    [
        (MATRIX, "maps", "frobenius", 1 + 2),
        (MATRIX, "maps", "column", 1 + 2),
        (MATRIX, "maps of another size", "mse", 2 + 2),
        (MATRIX, "matrices", "frobenius", 1 + 1),
        (GRAM, "maps", "frobenius", 3 + 2 * 2),
    ],
)
def test_there_is_one_product_for_each_gradient(shape, teacher, norm, products):
    student, entries = call_of(teacher, shape)
    assert products_of(student, entries, norm)[0].count == products
    for x in variables(student, entries):
        x.requires_grad_(False)
    residuals = {"maps": 1, "maps of another size": 2, "matrices": 1}[teacher]
    expected = 3 if shape == GRAM else residuals
    assert products_of(student, entries, norm)[0].count == expected


@pytest.mark.parametrize("shape", [MATRIX, GRAM], ids=["matrix", "gram"])
def test_the_flops_are_halved(shape):
    student, teacher = call_of("maps", shape)
    plan = fsp.explain(student, teacher)
    (a, _), (c, _) = student[0], teacher[0]
    other = fsp.explain([(a, a.view_as(a))], [(c, c.view_as(c))])
    assert plan.flops == other.flops / 2
    assert plan.bytes_moved == other.bytes_moved / 2
    assert plan.gradient_bytes == other.gradient_bytes / 2
    assert plan.pairs[0].form == other.pairs[0].form == ("gram" if shape == GRAM else "matrix")
    specs = [tuple(planning.MapSpec.of(x) for x in pair) for pair in (student[0], teacher[0])]
    assert planning.fewest_flops(*specs, symmetric=True) == plan.flops


def test_the_plan_tells():
    a, b, c = (random(*MATRIX) for _ in range(3))
    lines = str(fsp.explain([(a, a), (a, b)], [(c, c), (c, c)])).splitlines()
    assert "  symmetric, difference, matrix form, one pass  " in lines[2]
    assert "symmetric" not in lines[3]


def peak_of(student, teacher, norm="frobenius"):
    """The bytes that the backend allocates at most, and the plan."""
    plan = fsp.explain(student, teacher, norm=norm, backend="torch")
    maps, results = [x.detach() for x in flatten(student, teacher)], []
    with torch.no_grad():
        peak = profiled_peak(lambda: results.append(TorchBackend().loss(maps, plan, (1.0,))))
    return peak, plan


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("wanted", ["nothing", "the student's", "both"])
@pytest.mark.parametrize(
    ("shape", "teacher", "norm"),
    [
        ((4, 600, 7, 7), "maps", "frobenius"),
        ((3, 300, 3, 3), "maps", "frobenius"),
        ((4, 64, 30, 30), "maps", "frobenius"),
        ((4, 64, 3, 3), "maps", "column"),
        ((4, 64, 30, 30), "maps of another size", "column"),
        ((4, 64, 30, 30), "matrices", "mse"),
    ],
)
def test_as_much_memory_is_held_as_the_plan_says(shape, teacher, norm, wanted, dtype):
    student, entries = call_of(teacher, shape, dtype=dtype)
    for x in flatten(student, entries):
        mine = x is student[0][0]
        x.requires_grad_(wanted == "both" or (wanted == "the student's" and mine))
    peak, plan = peak_of(student, entries, norm)
    numbers = 8 * shape[0] * (shape[1] + 16)  # norms of rows or columns, the losses of samples
    assert abs(peak - plan.extra_bytes) <= numbers


def test_half_precision_maps_are_widened_once():
    student, teacher = call_of("maps", (4, 64, 30, 30), dtype=torch.float16)
    for x in flatten(student, teacher):
        x.requires_grad_(False)
    peak, plan = peak_of(student, teacher)
    wide = 4 * 4 * 64 * 900  # bytes: of both maps, of difference and sum
    assert abs(peak - plan.extra_bytes) <= 8 * 4 * 64
    assert plan.extra_bytes == 4 * wide + 4 * 4 * 64 * 64


# --- chunks and blocks ----------------------------------------------------------------------------


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("teacher", TEACHERS)
@pytest.mark.parametrize("shape", [MATRIX, GRAM], ids=["matrix", "gram"])
def test_chunks_make_no_difference(planner, shape, teacher, norm):
    planner(CHUNK_BYTES=1, CHUNK_SAMPLES=1)
    student, entries = call_of(teacher, shape)
    with fsp.use_backend("torch"):
        assert fsp.explain(student, entries, norm=norm).pairs[0].samples == 1
        check(student, entries, norm=norm)


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("layout", ["contiguous", "channels last"])
def test_large_maps_are_subtracted_in_blocks(planner, layout, gradients):
    column = 4 * 3 * (5 + 5)  # bytes of a position of difference and sum
    planner(DIFFERENCES_WHOLE=20 * column, DIFFERENCES_BLOCK=10 * column)
    student, teacher = call_of("maps", (3, 5, 47), layout=layout)
    for x in flatten(student, teacher):
        x.requires_grad_(gradients)
    products, plan = products_of(student, teacher)
    assert products.count == 5 + 2 * gradients  # 47 positions, ten at a time
    assert plan.workspace_bytes == 10 * column + 4 * 3 * 5 * 5
    assert products.largest <= max(10 * column, plan.gradient_bytes // 2)
    if gradients:
        check(student, teacher)


# --- losses by pair, weights ----------------------------------------------------------------------


def test_each_pair_has_a_loss_of_its_own():
    a, c, matrix = random(*MATRIX), random(*MATRIX), random(3, 5, 5)
    student, teacher = [(a, a), (a, a)], [(c, c), matrix]
    losses = fsp.fsp_loss(student, teacher, reduction="none")
    for loss, s, t in zip(losses, student, teacher, strict=True):
        alone = fsp.fsp_loss([s], [t])
        assert torch.equal(loss, alone)
        (found,) = torch.autograd.grad(loss, a, retain_graph=True)
        assert torch.equal(found, torch.autograd.grad(alone, a)[0])


def test_weights_may_be_learned():
    student, teacher = call_of("matrices")
    weights = torch.tensor([2.0], requires_grad=True)
    loss = fsp.fsp_loss(student, teacher, weights=weights)
    plain = fsp.fsp_loss(student, teacher)
    x = student[0][0]
    found = torch.autograd.grad(loss, [x, weights])
    torch.testing.assert_close(found[0], 2 * torch.autograd.grad(plain, x)[0])
    torch.testing.assert_close(found[1], plain.detach()[None])


# --- derivatives and transforms -------------------------------------------------------------------


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("teacher", TEACHERS)
@pytest.mark.parametrize("shape", [(2, 3, 4), (2, 9, 1)], ids=["matrix", "gram"])
def test_derivatives_are_right_in_fp64(shape, teacher, norm):
    entry = entry_of(teacher, shape, dtype=torch.float64)
    ready = isinstance(entry, torch.Tensor)

    def loss(a, c):
        return fsp.fsp_loss([(a, a)], [c if ready else (c, c)], norm=norm, channel_dim=1)

    inputs = random(*shape, dtype=torch.float64), entry if ready else entry[0]
    assert gradcheck(loss, inputs, check_batched_grad=True)


def test_a_second_derivative_says_what_to_write_instead():
    student, teacher = call_of("maps")
    loss = fsp.fsp_loss(student, teacher)
    (gradient,) = torch.autograd.grad(loss, student[0][0], create_graph=True)
    with pytest.raises(RuntimeError, match="once differentiable"):
        gradient.sum().backward()


def style(a, c, matrix):
    """Two symmetric pairs and an ordinary one."""
    return fsp.fsp_loss([(a, a), (a, a), (a, c)], [(c, c), matrix, matrix])


def arguments():
    return random(*MATRIX), random(*MATRIX), random(3, 5, 5)


class Flags:
    """A backend of the compiler that notes which pairs are symmetric in each loss that it runs."""

    def __init__(self):
        torch._dynamo.reset()
        self.seen = []

    def __call__(self, module, _):
        calls = [x for x in module.graph.nodes if x.target is torch.ops.fsp.loss]
        self.seen.extend(list(x.args[-1]) for x in calls)
        return module.forward


@pytest.mark.parametrize("dynamic", [False, True])
def test_a_compiled_call_gives_the_same(dynamic):
    inputs, flags = arguments(), Flags()
    compiled = torch.compile(style, fullgraph=True, backend=flags, dynamic=dynamic)
    loss, expected = compiled(*inputs), style(*inputs)
    assert flags.seen == [[True, True, False]]
    assert torch.equal(loss, expected)
    found = torch.autograd.grad(loss, inputs)
    for x, y in zip(found, torch.autograd.grad(expected, inputs), strict=True):
        assert torch.equal(x, y)


def test_a_map_that_is_made_in_compiled_code_is_recognised_too():
    x, matrix, flags = random(3, 4, 3, 5), random(3, 5, 5), Flags()

    def loss(x, matrix):
        y = x.sin()
        return fsp.fsp_loss([(y, y)], [matrix], channel_dim=-1)

    compiled = torch.compile(loss, fullgraph=True, backend=flags)
    assert torch.equal(compiled(x, matrix), loss(x, matrix))
    assert flags.seen == [[True]]


def test_compiled_code_that_gets_other_maps_is_compiled_again():
    flags = Flags()
    compiled = torch.compile(
        lambda a, b, c: fsp.fsp_loss([(a, b)], [c]), fullgraph=True, backend=flags
    )
    a, b, c = random(*MATRIX), random(*MATRIX), random(3, 5, 5)
    for first, second in ((a, a), (a, b), (b, b)):
        loss, expected = compiled(first, second, c), fsp.fsp_loss([(first, second)], [c])
        assert torch.equal(loss, expected)
        found, wanted = (torch.autograd.grad(x, first)[0] for x in (loss, expected))
        assert torch.equal(found, wanted)
    assert flags.seen == [[True], []]


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("shape", [MATRIX, GRAM], ids=["matrix", "gram"])
def test_the_operator_is_well_behaved(shape, norm):
    a, c = random(*shape), random(*shape)
    matrix = random(shape[0], shape[1], shape[1])
    tensors = [a, a, c, c, a, a, matrix]
    needs = [True, False, True, False, True, False, True]
    options = [1.0, 2.0], "max", norm, "torch"
    flags = {"symmetric": [True, True]}
    opcheck(torch.ops.fsp.loss, (tensors, [False, True], needs, *options), flags)


def test_it_can_be_exported():
    class Style(torch.nn.Module):
        def forward(self, a, c, matrix):
            return style(a, c, matrix)

    inputs = tuple(x.detach() for x in arguments())
    program = torch.export.export(Style(), inputs)
    [call] = [x for x in program.graph.nodes if x.target is torch.ops.fsp.loss.default]
    assert call.args[-1] == [True, True, False]
    assert torch.equal(program.module()(*inputs), Style()(*inputs))


def test_programs_without_the_flags_keep_their_meaning():
    a, c = random(*MATRIX), random(*MATRIX)
    options = [1.0], "max", "frobenius", "torch"
    loss, gradients = torch.ops.fsp.loss([a, a, c, c], [False], [True] * 4, *options)
    assert len(gradients) == 4
    (expected,) = torch.autograd.grad(fsp.fsp_loss([(a, a)], [(c, c)]), a)
    (found,) = torch.autograd.grad(loss, a)
    torch.testing.assert_close(found, expected)


def test_transforms_give_the_same():
    a, c, matrix = arguments()
    expected = torch.autograd.grad(style(a, c, matrix), (a, c, matrix))
    found = torch.func.grad(style, argnums=(0, 1, 2))(a, c, matrix)
    torch.testing.assert_close(found, expected)
    scales = torch.tensor([1.0, 2.0])
    per_slice = torch.func.vmap(lambda s: torch.func.grad(style)(s * a, c, matrix))(scales)
    for gradient, scale in zip(per_slice, scales, strict=True):
        x = (scale * a).detach().requires_grad_()
        torch.testing.assert_close(gradient, torch.autograd.grad(style(x, c, matrix), x)[0])


def test_a_mode_counts_the_flops_of_the_plan():
    student, teacher = call_of("maps")
    with FlopCounterMode(display=False) as counter:
        fsp.fsp_loss(student, teacher)
    assert counter.get_total_flops() == fsp.explain(student, teacher).flops
