"""The loss by fused kernels against the definition: what holds however a pair is evaluated."""

from __future__ import annotations

import pytest
import torch
from calls import (
    BF16,
    DEVICE,
    DTYPES,
    FP16,
    FP32,
    MATRIX_ROADS,
    NORMS,
    ROADS,
    check,
    four_of,
    gradients_of,
    pair_of,
    run,
    tensor,
)
from layouts import LAYOUTS
from tolerances import (
    FUSED,
    GRAM_EPS,
    RESIDUAL_EPS,
    assert_near,
    flatten,
    fused_bounds,
    oracle,
    relative_error,
    residual_terms,
)

import fsp_kernels as fsp
from fsp_kernels import reference

pytestmark = pytest.mark.usefixtures("small")
every_regime = pytest.mark.parametrize("regime", ROADS, indirect=True)
every_matrix_regime = pytest.mark.parametrize("regime", MATRIX_ROADS, indirect=True)
MORE_THAN_ONE_LAUNCH_TAKES = 9  # pairs; Triton's take 8, those of CUDA C++ 6


# --- the definition -----------------------------------------------------------------------------


def test_the_backend_that_is_in_force_serves(regimes, backend):
    assert fsp.explain(*four_of(regimes["one pass"])).backend == backend


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("norm", NORMS)
@every_regime
def test_loss_and_gradients_are_those_of_the_definition(regime, norm, dtype):
    student, teacher = four_of(regime, dtypes=(dtype, dtype))
    weights = [128.0]  # the gradient of a mean of squares would be subnormal in fp16
    check(student, teacher, regime.of(norm), norm=norm, weights=weights)


@pytest.mark.parametrize(
    ("student", "teacher"),
    [
        ((FP32, FP32), (BF16, BF16)),
        ((BF16, FP16), (BF16, FP16)),
        ((BF16, FP32), (FP16, BF16)),
    ],
    ids=str,
)
@every_regime
def test_each_map_may_have_its_own_dtype(regime, student, teacher):
    pairs = [pair_of(regime, dtypes=student)], [pair_of(regime, dtypes=teacher)]
    check(*pairs, regime)


@pytest.mark.parametrize("noise", [1.0, 1e-2, 1e-5])
@pytest.mark.parametrize("dtype", [FP16, BF16], ids=str)
@every_regime
def test_gradients_are_as_exact_near_the_teacher(regime, dtype, noise):
    teacher = pair_of(regime, grad=False)
    student = [x.double() + noise * torch.randn_like(x, dtype=torch.float64) for x in teacher]
    a, b = (x.to(dtype).requires_grad_() for x in student)
    c, d = (x.to(dtype) for x in teacher)
    student, teacher, weights = [(a, b)], [(c, d)], [1 / noise]  # in the range of fp16
    bound = fused_bounds(fsp.explain(student, teacher, channel_dim=1).pairs[0], dtype)
    _, *gradients = run(student, teacher, weights=weights)
    expected = oracle(student, teacher, weights).gradients
    for gradient, wanted in zip(gradients, expected, strict=False):  # the student's alone
        assert_near(gradient, wanted, bound.gradient, bound.reason)


@pytest.mark.parametrize("dtype", [FP16, BF16], ids=str)
@every_matrix_regime
def test_maps_are_subtracted_before_anything_is_rounded(regime, dtype):
    for dtypes in ((dtype, dtype), (dtype, FP32)):
        student, teacher = four_of(regime, dtypes=dtypes)
        assert fsp.explain(student, teacher).pairs[0].residual == "difference"


@pytest.mark.parametrize("dtype", [FP16, BF16], ids=str)
@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no grad"])
@every_matrix_regime
def test_a_ready_matrix_may_stand_beside_half_precision_maps(regime, grad, dtype):
    matrix = tensor(2, *regime.channels, grad=grad)
    check([pair_of(regime, batch=2, dtypes=(dtype, dtype))], [matrix], regime)


