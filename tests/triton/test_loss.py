"""The loss by fused kernels against the definition: what holds however a pair is evaluated."""

from __future__ import annotations

import itertools

import pytest
import torch
from calls import (
    BF16,
    DEVICE,
    DTYPES,
    FP16,
    FP32,
    MATRIX,
    NORMS,
    REGIMES,
    check,
    four_of,
    gradients_of,
    pair_of,
    run,
    tensor,
)
from layouts import LAYOUTS
from tolerances import FUSED, assert_near, flatten, oracle, relative_error

import fsp_kernels as fsp
from fsp_kernels.backends.triton import loss as kernel_loss
from fsp_kernels.backends.triton import maps as kernel_maps

pytestmark = pytest.mark.usefixtures("small")
every_regime = pytest.mark.parametrize("regime", REGIMES.values(), ids=REGIMES)
every_fp32_regime = pytest.mark.parametrize(
    "regime", [r for r in REGIMES.values() if r.dtype == FP32], ids=lambda r: r.evaluation + r.form
)
every_matrix_regime = pytest.mark.parametrize("regime", MATRIX.values(), ids=MATRIX)


# --- the definition -----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("norm", NORMS)
@every_regime
def test_loss_and_gradients_are_those_of_the_definition(regime, norm, dtype):
    student, teacher = four_of(regime, dtypes=(dtype, dtype))
    check(student, teacher, regime.of(dtype, norm=norm), norm=norm)


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
    check(*pairs, regime.of(*student, *teacher))


@pytest.mark.parametrize("dtype", [FP16, BF16], ids=str)
@every_matrix_regime
def test_halves_are_multiplied_as_they_are_and_fp32_is_subtracted_first(regime, dtype):
    for dtypes, residual in (((dtype, dtype), "direct"), ((dtype, FP32), "difference")):
        student, teacher = four_of(regime, dtypes=dtypes)
        plan = fsp.explain(student, teacher, backend="triton")
        assert plan.pairs[0].residual == residual


@every_matrix_regime
@pytest.mark.parametrize("norm", ["frobenius", "column"])
@pytest.mark.parametrize("dtypes", [None, (BF16, FP16)], ids=str)
def test_the_teacher_may_have_maps_of_another_size(regime, norm, dtypes):
    size = (regime.size[0], regime.size[1] + 1)
    if regime.evaluation == "recomputed tiles":
        regime = regime._replace(channels=(33, 24))  # 12 positions pay with more channels
    student, teacher = (
        [pair_of(regime, batch=2)],
        [pair_of(regime, size=size, batch=2, dtypes=dtypes)],
    )
    plan = check(student, teacher, regime.of(regime.dtype, norm=norm), norm=norm)
    assert plan.pairs[0].residual == "direct"


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
    check([pair_of(regime, batch=2)], [matrix], regime.of(dtype, norm=norm), norm=norm)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@every_matrix_regime
def test_a_ready_matrix_may_have_its_own_dtype(regime, dtype):
    m, n = regime.channels
    check([pair_of(regime)], [tensor(1, m, n, dtype=dtype)], regime)


# --- gradients, those wanted ----------------------------------------------------------------------


@pytest.mark.parametrize("wanted", list(itertools.product((False, True), repeat=4)), ids=str)
@every_regime
def test_gradients_reach_those_inputs_that_require_them(regime, wanted):
    student, teacher = four_of(regime, grad=False)
    for x, needs in zip(flatten(student, teacher), wanted, strict=True):
        x.requires_grad_(needs)
    if not any(wanted) and regime.evaluation == "recomputed tiles":
        regime = regime._replace(evaluation="tiles")  # each is computed once, for its squares
    check(student, teacher, regime)


@pytest.mark.parametrize("norm", NORMS)
@every_regime
def test_without_gradients_only_the_loss_is_computed(regime, norm):
    student, teacher = four_of(regime)
    expected = oracle(student, teacher, norm=norm)
    with torch.no_grad():
        plan = fsp.explain(student, teacher, norm=norm, backend="triton")
        loss = fsp.fsp_loss(student, teacher, norm=norm, backend="triton")
    assert not loss.requires_grad
    assert plan.gradient_bytes == 0
    expected.check_fused(plan, loss, [None] * 4)


# --- how maps lie ---------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "contiguous"])
@pytest.mark.parametrize("name", ["one pass", "gram"])
def test_maps_may_lie_in_memory_in_any_way(name, layout):
    regime = REGIMES[name]
    check([pair_of(regime, layout=layout)], [pair_of(regime)], regime)


