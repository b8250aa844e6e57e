"""The backends for a CPU, against the definition: shapes, strides, dtypes, forms, chunks.

``torch`` serves any call. ``cpu`` leaves some calls to it, e.g. those in fp64.
"""

from __future__ import annotations

import dataclasses
import itertools
from typing import NamedTuple

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from layouts import LAYOUTS
from tolerances import (
    FUSED,
    RESIDUAL_EPS,
    TOLERANCES,
    assert_close,
    assert_near,
    flatten,
    oracle,
    residual_terms,
)

import fsp_kernels as fsp
import fsp_kernels.plan
from fsp_kernels import checks, reference
from fsp_kernels.backends import get_backend, registered_backends

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
NORMS = ("frobenius", "mse", "column")
POOLS = ("max", "avg")


class Tensors(NamedTuple):
    """One call: its arguments, and what to require a gradient of."""

    student: list
    teacher: list
    weights: list[float]
    pool: str
    norm: str

    @property
    def tensors(self):
        return flatten(self.student, self.teacher)

    @property
    def wanted(self):
        return [x for x in self.tensors if x.requires_grad]

    @property
    def options(self):
        return {"pool": self.pool, "norm": self.norm, "channel_dim": 1}

    def plan(self):
        return fsp.explain(self.student, self.teacher, **self.options)

    def oracle(self):
        return oracle(self.student, self.teacher, self.weights, self.pool, self.norm)

    def place(self, gradients):
        """Gradients of the tensors that want one, in the places of all."""
        given_ones = iter(gradients)
        return [next(given_ones) if x.requires_grad else None for x in self.tensors]