@every_matrix_regime
@pytest.mark.parametrize("norm", ["frobenius", "column"])
@pytest.mark.parametrize("dtypes", [None, (BF16, FP16)], ids=str)
def test_the_teacher_may_have_maps_of_another_size(regime, norm, dtypes):
    size = (regime.size[0], regime.size[1] - 1)
    student = [pair_of(regime, size=size, batch=2)]
    teacher = [pair_of(regime, batch=2, dtypes=dtypes)]
    plan = check(student, teacher, regime.of(norm), norm=norm)
    assert plan.pairs[0].residual == "apart"


@pytest.mark.parametrize(
    ("norm", "transposed", "grad"),
    [
        ("frobenius", False, True),
        ("frobenius", False, False),
        ("frobenius", True, True),
        ("column", True, True),
    ],
)
@every_matrix_regime
def test_the_teacher_may_be_a_ready_matrix(regime, norm, transposed, grad):
    m, n = regime.channels
    dtype = regime.dtype
    matrix = tensor(2, n, m, dtype=dtype).mT if transposed else tensor(2, m, n, dtype=dtype)
    matrix = matrix.detach().requires_grad_(grad)
    check([pair_of(regime, batch=2)], [matrix], regime.of(norm), norm=norm)


@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no grad"])
@pytest.mark.parametrize("transposed", [False, True], ids=["rows", "columns"])
@every_matrix_regime
def test_one_ready_matrix_serves_all_samples(regime, transposed, grad):
    (m, n), dtype = regime.channels, regime.dtype
    matrix = tensor(1, n, m, dtype=dtype).mT if transposed else tensor(1, m, n, dtype=dtype)
    student, teacher = [pair_of(regime, batch=3)], [matrix.detach().requires_grad_(grad)]
    assert fsp.explain(student, teacher).pairs[0].evaluation == regime.evaluation
    loss = fsp.fsp_loss(student, teacher)
    expected, bounds = oracle(student, teacher), FUSED["matrix", dtype]
    assert_near(loss, expected.loss, bounds.loss, "the loss")
    found = gradients_of(loss, flatten(student, teacher))
    for gradient, wanted in zip(found, expected.gradients, strict=True):
        if gradient is not None:
            assert gradient.dtype == dtype
            assert_near(gradient, wanted, bounds.gradient, bounds.reason)


@every_regime
def test_channels_may_be_last(regime):
    student, teacher = four_of(regime, batch=2)
    images = [[x.detach().movedim(1, -1).contiguous() for x in (*student[0], *teacher[0])]]
    tokens = [x.flatten(1, 2) for x in images[0]]
    for a, b, c, d in (*images, tokens):
        wanted = [x.requires_grad_() for x in (a, b, c, d)]
        plan = fsp.explain([(a, b)], [(c, d)], channel_dim=-1)
        assert (plan.pairs[0].evaluation, plan.pairs[0].form) == (regime.evaluation, regime.form)
        loss = fsp.fsp_loss([(a, b)], [(c, d)], channel_dim=-1)
        gradients = torch.autograd.grad(loss, wanted)
        assert [g.stride() for g in gradients] == [x.stride() for x in wanted]
        moved = [[x.detach().movedim(-1, 1) for x in pair] for pair in ((a, b), (c, d))]
        expected = oracle([moved[0]], [moved[1]])
        expected.check_fused(plan, loss, [g.movedim(-1, 1) for g in gradients])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@every_matrix_regime
def test_a_ready_matrix_may_have_its_own_dtype(regime, dtype):
    m, n = regime.channels
    check([pair_of(regime)], [tensor(1, m, n, dtype=dtype)], regime)


# --- gradients, those wanted ----------------------------------------------------------------------


@pytest.mark.parametrize("to_a", [False, True])
@pytest.mark.parametrize("to_b", [False, True])
@pytest.mark.parametrize("to_c", [False, True])
@pytest.mark.parametrize("to_d", [False, True])
@every_regime
def test_gradients_reach_those_inputs_that_require_them(regime, to_a, to_b, to_c, to_d):
    student, teacher = four_of(regime, grad=False)
    for x, needs in zip(flatten(student, teacher), (to_a, to_b, to_c, to_d), strict=True):
        x.requires_grad_(needs)
    check(student, teacher, regime)