@pytest.mark.parametrize("layout", ["channels last", "every second channel", "cropped"])
@pytest.mark.parametrize("name", ["tiles", "tiles in parts", "recomputed tiles"])
def test_tiles_of_maps_may_lie_in_memory_in_any_way(name, layout):
    regime = REGIMES[name]
    check([pair_of(regime)], [pair_of(regime, layout=layout)], regime)


@pytest.mark.parametrize("dtype", [FP16, BF16], ids=str)
@pytest.mark.parametrize("layout", ["channels last", "cropped", "one element off alignment"])
@pytest.mark.parametrize("name", ["one pass", "gram"])
def test_half_precision_maps_may_lie_in_memory_in_any_way(name, layout, dtype):
    regime = REGIMES[name]
    check(*four_of(regime, layout=layout, dtypes=(dtype, dtype)), regime)


@pytest.mark.parametrize("size", [(18,), (3, 2, 3)], ids=["tokens", "volumes"])
@pytest.mark.parametrize("layout", ["contiguous", "channels last", "every second position"])
@pytest.mark.parametrize("name", ["one pass", "tiles"])
def test_maps_may_have_one_to_three_spatial_axes(name, layout, size):
    regime = REGIMES[name]
    check(*four_of(regime, size=size, layout=layout), regime)


@every_regime
def test_offsets_of_64_bits_find_the_same_elements(regime, monkeypatch):
    monkeypatch.setattr(kernel_maps, "INT32_LIMIT", 3)
    student, teacher = four_of(regime, layout="cropped")
    check(student, teacher, regime)


# --- batches, pairs, weights ----------------------------------------------------------------------


@pytest.mark.parametrize("norm", ["mse", "column"])
@every_regime
def test_a_loss_is_the_mean_over_a_batch(regime, norm):
    check(*four_of(regime, batch=3), regime.of(regime.dtype, norm=norm), norm=norm)


@pytest.mark.parametrize("weight", [0.0, 0.25])
@every_regime
def test_a_weight_scales_loss_and_gradients(regime, weight):
    check(*four_of(regime), regime, weights=[weight])


@pytest.mark.parametrize("norm", ["frobenius", "mse"])
def test_pairs_of_every_regime_batch_and_dtype_in_one_call(norm):
    student, teacher = [], []
    for (name, regime), batch in zip(REGIMES.items(), (3, 2, 1, 1, 1), strict=True):
        student.append(pair_of(regime, batch=batch))
        teacher.append(pair_of(regime, batch=batch, grad=name != "gram"))
    halves = REGIMES["one pass"]
    student.append(pair_of(halves, dtypes=(FP16, FP16)))
    teacher.append(pair_of(halves, dtypes=(FP16, BF16)))
    ready = REGIMES["tiles"]
    student.append(pair_of(ready))
    teacher.append(tensor(1, *ready.channels))
    regimes = [*REGIMES.values(), halves, ready]
    check(student, teacher, *regimes, weights=[1.0, 2.0, 0.5, 0.0, 3.0, 7.0, 0.25], norm=norm)


def test_pairs_of_one_regime_share_a_launch_and_keep_their_own_losses():
    student = [pair_of(REGIMES["one pass"], batch=batch) for batch in (1, 2, 3)]
    teacher = [pair_of(REGIMES["one pass"], batch=batch) for batch in (1, 2, 3)]
    check(student, teacher, *[REGIMES["one pass"]] * 3, weights=[1.0, 10.0, 100.0])


@pytest.mark.parametrize("name", ["one pass", "gram", "recomputed tiles"])
def test_there_may_be_more_pairs_than_one_launch_takes(name, monkeypatch):
    monkeypatch.setattr(kernel_loss, "_MOST_PAIRS", 2)
    regime = REGIMES[name]
    student, teacher = ([pair_of(regime) for _ in range(3)] for _ in range(2))
    check(student, teacher, *[regime] * 3, weights=[1.0, 10.0, 100.0])


@every_regime
def test_one_tensor_may_be_a_map_of_both_networks(regime):
    a, b = pair_of(regime)
    c, _ = pair_of(regime)
    loss = fsp.fsp_loss([(a, b)], [(c, b)], backend="triton")
    _, to_b, _, again = oracle([(a, b)], [(c, b)]).gradients
    bound = FUSED[regime.form, regime.dtype].gradient
    assert_near(torch.autograd.grad(loss, b)[0], to_b + again, 2 * bound, "rounded twice")


# --- numbers --------------------------------------------------------------------------------------


