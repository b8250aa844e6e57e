"""Products of bf16 in csrc/cpu/, and the kernels for each instruction set of the processor."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import pytest
import torch
from layouts import LAYOUTS
from tolerances import RESIDUAL_EPS, oracle, relative_error, residual_terms

import fsp_kernels as fsp
from fsp_kernels.backends import compiled, cpu, registered_backends
from fsp_kernels.plan import CPU_OPERAND_BYTES, CPU_PANEL

BF16 = torch.bfloat16
BACKEND = registered_backends()["cpu"]
pytestmark = pytest.mark.skipif(
    BACKEND.why_unavailable() is not None, reason=str(BACKEND.why_unavailable())
)
INSTRUCTION_SETS = (
    () if BACKEND.why_unavailable() else compiled.compiled_module("cpu").instruction_sets
)
multiplies_bf16 = pytest.mark.skipif(
    "avx512_bf16" not in INSTRUCTION_SETS, reason="this processor has no products of bf16"
)


def randn(*shape, seed, dtype=BF16, layout="contiguous"):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return LAYOUTS[layout](x.to(dtype)).requires_grad_()


def pair_of(m, n, size, batch=2, teacher=None, **options):
    sizes = size, size, teacher or size, teacher or size
    channels = m, n, m, n
    return [
        randn(batch, c, *s, seed=i, **options)
        for i, (c, s) in enumerate(zip(channels, sizes, strict=True))
    ]


def evaluate(a, b, c, d, **options):
    """The loss, the gradients of the distinct maps, and the plan of the pair."""
    pairs = [(a, b)], [(c, d)]
    plan = fsp.explain(*pairs, backend="cpu", channel_dim=1, **options)
    loss = fsp.fsp_loss(*pairs, backend="cpu", channel_dim=1, **options)
    leaves = [x for x in dict.fromkeys((a, b, c, d)) if x.requires_grad]
    return loss.detach(), torch.autograd.grad(loss, leaves), plan


def check(a, b, c, d, **options):
    loss, gradients, plan = evaluate(a, b, c, d, **options)
    exact = oracle([(a, b)], [(c, d)], **options)
    exact.check(loss, gradients, plan)
    if plan.pairs[0].bf16_products:
        exact.check_fused(plan, loss, gradients)
    return plan.pairs[0]


# 1, and around the rows and columns of tiles, 12, 16 and 32; 1024 positions are read at a time.
@multiplies_bf16
@pytest.mark.parametrize(
    ("m", "n"), [(1, 1), (5, 17), (12, 16), (13, 33), (16, 5), (48, 64), (130, 70)]
)
@pytest.mark.parametrize("positions", [1, 2, 7, 8, 49, 515, 1027, 2100])
@pytest.mark.parametrize("layout", ["contiguous", "channels last"])
def test_sizes_around_those_of_tiles(m, n, positions, layout):
    pair = check(*pair_of(m, n, (positions, 1), layout=layout))
    assert pair.bf16_products
    assert pair.form == "gram" or pair.residual == "direct"


@multiplies_bf16
@pytest.mark.parametrize("positions", [1, 2, 7, 16, 33, 49])
@pytest.mark.parametrize("layout", ["contiguous", "channels last"])
@pytest.mark.parametrize(("m", "n"), [(300, 280), (301, 299)])
def test_gram_blocks_of_sizes_around_those_of_tiles(positions, layout, m, n):
    pair = check(*pair_of(m, n, (positions, 1), layout=layout))
    assert (pair.form, pair.bf16_products) == ("gram", True)


@multiplies_bf16
@pytest.mark.parametrize("layouts", list(itertools.product(LAYOUTS, repeat=2)), ids="-".join)
@pytest.mark.parametrize(
    ("m", "n", "teacher"),
    [(9, 20, None), (9, 20, (5, 7)), (90, 70, None)],
    ids=["direct", "apart", "gram"],
)
def test_both_networks_may_have_any_layout(layouts, m, n, teacher):
    size = (3, 3) if m == 90 else (6, 7)
    students, teachers = (pair_of(m, n, size, teacher=teacher, layout=x) for x in layouts)
    check(*students[:2], *teachers[2:])


@multiplies_bf16
@pytest.mark.parametrize("norm", ["frobenius", "mse", "column"])
@pytest.mark.parametrize("channels", [5, 16, 33, 70])
@pytest.mark.parametrize("size", [(3, 3), (9, 11), (40, 30)], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels last", "every second position"])
def test_a_pair_may_be_a_map_with_itself(norm, channels, size, layout):
    a, c = (randn(2, channels, *size, seed=i, layout=layout) for i in range(2))
    loss, gradients, plan = evaluate(a, a, c, c, norm=norm)
    exact = oracle([(a, a)], [(c, c)], norm=norm)
    assert relative_error(loss, exact.loss) < 2.0**-6
    for found, k in zip(gradients, (0, 2), strict=True):
        assert relative_error(found, exact.gradients[k] + exact.gradients[k + 1]) < 1e-2
    pair = plan.pairs[0]
    assert pair.bf16_products
    assert pair.symmetric
    assert pair.residual == "difference"  # one product, not two


# From maps that have nothing in common to a thousandth of the elements an ulp apart.
@multiplies_bf16
@pytest.mark.parametrize("share", [1, 1e-1, 1e-3])
@pytest.mark.parametrize("noise", [1, 1e-2, 4e-3])
@pytest.mark.parametrize(
    ("m", "n", "size"), [(64, 64, (32, 32)), (32, 48, (128, 128)), (128, 128, (7, 7))], ids=str
)
def test_gradients_stay_right_near_convergence(m, n, size, noise, share):
    def student_of(x, seed):
        generator = torch.Generator().manual_seed(seed)
        near = x.float() * (1 + noise * torch.randn(x.shape, generator=generator))
        moved = torch.rand(x.shape, generator=generator) < share
        return near.to(BF16).where(moved, x).requires_grad_()

    c, d = (x.detach().relu() for x in pair_of(m, n, size)[2:])
    a, b = student_of(c, 2), student_of(d, 3)
    assert not (torch.equal(a, c) and torch.equal(b, d))
    _, gradients, _ = evaluate(a, b, c, d)
    exact = oracle([(a, b)], [(c, d)])
    for found, wanted in zip(gradients, exact.gradients, strict=False):
        assert relative_error(found, wanted) < 5e-3


@multiplies_bf16
@pytest.mark.parametrize("ratio", [1.0, 2.0**3, 1.7])
def test_a_loss_in_gram_form_that_cancels_has_its_bound(ratio):
    c, d = (x.detach() for x in pair_of(96, 80, (3, 3))[2:])
    a, b = (c.float() / ratio).to(BF16), (d.float() * ratio).to(BF16)
    loss, _, plan = evaluate(a.requires_grad_(), b, c, d)
    assert plan.pairs[0].form == "gram"
    exact = oracle([(a, b)], [(c, d)]).loss
    error = RESIDUAL_EPS[BF16][0] * residual_terms((a, b), (c, d)).norm() / 2**0.5
    assert loss >= 0
    assert abs(loss - exact) <= 2 * exact.sqrt() * error + error**2


@multiplies_bf16
def test_a_nan_and_infinity_stay_in_their_sample():
    for value in (float("nan"), float("inf")):
        for m, size in ((5, (6, 6)), (96, (3, 3))):
            a, b, c, d = pair_of(m, m, size)
            with torch.no_grad():
                b[0, 0, 0, 0] = value
            loss, gradients, _ = evaluate(a, b, c, d)
            assert not loss.isfinite()
            assert not gradients[0][0].isfinite().any()
            assert all(g[1].isfinite().all() for g in gradients)


@multiplies_bf16
def test_half_as_many_samples_as_threads_are_enough(monkeypatch):
    left = []
    monkeypatch.setattr(cpu, "pair_loss", lambda *x: left.append(x) or torch.zeros(()))
    monkeypatch.setattr(BACKEND, "prepared", {})
    a, b, c, d = pair_of(5, 4, (6, 6), batch=3)
    before = torch.get_num_threads()
    try:
        for threads, expected in ((6, 0), (7, 1)):
            torch.set_num_threads(threads)
            fsp.fsp_loss([(a, b)], [(c, d)], backend="cpu")
            assert len(left) == expected
    finally:
        torch.set_num_threads(before)


def test_other_dtypes_are_widened():
    for dtypes in (
        (torch.float32,) * 4,
        (torch.float16,) * 4,
        (BF16, BF16, torch.float32, torch.float32),
        (BF16, BF16, torch.float16, torch.float16),
    ):
        pair = zip(pair_of(5, 4, (6, 6)), dtypes, strict=True)
        maps = [x.detach().to(dtype) for x, dtype in pair]
        plan = fsp.explain([maps[:2]], [maps[2:]], backend="cpu")
        assert not plan.pairs[0].bf16_products
        assert plan.pairs[0].residual == "difference"


@multiplies_bf16
@pytest.mark.parametrize("pool", ["max", "avg"])
def test_averages_are_not_rounded_to_be_multiplied(pool):
    a, _, c, _ = pair_of(20, 20, (8, 8))
    _, b, _, d = pair_of(20, 20, (4, 4))
    assert check(a, b, c, d, pool=pool).bf16_products == (pool == "max")


@multiplies_bf16
@pytest.mark.parametrize(("pool", "rounded"), [("max", 2), ("avg", 0)])
def test_the_scratch_of_a_plan_holds_pooled_maps(pool, rounded):
    a, _, c, _ = pair_of(13, 9, (8, 8))
    _, b, _, d = pair_of(13, 9, (4, 4))
    (pair,) = fsp.explain([(a, b)], [(c, d)], backend="cpu", pool=pool).pairs
    pooled, panels = 2 * 13 * 4 * 4, 2 * 2 * CPU_PANEL * 8 * 8  # of both networks
    in_fp32 = 13 * 9 + 3 * pooled + panels  # 3: the map, its gradient, the places of maxima
    assert pair.scratch_bytes == CPU_OPERAND_BYTES + 4 * in_fp32 + rounded * pooled


@pytest.fixture(params=INSTRUCTION_SETS)
def instructions(request, monkeypatch, planner):
    """An instruction set that the kernels use, although the processor may have a better one."""
    module = compiled.compiled_module("cpu")
    limited = SimpleNamespace(**{**vars(module), "instruction_sets": [request.param]})
    monkeypatch.setattr(cpu, "compiled_module", lambda _: limited)
    monkeypatch.setattr(cpu, "_multiplies_bf16", cpu._multiplies_bf16.__wrapped__)  # not cached
    monkeypatch.setattr(BACKEND, "prepared", {})
    planner()  # forget plans, also after the test
    return request.param


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, BF16], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels last", "every second position"])
def test_every_instruction_set_computes_the_same(instructions, dtype, layout):
    for m, n, size in ((5, 17, (3, 1)), (30, 33, (6, 6)), (48, 70, (20, 28)), (90, 70, (3, 3))):
        for norm in ("mse", "column"):
            maps = pair_of(m, n, size, dtype=dtype, layout=layout)
            pair = check(*maps, norm=norm)
            assert pair.bf16_products == (dtype == BF16 and instructions == "avx512_bf16")
        for pool in ("max", "avg"):
            small = pair_of(m, n, [max(1, s // 2) for s in size], dtype=dtype, layout=layout)
            check(maps[0], small[1], maps[2], small[3], pool=pool)