@pytest.mark.parametrize("norm", NORMS)
@every_regime
def test_without_gradients_only_the_loss_is_computed(regime, norm):
    student, teacher = four_of(regime)
    expected = oracle(student, teacher, norm=norm)
    with torch.no_grad():
        plan = fsp.explain(student, teacher, norm=norm)
        loss = fsp.fsp_loss(student, teacher, norm=norm)
    assert not loss.requires_grad
    assert plan.gradient_bytes == 0
    expected.check_fused(plan, loss, [None] * 4)


# --- how maps lie ---------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "contiguous"])
@pytest.mark.parametrize("regime", ["one pass", "gram"], indirect=True)
def test_maps_may_lie_in_memory_in_any_way(regime, layout):
    check([pair_of(regime, layout=layout)], [pair_of(regime)], regime)


@pytest.mark.parametrize("layout", ["channels last", "every second channel", "cropped"])
@pytest.mark.parametrize("regime", ["tiles", "tiles in parts"], indirect=True)
def test_tiles_of_maps_may_lie_in_memory_in_any_way(regime, layout):
    check([pair_of(regime)], [pair_of(regime, layout=layout)], regime)


@pytest.mark.parametrize("dtype", [FP16, BF16], ids=str)
@pytest.mark.parametrize("layout", ["channels last", "cropped", "one element off alignment"])
@pytest.mark.parametrize("regime", ["one pass", "gram"], indirect=True)
def test_half_precision_maps_may_lie_in_memory_in_any_way(regime, layout, dtype):
    check(*four_of(regime, layout=layout, dtypes=(dtype, dtype)), regime)