@every_fp32_regime
def test_the_gradient_survives_convergence(regime):
    c, d = pair_of(regime, grad=False)
    a, b = ((x + 1e-5 * torch.randn_like(x)).requires_grad_() for x in (c, d))
    loss = fsp.fsp_loss([(a, b)], [(c, d)], backend="triton")
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


@pytest.mark.parametrize("dtype", [FP16, BF16], ids=str)
@pytest.mark.parametrize("norm", NORMS)
@every_matrix_regime
def test_equal_networks_of_half_precision_have_no_loss(regime, norm, dtype):
    a, b = pair_of(regime, dtypes=(dtype, dtype))
    loss, *gradients = run([(a, b)], [(a.detach(), b.detach())], norm=norm)
    assert loss == 0
    assert not any(g.any() for g in gradients)


@pytest.mark.parametrize(
    ("position", "value"),
    [(0, float("nan")), (1, float("inf")), (2, -float("inf")), (3, float("nan"))],
)
@every_regime
def test_what_is_not_finite_shows_and_stays_in_its_sample(regime, position, value):
    student, teacher = four_of(regime, batch=2)
    clean = oracle(student, teacher)
    with torch.no_grad():
        flatten(student, teacher)[position][1, 2, 0, 1] = value
    expected = oracle(student, teacher)
    loss, *gradients = run(student, teacher)
    assert not loss.isfinite()
    bound = FUSED[regime.form, regime.dtype].gradient
    for gradient, wanted, unharmed in zip(
        gradients, expected.gradients, clean.gradients, strict=True
    ):
        assert not gradient[~wanted.isfinite()].isfinite().any()
        assert_near(gradient[0], unharmed[0], bound, "another sample")


@every_regime
def test_a_zero_weight_does_not_hide_a_nan(regime):
    student, teacher = four_of(regime)
    with torch.no_grad():
        student[0][0][0, 1] = float("nan")
    assert run(student, teacher, weights=[0.0])[0].isnan()


@every_regime
def test_results_are_the_same_bits_from_run_to_run(regime):
    student, teacher = four_of(regime)
    first, again = run(student, teacher), run(student, teacher)
    assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True))


@every_regime
def test_maps_may_change_after_the_call(regime):
    student, teacher = four_of(regime)
    expected = oracle(student, teacher)
    plan = fsp.explain(student, teacher, backend="triton")
    loss = fsp.fsp_loss(student, teacher, backend="triton")
    tensors = flatten(student, teacher)
    with torch.no_grad():
        for x in tensors:
            x.zero_()
    expected.check_fused(plan, loss, gradients_of(loss, tensors))


# --- the precision of fp32 ------------------------------------------------------------------------


@pytest.mark.usefixtures("tf32")
@pytest.mark.parametrize("norm", ["frobenius", "column"])
@every_fp32_regime
def test_tf32_is_close(regime, norm):
    student, teacher = four_of(regime)
    check(student, teacher, regime.of(FP32, norm=norm), norm=norm)


@pytest.mark.usefixtures("tf32")
@every_fp32_regime
def test_tf32_rounds_what_kernels_compute(regime):
    student, teacher = four_of(regime)
    wanted = oracle(student, teacher).gradients[0]
    assert relative_error(run(student, teacher)[1], wanted) > 1e-5


@pytest.mark.usefixtures("tf32")
@every_fp32_regime
def test_tf32_takes_the_difference_before_it_rounds(regime):
    c, d = pair_of(regime, grad=False)
    a, b = ((x + 1e-4 * torch.randn_like(x)).requires_grad_() for x in (c, d))
    _, *gradients = run([(a, b)], [(c, d)])
    expected = oracle([(a, b)], [(c, d)])
    for gradient, wanted in zip(gradients, expected.gradients, strict=False):
        assert_near(gradient, wanted, 5e-3, "TF32 of a difference, not of what is subtracted")


def test_a_change_of_precision_reaches_a_signature_seen_before(programs):
    student, teacher = four_of(REGIMES["one pass"])
    first = run(student, teacher)
    before = torch.backends.cuda.matmul.fp32_precision
    try:
        torch.backends.cuda.matmul.fp32_precision = "tf32"
        other = run(student, teacher)
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
    again = run(student, teacher)
    assert not torch.equal(first[1], other[1])
    assert torch.equal(first[1], again[1])
    assert len(programs) == 2


def test_gradients_are_on_the_device_of_their_maps():
    student, teacher = four_of(REGIMES["one pass"])
    assert {x.device.type for x in run(student, teacher)} == {DEVICE}