@st.composite
def calls(draw, max_pairs=2, ready=True, subtractable=False, norms=NORMS):
    """Arguments of ``fsp_loss``; ``subtractable``: both networks' maps have as many positions."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32), label="seed"))
    batch, axes = draw(st.integers(1, 5)), draw(st.integers(1, 3))
    dtypes = draw(st.sampled_from([DTYPES[:1], DTYPES, DTYPES[2:], DTYPES[1:2]]))

    def tensor(shape):
        dtype = draw(st.sampled_from(dtypes))
        x = torch.randn(shape, dtype=torch.float64, generator=generator).to(dtype)
        layout = LAYOUTS[draw(st.sampled_from(list(LAYOUTS)))]
        return layout(x).requires_grad_(draw(st.booleans()))

    size = st.lists(st.integers(1, 9 if axes < 3 else 5), min_size=axes, max_size=axes)

    def sizes(first=None):
        first = draw(size) if first is None else first
        return first, draw(st.one_of(st.just(first), size))

    student, teacher = [], []
    for _ in range(draw(st.integers(1, max_pairs))):
        channels = draw(st.tuples(st.integers(1, 40), st.integers(1, 40)))
        own = sizes()
        student.append(tuple(tensor((batch, c, *s)) for c, s in zip(channels, own, strict=True)))
        if ready and draw(st.booleans()):
            teacher.append(tensor((batch, *channels)))
            continue
        other = own if subtractable or draw(st.booleans()) else sizes()
        teacher.append(tuple(tensor((batch, c, *s)) for c, s in zip(channels, other, strict=True)))
    weights = [draw(st.sampled_from([0.0, 0.25, 1.0, 7.5])) for _ in student]
    pool, norm = draw(st.sampled_from(POOLS)), draw(st.sampled_from(norms))
    return Tensors(student, teacher, weights, pool, norm)


def maps(*shapes, dtype=torch.float32, requires_grad=True):
    return [
        torch.randn(s, dtype=torch.float64).to(dtype).requires_grad_(requires_grad) for s in shapes
    ]


def one_pair(*, batch=3, m=5, n=4, student=((6, 6), (6, 6)), teacher=((6, 6), (6, 6)), **options):
    """Two maps of the student and two of the teacher."""
    sizes = zip((m, n, m, n), (*student, *teacher), strict=True)
    return maps(*((batch, c, *s) for c, s in sizes), **options)


def loss_of(a, b, c, d, **options):
    return fsp.fsp_loss([(a, b)], [(c, d)], channel_dim=1, **options)


@pytest.fixture(autouse=True, params=["torch", "cpu"])
def backend(request):
    """The backend of calls that name none."""
    reason = registered_backends()[request.param].why_unavailable()
    if reason:
        pytest.skip(reason)
    with fsp.use_backend("torch" if request.param == "torch" else None):
        yield request.param


by_torch = pytest.mark.parametrize("backend", ["torch"], indirect=True)


# --- the definition -----------------------------------------------------------------------------


@given(calls())
def test_loss_and_gradients_are_those_of_the_definition(call):
    loss = fsp.fsp_loss(call.student, call.teacher, weights=call.weights, **call.options)
    gradients = torch.autograd.grad(loss, call.wanted) if call.wanted else []
    fp64 = any(x.dtype == torch.float64 for x in call.tensors)
    assert loss.dtype == (torch.float64 if fp64 else torch.float32)
    assert loss.requires_grad == bool(call.wanted)
    call.oracle().check(loss, call.place(gradients), call.plan())


@given(calls())
def test_gradients_have_the_dtype_and_layout_of_their_inputs(call):
    assume(call.wanted)
    loss = fsp.fsp_loss(call.student, call.teacher, weights=call.weights, **call.options)
    for x, gradient in zip(call.wanted, torch.autograd.grad(loss, call.wanted), strict=True):
        assert gradient.dtype == x.dtype
        assert gradient.stride() == torch.empty_like(x).stride()


@pytest.mark.parametrize("to_a", [False, True])
@pytest.mark.parametrize("to_b", [False, True])
@pytest.mark.parametrize("to_c", [False, True])
@pytest.mark.parametrize("to_d", [False, True])
@pytest.mark.parametrize("positions", [(2, 2), (9, 9)], ids=["gram", "matrix"])
def test_gradients_reach_those_inputs_that_require_them(positions, to_a, to_b, to_c, to_d):
    wanted = (to_a, to_b, to_c, to_d)
    tensors = one_pair(m=16, n=12, student=(positions,) * 2, teacher=(positions,) * 2)
    for x, needs in zip(tensors, wanted, strict=True):
        x.requires_grad_(needs)
    loss = loss_of(*tensors)
    assert loss.requires_grad == any(wanted)
    if any(wanted):
        loss.backward()
    assert [x.grad is not None for x in tensors] == list(wanted)
    a, b, c, d = tensors
    oracle([(a, b)], [(c, d)]).check(loss, [x.grad for x in tensors])


@pytest.mark.parametrize("norm", NORMS)
def test_a_ready_matrix_gets_its_gradient(norm):
    a, b, matrix = maps((3, 5, 6, 6), (3, 4, 6, 6), (3, 5, 4))
    loss = fsp.fsp_loss([(a, b)], [matrix], norm=norm)
    oracle([(a, b)], [matrix], norm=norm).check(loss, torch.autograd.grad(loss, (a, b, matrix)))


ONE_FOR_ALL = {
    "contiguous": lambda: torch.randn(1, 5, 4),
    "transposed": lambda: torch.randn(1, 4, 5).mT,
    "slice of a batch": lambda: torch.randn(3, 5, 4)[1:2],
    "expanded": lambda: torch.randn(1, 5, 1).expand(1, 5, 4),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("make", ONE_FOR_ALL.values(), ids=ONE_FOR_ALL)
def test_one_ready_matrix_serves_all_samples(make, norm, dtype):
    a, b = maps((3, 5, 6, 6), (3, 4, 6, 6))
    matrix = make().to(dtype).detach().requires_grad_()
    before = matrix.detach().clone()
    loss = fsp.fsp_loss([(a, b)], [matrix], norm=norm)
    gradients = torch.autograd.grad(loss, (a, b, matrix))
    oracle([(a, b)], [matrix], norm=norm).check(loss, gradients)
    assert gradients[2].dtype == dtype
    assert torch.equal(matrix, before)
    matrix.grad = None
    fsp.fsp_loss([(a, b)], [matrix], norm=norm).backward()
    assert matrix.grad.stride() == torch.empty_like(matrix).stride()


@by_torch
def test_one_ready_matrix_in_chunks_of_samples(planner):
    planner(CHUNK_BYTES=1, CHUNK_SAMPLES=1)
    a, b, matrix = maps((5, 5, 6, 6), (5, 4, 6, 6), (1, 5, 4))
    assert fsp.explain([(a, b)], [matrix]).pairs[0].samples == 1
    loss = fsp.fsp_loss([(a, b)], [matrix])
    oracle([(a, b)], [matrix]).check(loss, torch.autograd.grad(loss, (a, b, matrix)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "student", [((8, 8), (4, 4)), ((3, 5), (7, 7)), ((9, 4), (6, 8)), ((1, 1), (6, 6))], ids=str
)
def test_the_first_of_equal_maxima_gets_the_gradient(student, dtype):
    # Every map is made of three values, so most windows tie.
    tensors = [
        torch.randint(-1, 2, x.shape).to(dtype).requires_grad_()
        for x in one_pair(student=student, teacher=student)
    ]
    a, b, c, d = tensors
    loss = loss_of(*tensors)
    plan = fsp.explain([(a, b)], [(c, d)])
    oracle([(a, b)], [(c, d)]).check(loss, torch.autograd.grad(loss, tensors), plan)


@pytest.mark.parametrize("norm", NORMS)
def test_equal_networks_have_no_loss_and_no_gradient(norm):
    a, b, *_ = one_pair()
    c, d = a.detach().clone(), b.detach().clone()
    loss = loss_of(a, b, c, d, norm=norm)
    loss.backward()
    assert loss == 0
    assert not a.grad.any()
    assert not b.grad.any()


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("layout", ["contiguous", "channels last"])
@pytest.mark.parametrize("size", [(1,), (6, 6), (14, 14)], ids=str)
def test_a_ready_matrix_of_equal_maps_leaves_no_loss_and_no_gradient(size, layout, norm):
    a, b = (LAYOUTS[layout](x.detach()) for x in maps((5, 20, *size), (5, 24, *size)))
    matrix = fsp.fsp_matrix(a, b, channel_dim=1)
    a, b = (x[1:4].requires_grad_() for x in (a, b))  # a batch of another size
    loss = fsp.fsp_loss([(a, b)], [matrix[1:4]], norm=norm, channel_dim=1)
    assert loss == 0
    assert not any(g.any() for g in torch.autograd.grad(loss, (a, b)))


def test_a_zero_weight_takes_its_pair_out():
    a, b, c, d = one_pair()
    loss = fsp.fsp_loss([(a, b), (c, b)], [(c, d), (a, d)], weights=[0, 2])
    expected = fsp.fsp_loss([(c, b)], [(a, d)], weights=[2])
    assert_close(loss, expected.double())
    gradients = zip(
        torch.autograd.grad(loss, (a, b, c, d)),
        torch.autograd.grad(expected, (a, b, c, d)),
        strict=True,
    )
    for gradient, wanted in gradients:
        assert_close(gradient, wanted.double())


@pytest.mark.parametrize("size", [1e-4, 1e4])
@pytest.mark.parametrize("positions", [(3, 3), (12, 12)], ids=["gram", "matrix"])
def test_ordinary_magnitudes_neither_overflow_nor_vanish(size, positions):
    tensors = one_pair(m=32, n=32, student=(positions,) * 2, teacher=(positions,) * 2)
    a, b, c, d = tensors = [(size * x.detach()).requires_grad_() for x in tensors]
    loss = loss_of(*tensors)
    gradients = torch.autograd.grad(loss, tensors)
    assert loss > 0
    oracle([(a, b)], [(c, d)]).check(loss, gradients)


# --- forms --------------------------------------------------------------------------------------


def forced(call, form, residual):
    """Loss and gradients by a given form, whatever the planner would choose."""
    plan = call.plan()
    pairs = tuple(dataclasses.replace(p, form=form, residual=residual) for p in plan.pairs)
    plan = dataclasses.replace(plan, pairs=pairs)
    with torch.no_grad():
        return get_backend(plan.backend).loss(call.tensors, plan, call.weights)


@pytest.mark.parametrize(
    ("form", "residual"),
    [("gram", "difference"), ("matrix", "difference"), ("matrix", "direct")],
)
@given(call=calls(ready=False, subtractable=True, norms=("frobenius", "mse")))
def test_every_form_computes_the_definition(form, residual, call):
    loss, gradients = forced(call, form, residual)
    expected = call.oracle()
    # What forward leaves for backward is the gradient itself, fp16's still in fp32.
    expected.check(loss, call.place(gradients), call.plan())


@given(call=calls(ready=False, subtractable=True, norms=("column",)))
def test_the_column_norm_has_both_residuals(call):
    for residual in ("difference", "direct"):
        loss, gradients = forced(call, "matrix", residual)
        call.oracle().check(loss, call.place(gradients), call.plan())


NEAR = {"batch": 32, "m": 512, "n": 512, "student": ((7, 7),) * 2, "teacher": ((7, 7),) * 2}


@pytest.mark.slow
@pytest.mark.parametrize("form", ["gram", "matrix"])
def test_the_gradient_survives_convergence(form):
    # Student = teacher + 1e-5 noise: subtracting two FSP matrices, as the naive op does, leaves
    # little more than their rounding errors.
    _, _, c, d = one_pair(**NEAR, requires_grad=False)
    a = (c + 1e-5 * torch.randn_like(c)).requires_grad_()
    b = (d + 1e-5 * torch.randn_like(d)).requires_grad_()
    exact = [x.detach().double().requires_grad_() for x in (a, b, c, d)]
    loss = reference.fsp_loss([exact[:2]], [exact[2:]])
    expected = torch.autograd.grad(loss, exact[:2])

    _, gradients = forced(
        Tensors([(a, b)], [(c, d)], [1.0], "max", "frobenius"), form, "difference"
    )
    naive = torch.autograd.grad(reference.fsp_loss([(a, b)], [(c, d)]), (a, b))
    for gradient, by_naive, wanted in zip(gradients, naive, expected, strict=True):
        assert (gradient - wanted).norm() <= 1e-6 * wanted.norm()
        assert (by_naive - wanted).norm() > 1e-4 * wanted.norm()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_maps_an_ulp_apart_have_the_right_gradient(dtype):
    c, d = maps((4, 24, 7, 7), (4, 24, 7, 7), dtype=dtype, requires_grad=False)
    step = torch.finfo(dtype).eps
    a, b = ((x * (1 + step)).requires_grad_() for x in (c, d))
    loss = loss_of(a, b, c, d)
    expected = oracle([(a, b)], [(c, d)])
    gradients = torch.autograd.grad(loss, (a, b))
    rounds = fsp.explain([(a, b)], [(c, d)]).pairs[0].bf16_products
    for gradient, wanted in zip(gradients, expected.gradients, strict=False):
        if rounds:
            assert_near(gradient, wanted, *FUSED["matrix", dtype][1:])
        else:
            assert_close(gradient, wanted)


GRAM = {"m": 96, "n": 80, "student": ((3, 3),) * 2, "teacher": ((3, 3),) * 2}


def mirrored(dtype=torch.float32, noise=0.0):
    """Two networks with maps far apart and FSP matrices that differ by ``noise`` alone."""
    _, _, c, d = one_pair(**GRAM, dtype=dtype, requires_grad=False)
    a = c.flip(-1) + noise * torch.randn_like(c)
    return a.requires_grad_(), d.flip(-1).requires_grad_(), c, d


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("seed", range(4))
def test_a_loss_in_gram_form_is_never_negative(seed, dtype):
    torch.manual_seed(seed)
    a, b, c, d = mirrored(dtype)
    assert fsp.explain([(a, b)], [(c, d)]).pairs[0].form == "gram"
    assert loss_of(a, b, c, d) >= 0


@pytest.mark.parametrize("noise", [0, 1e-6, 1e-4, 1e-2, 1])
@pytest.mark.parametrize("form", ["gram", "matrix"])
def test_a_small_residual_of_large_matrices_is_as_right_as_the_naive_one(form, noise):
    a, b, c, d = mirrored(noise=noise)
    call = Tensors([(a, b)], [(c, d)], [1.0], "max", "frobenius")
    loss, _ = forced(call, form, "difference")
    exact = call.oracle().loss
    error = 2.0**-24 * (fsp.fsp_matrix(a, b).norm() + fsp.fsp_matrix(c, d).norm()).item()
    assert abs(loss - exact) <= 2 * exact.sqrt() * error + error**2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("ratio", [1.0, 2.0**7, 2.0**20])
@pytest.mark.parametrize("form", ["gram", "matrix"])
def test_the_error_of_a_residual_has_the_bound_of_the_difference_form(form, ratio, dtype):
    _, _, c, d = one_pair(**GRAM, dtype=dtype, requires_grad=False)
    a, b = (c / ratio).requires_grad_(), (d * ratio).requires_grad_()  # equal matrices, exactly
    call = Tensors([(a, b)], [(c, d)], [1.0], "max", "frobenius")
    loss, _ = forced(call, form, "difference")
    eps = RESIDUAL_EPS[dtype][0]
    if form == "gram" and dtype == torch.float64:
        assert 0 <= loss <= eps * residual_terms(*call.student, *call.teacher).square().mean()
    else:
        error = eps * residual_terms(*call.student, *call.teacher)
        assert 0 <= loss <= error.square().mean()


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("noise", [1e-1, 1e-3, 1e-5])
def test_a_residual_of_pooled_maps_has_its_bound(noise, pool):
    sizes = ((6, 6), (3, 3))
    _, _, c, d = one_pair(m=5, n=4, student=sizes, teacher=sizes, requires_grad=False)
    a, b = (x + noise * torch.randn_like(x) for x in (c, d))
    exact = oracle([(a, b)], [(c, d)], pool=pool).loss
    error = RESIDUAL_EPS[torch.float32][0] * residual_terms((a, b), (c, d), pool).norm()
    difference = (fsp.fsp_loss([(a, b)], [(c, d)], pool=pool) - exact).abs()
    assert (
        difference <= 2 * exact.sqrt() * error + error**2 + TOLERANCES[torch.float32].rtol * exact
    )


# --- chunks -------------------------------------------------------------------------------------


@by_torch
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize(
    "sizes",
    [((2, 2), (2, 2)), ((6, 6), (6, 6)), ((8, 8), (4, 4)), ((7, 5), (5, 6))],
    ids=["gram", "matrix", "pooled", "pooled unevenly"],
)
def test_chunks_make_no_difference(sizes, pool, norm, planner):
    a, b, c, d = one_pair(batch=11, m=12, n=9, student=sizes, teacher=sizes)
    (matrix,) = maps((11, 12, 9))
    call = Tensors([(a, b), (a, b)], [(c, d), matrix], [1.0, 0.5], pool, norm)

    def results():
        loss = fsp.fsp_loss(call.student, call.teacher, weights=call.weights, **call.options)
        return loss, torch.autograd.grad(loss, (a, b, c, d, matrix))

    plan = fsp.explain(call.student, call.teacher, **call.options)
    assert all(pair.samples == 11 for pair in plan.pairs)
    whole = results()
    for samples in (1, 4):  # eleven chunks; two of four and a ragged last
        per_sample = [_bytes_per_sample(p) for p in plan.pairs]
        size = 0 if samples == 1 else samples * max(per_sample)
        planner(CHUNK_BYTES=size, CHUNK_SAMPLES=1)
        now = fsp.explain(call.student, call.teacher, **call.options)
        assert now.pairs[0].samples < 11
        if samples == 4:
            assert 11 % now.pairs[0].samples
        loss, gradients = results()
        assert_close(loss, whole[0].double())
        for gradient, expected in zip(gradients, whole[1], strict=True):
            assert_close(gradient, expected.double())


def _bytes_per_sample(pair):
    inputs = sum(m.bytes + m.gradient_bytes for m in pair.maps)
    return (inputs + pair.workspace_bytes) // pair.batch


@by_torch
@given(call=calls(), size=st.sampled_from([1, 3000, 30000]))
def test_chunks_of_any_call_compute_the_definition(call, size):
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(fsp_kernels.plan.CHUNK_BYTES, "cpu", size)
        patch.setitem(fsp_kernels.plan.CHUNK_SAMPLES, "cpu", 1)
        plan = fsp_kernels.plan.plan_loss.__wrapped__(
            *checks.specs_of(*checks.flatten_pairs(call.student, call.teacher)[:2]),
            call.pool,
            call.norm,
            get_backend("torch"),
            "tf32x3",
        )
    with torch.no_grad():
        loss, gradients = get_backend("torch").loss(call.tensors, plan, call.weights)
    call.oracle().check(loss, call.place(gradients))


def test_no_matrix_of_the_whole_batch_is_ever_held():
    batch, m, n = 256, 128, 128
    sizes = ((8, 8),) * 2
    tensors = one_pair(batch=batch, m=m, n=n, student=sizes, teacher=sizes)
    tensors[2].requires_grad_(False)
    tensors[3].requires_grad_(False)
    assert fsp.explain([tensors[:2]], [tensors[2:]]).pairs[0].form == "matrix"

    def largest_allocation(function):
        with torch.profiler.profile(profile_memory=True) as profile:
            function(*tensors).backward()
        return max(event.self_cpu_memory_usage for event in profile.events())

    whole = 4 * batch * m * n
    assert largest_allocation(lambda a, b, c, d: reference.fsp_loss([(a, b)], [(c, d)])) >= whole
    # The largest thing it holds is a gradient, and that has the size of its map.
    assert largest_allocation(loss_of) <= max(4 * x.numel() for x in tensors) < whole


# --- what is computed, and when -----------------------------------------------------------------


def matrix_products(function):
    with torch.profiler.profile() as profile:
        function()
    return sum(event.name in ("aten::baddbmm", "aten::bmm") for event in profile.events())


@by_torch
@pytest.mark.parametrize(
    ("positions", "value_only", "with_gradients"), [((9, 9), 2, 4), ((2, 2), 6, 10)]
)
def test_without_gradients_only_the_loss_is_computed(positions, value_only, with_gradients):
    tensors = one_pair(m=40, n=40, student=(positions,) * 2, teacher=(positions,) * 2)
    tensors[2].requires_grad_(False)
    tensors[3].requires_grad_(False)

    def without():
        with torch.no_grad():
            loss = loss_of(*tensors)
        assert not loss.requires_grad
        assert_close(loss, loss_of(*tensors).detach().double())

    assert matrix_products(lambda: loss_of(*tensors)) == with_gradients
    assert matrix_products(without) == value_only + with_gradients
    assert matrix_products(lambda: loss_of(*(x.detach() for x in tensors))) == value_only


@pytest.mark.parametrize("sizes", [((2, 2), (2, 2)), ((9, 9), (9, 9)), ((9, 9), (4, 3))], ids=str)
def test_results_are_the_same_bits_from_run_to_run(sizes):
    tensors = one_pair(batch=7, m=24, n=40, student=sizes, teacher=sizes)

    def run():
        loss = loss_of(*tensors)
        return [loss, *torch.autograd.grad(loss, tensors)]

    first = run()
    for _ in range(5):
        assert all(torch.equal(x, y) for x, y in zip(first, run(), strict=True))


@pytest.mark.parametrize("sizes", [((2, 2), (2, 2)), ((9, 9), (9, 9))], ids=["gram", "matrix"])
def test_maps_may_change_after_the_call(sizes):
    tensors = one_pair(m=16, n=16, student=sizes, teacher=sizes)
    a, b, c, d = tensors
    expected = oracle([(a, b)], [(c, d)])
    loss = loss_of(*tensors)
    with torch.no_grad():
        for x in tensors:
            x.zero_()
    expected.check(loss, torch.autograd.grad(loss, tensors))


def test_arguments_are_left_as_they_were():
    tensors = one_pair()
    before = [x.detach().clone() for x in tensors]
    loss_of(*tensors).backward()
    assert all(torch.equal(x, y) for x, y in zip(tensors, before, strict=True))


# --- not numbers --------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("position", range(4))
@pytest.mark.parametrize(
    "sizes", [((2, 2), (2, 2)), ((9, 9), (9, 9)), ((8, 8), (4, 4))], ids=["gram", "matrix", "pool"]
)
def test_what_is_not_finite_shows_in_the_loss_and_stays_in_its_sample(sizes, position, value, norm):
    a, b, c, d = tensors = one_pair(m=16, n=16, student=sizes, teacher=sizes)
    expected = oracle([(a, b)], [(c, d)], norm=norm)
    with torch.no_grad():
        tensors[position][1] = value
    loss = loss_of(*tensors, norm=norm)
    gradients = torch.autograd.grad(loss, tensors)
    assert not loss.isfinite()
    for gradient, wanted, scale in zip(
        gradients, expected.gradients, expected.gradient_scales, strict=True
    ):
        # Max pooling sends nothing, so zeros, to all but the maxima.
        assert not gradient[1].isfinite().all()
        for sample in (0, 2):
            assert_close(gradient[sample], wanted[sample], scale)


@pytest.mark.parametrize("pool", POOLS)
def test_a_nan_survives_pooling(pool):
    a, b, c, d = one_pair(student=((8, 8), (4, 4)), teacher=((8, 8), (4, 4)))
    with torch.no_grad():
        a[1, 2, 3, 3] = float("nan")
    assert loss_of(a, b, c, d, pool=pool).isnan()


# Forms and residuals for each norm; the column norm has no Gram form.
WAYS = [
    (form, residual, norm)
    for form, residual in (("gram", "difference"), ("matrix", "difference"), ("matrix", "direct"))
    for norm in NORMS
    if (form, norm) != ("gram", "column")
]


@pytest.mark.parametrize("weight", [0.0, 1.0])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("position", range(4))
@pytest.mark.parametrize(("form", "residual", "norm"), WAYS)
def test_what_is_not_finite_shows_where_it_does_in_the_definition(
    form, residual, norm, position, value, weight
):
    a, b, c, d = one_pair(batch=2, student=((3, 3),) * 2, teacher=((3, 3),) * 2)
    call = Tensors([(a, b)], [(c, d)], [weight], "max", norm)
    check_what_is_not_finite(call, form, residual, position, value)


@pytest.mark.parametrize("weight", [0.0, 1.0])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("position", range(3))
@pytest.mark.parametrize("norm", NORMS)
def test_what_is_not_finite_shows_beside_a_ready_matrix(norm, position, value, weight):
    a, b, matrix = maps((2, 5, 3, 3), (2, 4, 3, 3), (2, 5, 4))
    call = Tensors([(a, b)], [matrix], [weight], "max", norm)
    check_what_is_not_finite(call, "matrix", "direct", position, value)


def check_what_is_not_finite(call, form, residual, position, value):
    """Of the definition, NaN is NaN and infinity infinity or NaN; other samples do not see it."""
    clean = call.oracle()
    with torch.no_grad():
        call.tensors[position].flatten(1)[1, 7] = value
    expected = call.oracle()
    loss, gradients = forced(call, form, residual)
    assert not loss.isfinite()
    assert loss.isnan() or not expected.loss.isnan()
    for gradient, wanted, unharmed, scale in zip(
        gradients, expected.gradients, clean.gradients, clean.gradient_scales, strict=True
    ):
        assert not gradient[~wanted.isfinite()].isfinite().any()
        assert_close(gradient[0], unharmed[0], scale)


# --- overflow -----------------------------------------------------------------------------------

SIZES = (1.0, 1e6, 1e12, 1e15)


@pytest.mark.parametrize("weight", [1.0, 1e-6])
@pytest.mark.parametrize(("form", "residual", "norm"), WAYS)
def test_nothing_overflows_that_the_naive_op_keeps_finite(form, residual, norm, weight):
    for first, second, far in itertools.product(SIZES, SIZES, (1e-3, 1.0)):
        c, d = maps((3, 24, 2, 2), (3, 20, 2, 2), requires_grad=False)
        a, b = (x * (1 + far * torch.randn_like(x)) for x in (c, d))
        tensors = [s * x for s, x in zip((first, second) * 2, (a, b, c, d), strict=True)]
        a, b, c, d = (x.requires_grad_() for x in tensors)
        call = Tensors([(a, b)], [(c, d)], [weight], "max", norm)
        naive = reference.fsp_loss(call.student, call.teacher, [weight], norm=norm)
        loss, gradients = forced(call, form, residual)
        assert loss.isfinite() or not naive.isfinite()
        for gradient, by_naive in zip(
            gradients, torch.autograd.grad(naive, call.tensors), strict=True
        ):
            # Not to the last factor: sums are taken in another order.
            if by_naive.abs().max() < 1e36:
                assert gradient.isfinite().all()


# --- half precision -----------------------------------------------------------------------------


@pytest.mark.parametrize("incoming", [65536.0, 1024.0])
def test_a_loss_scale_rescues_fp16_gradients_from_underflow(incoming):
    sizes = ((56, 56),) * 2  # gradients of about 1e-8, below the least fp16
    tensors = one_pair(batch=64, m=4, n=4, student=sizes, teacher=sizes, dtype=torch.float16)
    a, b, c, d = tensors = [(x.detach() / 4).requires_grad_() for x in tensors]
    expected = oracle([(a, b)], [(c, d)]).gradients
    loss = loss_of(*tensors)
    assert all((g.half() == 0).double().mean() > 0.9 for g in expected)
    for gradient, wanted in zip(
        torch.autograd.grad(loss, tensors, torch.tensor(incoming)), expected, strict=True
    ):
        assert gradient.dtype == torch.float16
        assert gradient.count_nonzero() > 0.9 * gradient.numel()
        error = (gradient.double() - incoming * wanted).norm()
        assert error <= 1e-2 * (incoming * wanted).norm()


# --- the same tensor in several places ----------------------------------------------------------


def test_layers_shared_by_pairs_accumulate_their_gradients():
    student = maps((3, 4, 8, 8), (3, 6, 8, 8), (3, 5, 4, 4))
    teacher = maps((3, 4, 8, 8), (3, 6, 8, 8), (3, 5, 4, 4), requires_grad=False)
    loss = fsp.fsp_loss(fsp.pairs_of(student), fsp.pairs_of(teacher))
    expected = oracle(fsp.pairs_of(student), fsp.pairs_of(teacher))
    first, second_a, _, _, second_b, third, *_ = expected.gradients
    loss.backward()
    assert_close(student[0].grad, first, expected.gradient_scales[0])
    assert_close(student[1].grad, second_a + second_b)
    assert_close(student[2].grad, third, expected.gradient_scales[5])


@pytest.mark.parametrize("size", [(2, 2), (9, 9)], ids=["gram", "matrix"])
def test_one_map_as_first_and_second_gets_both_gradients(size):
    a, c = maps((3, 12, *size), (3, 12, *size))
    loss = loss_of(a, a, c, c)
    expected = oracle([(a, a)], [(c, c)])
    to_a, to_a_again, to_c, to_c_again = expected.gradients
    for gradient, wanted in zip(
        torch.autograd.grad(loss, (a, c)), (to_a + to_a_again, to_c + to_c_again), strict=True
    ):
        assert_close(gradient, wanted)


def test_one_map_of_both_networks_gets_the_sum_of_its_gradients():
    a, b, c, _ = one_pair()
    loss = loss_of(a, b, c, b)
    _, to_b, _, to_b_again = oracle([(a, b)], [(c, b)]).gradients
    assert_close(torch.autograd.grad(loss, b)[0], to_b + to_b_again)


def test_a_teacher_run_in_inference_mode_serves_a_training_student():
    a, b, *_ = one_pair()
    with torch.inference_mode():
        c, d = maps((3, 5, 6, 6), (3, 4, 6, 6), requires_grad=False)
        matrix = fsp.fsp_matrix(c, d)
    loss = fsp.fsp_loss([(a, b), (a, b)], [(c, d), matrix])
    expected = oracle([(a, b), (a, b)], [(c.clone(), d.clone()), matrix.clone()])
    loss.backward()
    assert_close(loss, expected.loss)
    assert_close(a.grad, expected.gradients[0] + expected.gradients[4])
    assert_close(b.grad, expected.gradients[1] + expected.gradients[5])