@pytest.mark.parametrize("axes", [1, 3], ids=["tokens", "volumes"])
@pytest.mark.parametrize("layout", ["contiguous", "channels last", "every second position"])
@pytest.mark.parametrize("regime", ["one pass", "tiles"], indirect=True)
def test_maps_may_have_one_to_three_spatial_axes(regime, layout, axes):
    height, width = regime.size
    size = (height * width,) if axes == 1 else (height // 2, 2, width)
    check(*four_of(regime, size=size, layout=layout), regime)


# --- batches, pairs, weights ----------------------------------------------------------------------


@pytest.mark.parametrize("norm", ["mse", "column"])
@every_regime
def test_a_loss_is_the_mean_over_a_batch(regime, norm):
    check(*four_of(regime, batch=3), regime.of(norm), norm=norm)


@pytest.mark.parametrize("weight", [0.0, 0.25])
@every_regime
def test_a_weight_scales_loss_and_gradients(regime, weight):
    check(*four_of(regime), regime, weights=[weight])


@pytest.mark.parametrize("norm", ["frobenius", "mse"])
def test_pairs_of_every_regime_batch_and_dtype_in_one_call(regimes, norm):
    student, teacher = [], []
    for (name, regime), batch in zip(regimes.items(), (3, 2, 1, 1), strict=True):
        student.append(pair_of(regime, batch=batch))
        teacher.append(pair_of(regime, batch=batch, grad=name != "gram"))
    halves = regimes["one pass"]
    student.append(pair_of(halves, dtypes=(FP16, FP16)))
    teacher.append(pair_of(halves, dtypes=(FP16, BF16)))
    ready = regimes["tiles"]
    student.append(pair_of(ready))
    teacher.append(tensor(1, *ready.channels))
    every = [*regimes.values(), halves, ready]
    check(student, teacher, *every, weights=[1.0, 2.0, 0.5, 0.0, 3.0, 7.0], norm=norm)


@pytest.mark.parametrize("regime", ["one pass"], indirect=True)
def test_pairs_of_one_regime_share_a_launch_and_keep_their_own_losses(regime):
    student, teacher = ([pair_of(regime, batch=batch) for batch in (1, 2, 3)] for _ in range(2))
    check(student, teacher, *[regime] * 3, weights=[1.0, 10.0, 100.0])


@every_regime
def test_there_may_be_more_pairs_than_one_launch_takes(regime):
    count = MORE_THAN_ONE_LAUNCH_TAKES
    student = [pair_of(regime) for _ in range(count)]
    teacher = [pair_of(regime, grad=False) for _ in range(count)]
    check(student, teacher, *[regime] * count, weights=[2.0**i for i in range(count)])


@every_regime
def test_one_tensor_may_be_a_map_of_both_networks(regime):
    a, b = pair_of(regime)
    c, _ = pair_of(regime)
    loss = fsp.fsp_loss([(a, b)], [(c, b)])
    _, to_b, _, again = oracle([(a, b)], [(c, b)]).gradients
    bound = FUSED[regime.form, regime.dtype].gradient
    assert_near(torch.autograd.grad(loss, b)[0], to_b + again, 2 * bound, "rounded twice")


# --- numbers --------------------------------------------------------------------------------------


@every_regime
def test_the_gradient_survives_convergence(regime):
    c, d = pair_of(regime, grad=False)
    a, b = ((x + 1e-5 * torch.randn_like(x)).requires_grad_() for x in (c, d))
    loss = fsp.fsp_loss([(a, b)], [(c, d)])
    expected = oracle([(a, b)], [(c, d)])
    assert_near(loss, expected.loss, 1e-5, "fp32, the difference taken before anything is rounded")
    for gradient, wanted in zip(
        torch.autograd.grad(loss, (a, b)), expected.gradients, strict=False
    ):
        assert_near(gradient, wanted, 1e-5, "fp32, as above")


@pytest.mark.parametrize("norm", NORMS)
@every_regime
def test_equal_networks_have_no_loss_and_no_gradient(regime, norm):
    a, b = pair_of(regime)
    loss, *gradients = run([(a, b)], [(a.detach(), b.detach())], norm=norm)
    assert loss == 0
    assert not any(g.any() for g in gradients)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("regime", ["one pass", "tiles"], indirect=True)
def test_a_ready_matrix_of_equal_maps_leaves_no_loss_and_no_gradient(regime, norm):
    a, b = pair_of(regime, batch=2)
    matrix = fsp.fsp_matrix(a, b).detach()
    loss, *gradients = run([(a, b)], [matrix], norm=norm)
    assert loss == 0
    assert not any(g.any() for g in gradients)


@pytest.mark.parametrize("ratio", [1.0, 2.0**7, 2.0**20])
@every_regime
def test_the_error_of_a_residual_has_the_bound_of_the_difference_form(regime, ratio):
    c, d = pair_of(regime, grad=False)
    student, teacher = (c / ratio, d * ratio), (c, d)  # whose matrices are equal
    loss = fsp.fsp_loss([student], [teacher])
    terms = residual_terms(student, teacher).square().mean()
    eps = GRAM_EPS[FP32][0] if regime.form == "gram" else RESIDUAL_EPS[FP32][0] ** 2
    assert 0 <= loss <= eps * terms


@pytest.mark.parametrize("norm", ["mse", "column"])
@pytest.mark.parametrize("sizes", [(1e12, 1.0), (1.0, 1e12), (1e13, 1e13)], ids=str)
@every_regime
def test_nothing_overflows_that_the_naive_op_keeps_finite(regime, sizes, norm):
    pairs = [pair_of(regime, grad=False) for _ in range(2)]
    student, teacher = (
        tuple((s * x).requires_grad_() for s, x in zip(sizes, pair, strict=True)) for pair in pairs
    )
    naive = reference.fsp_loss([student], [teacher], norm=norm)
    loss, *gradients = run([student], [teacher], norm=norm)
    assert loss.isfinite() or not naive.isfinite()
    for gradient, by_naive in zip(
        gradients, torch.autograd.grad(naive, (*student, *teacher)), strict=True
    ):
        assert by_naive.isfinite().all()
        assert gradient.isfinite().all()


@pytest.mark.parametrize("dtype", [FP16, BF16], ids=str)
@pytest.mark.parametrize("norm", NORMS)
@every_matrix_regime
def test_equal_networks_of_half_precision_have_a_residual_of_rounding_errors(regime, norm, dtype):
    a, b = pair_of(regime, dtypes=(dtype, dtype))
    loss, *gradients = run([(a, b)], [(a.detach(), b.detach())], norm=norm)
    # The products of both networks cancel, but for what tensor cores cut off sums on the way, fewer
    # than 32 times: 2^-23 of the largest sum there has been, which is at most that of all sizes.
    error = 32 * 2.0**-23
    sizes = [x.detach().double().abs().requires_grad_() for x in (a, b)]
    nothing = torch.zeros(1, *regime.channels, dtype=torch.float64, device=DEVICE)
    most = reference.fsp_loss([tuple(sizes)], [nothing], norm=norm)
    if norm == "column":  # a loss of first degree, whose gradient is that of a direction
        assert loss <= error * most
        assert all(g.isfinite().all() for g in gradients)
    else:
        assert loss <= error**2 * most
        for gradient, largest in zip(gradients, torch.autograd.grad(most, sizes), strict=True):
            assert (gradient.double().abs() <= error * largest).all()


@pytest.mark.parametrize(
    ("position", "value", "weight"),
    [
        (0, float("nan"), 1.0),
        (1, float("inf"), 1.0),
        (2, -float("inf"), 1.0),
        (3, float("nan"), 1.0),
        (1, float("nan"), 0.0),
        (2, float("inf"), 0.0),
    ],
)
@every_regime
def test_what_is_not_finite_shows_and_stays_in_its_sample(regime, position, value, weight):
    student, teacher = four_of(regime, batch=2)
    clean = oracle(student, teacher, [weight])
    with torch.no_grad():
        flatten(student, teacher)[position][1, 2, 0, 1] = value
    expected = oracle(student, teacher, [weight])
    loss, *gradients = run(student, teacher, weights=[weight])
    assert not loss.isfinite()
    bound = FUSED[regime.form, regime.dtype].gradient
    for gradient, wanted, unharmed in zip(
        gradients, expected.gradients, clean.gradients, strict=True
    ):
        assert not gradient[~wanted.isfinite()].isfinite().any()
        assert_near(gradient[0], unharmed[0], bound, "another sample")


@every_regime
def test_results_are_the_same_bits_from_run_to_run(regime):
    student, teacher = four_of(regime)
    first, again = run(student, teacher), run(student, teacher)
    assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True))


@every_regime
def test_maps_may_change_after_the_call(regime):
    student, teacher = four_of(regime)
    expected = oracle(student, teacher)
    plan = fsp.explain(student, teacher)
    loss = fsp.fsp_loss(student, teacher)
    tensors = flatten(student, teacher)
    with torch.no_grad():
        for x in tensors:
            x.zero_()
    expected.check_fused(plan, loss, gradients_of(loss, tensors))


# --- the precision of fp32 ------------------------------------------------------------------------


@pytest.mark.usefixtures("tf32")
@pytest.mark.parametrize("norm", ["frobenius", "column"])
@every_regime
def test_tf32_is_close(regime, norm):
    student, teacher = four_of(regime)
    check(student, teacher, regime.of(norm), norm=norm)


@pytest.mark.usefixtures("tf32", "chip_with_tf32")
@every_regime
def test_tf32_rounds_what_kernels_compute(regime):
    student, teacher = four_of(regime)
    wanted = oracle(student, teacher).gradients[0]
    assert relative_error(run(student, teacher)[1], wanted) > 1e-5


@pytest.mark.usefixtures("tf32")
@every_regime
def test_tf32_takes_the_difference_before_it_rounds(regime):
    c, d = pair_of(regime, grad=False)
    a, b = ((x + 1e-4 * torch.randn_like(x)).requires_grad_() for x in (c, d))
    _, *gradients = run([(a, b)], [(c, d)])
    expected = oracle([(a, b)], [(c, d)])
    for gradient, wanted in zip(gradients, expected.gradients, strict=False):
        assert_near(gradient, wanted, 5e-3, "TF32 of a difference, not of what is subtracted")


# --- as PyTorch's own functions do ----------------------------------------------------------------


@every_regime
def test_gradients_are_on_the_device_of_their_maps(regime):
    assert {x.device.type for x in run(*four_of(regime))} == {DEVICE}


@pytest.mark.parametrize("regime", ["one pass"], indirect=True)
def test_a_call_is_traced_without_a_graph_break(regime):
    student, teacher = four_of(regime)
    compiled = torch.compile(fsp.fsp_loss, fullgraph=True, backend="aot_eager")
    tensors = flatten(student, teacher)
    loss = compiled(student, teacher)
    first, *gradients = run(student, teacher)
    assert torch.equal(loss, first)
    for x, y in zip(torch.autograd.grad(loss, tensors), gradients, strict=True):
        assert torch.equal(x, y)
