"""Products of bf16 on a CPU by the torch backend. PyTorch has them on any processor, if slow."""

from __future__ import annotations

import pytest
import torch
from layouts import LAYOUTS
from products import Products
from tolerances import oracle, relative_error

import fsp_kernels as fsp
from fsp_kernels.backends import devices, torch_backend
from fsp_kernels.backends.torch_backend import TorchBackend

BF16 = torch.bfloat16


@pytest.fixture
def multiplies_bf16(monkeypatch, planner):
    """Choose what PyTorch says of the processor."""

    def choose(answer):
        monkeypatch.setattr(torch_backend, "multiplies_bf16", lambda: answer)
        planner()  # forget plans, also after the test

    choose(True)
    return choose


def randn(*shape, seed=0, dtype=BF16, layout="contiguous"):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return LAYOUTS[layout](x.to(dtype)).requires_grad_()


def maps_of(m=20, n=12, sizes=((6, 5),) * 4, batch=5, **options):
    channels = m, n, m, n
    return [
        randn(batch, c, *size, seed=i, **options)
        for i, (c, size) in enumerate(zip(channels, sizes, strict=True))
    ]


def evaluate(maps, **options):
    """The loss, the gradients of all maps and the plan."""
    student, teacher = [maps[:2]], [maps[2:]]
    plan = fsp.explain(student, teacher, backend="torch", channel_dim=1, **options)
    loss = fsp.fsp_loss(student, teacher, backend="torch", channel_dim=1, **options)
    return loss.detach(), torch.autograd.grad(loss, maps), plan


def check(maps, **options):
    loss, gradients, plan = evaluate(maps, **options)
    assert loss.dtype == torch.float32
    oracle([maps[:2]], [maps[2:]], **options).check(loss, gradients, plan)
    return plan.pairs[0]


@pytest.mark.usefixtures("multiplies_bf16")
@pytest.mark.parametrize("layout", list(LAYOUTS))
@pytest.mark.parametrize("norm", ["frobenius", "mse", "column"])
def test_any_layout_and_norm(layout, norm):
    assert check(maps_of(layout=layout), norm=norm).bf16_products


@pytest.mark.usefixtures("multiplies_bf16")
@pytest.mark.parametrize("size", [(1, 1), (7, 3), (32, 32)], ids=str)
@pytest.mark.parametrize(("m", "n"), [(1, 1), (3, 70), (64, 64)])
def test_any_size(m, n, size):
    pair = check(maps_of(m, n, (size,) * 4))
    assert pair.bf16_products == (pair.form == "matrix")


@pytest.mark.usefixtures("multiplies_bf16")
@pytest.mark.parametrize("noise", [1, 1e-1, 1e-2, 1e-3])
def test_gradients_stay_right_near_convergence(noise):
    c, d = (x.detach().relu() for x in maps_of(64, 48, ((16, 16),) * 4)[:2])
    a, b = (
        (x.float() * (1 + noise * randn(*x.shape, seed=7, dtype=torch.float32))).detach().to(BF16)
        for x in (c, d)
    )
    maps = [x.requires_grad_() for x in (a, b, c, d)]
    loss, gradients, plan = evaluate(maps)
    exact = oracle([maps[:2]], [maps[2:]])
    assert plan.pairs[0].bf16_products
    assert relative_error(loss, exact.loss) < 1e-3
    for found, wanted in zip(gradients, exact.gradients, strict=True):
        assert relative_error(found, wanted) < 5e-3


@pytest.mark.usefixtures("multiplies_bf16")
def test_chunks_with_masks():
    maps = maps_of(batch=9)
    mask = torch.rand(9, 6, 5, generator=torch.Generator().manual_seed(0)) < 0.7
    pair = check(maps, student_mask=mask, teacher_mask=mask)
    assert pair.bf16_products


@pytest.mark.usefixtures("multiplies_bf16")
def test_symmetric_pairs():
    a, _, c, _ = maps_of()
    plan = fsp.explain([(a, a)], [(c, c)], backend="torch")
    loss = fsp.fsp_loss([(a, a)], [(c, c)], backend="torch")
    exact = oracle([(a, a)], [(c, c)])
    assert (plan.pairs[0].symmetric, plan.pairs[0].bf16_products) == (True, True)
    for found, k in zip(torch.autograd.grad(loss, (a, c)), (0, 2), strict=True):
        assert relative_error(found, exact.gradients[k] + exact.gradients[k + 1]) < 1e-2


@pytest.mark.usefixtures("multiplies_bf16")
@pytest.mark.parametrize(
    ("sizes", "options"),
    [
        (((6, 5), (6, 5), (4, 4), (4, 4)), {}),  # the networks' positions differ
        (((6, 6), (3, 3), (6, 6), (3, 3)), {"pool": "avg"}),  # averages are fp32
    ],
    ids=["positions differ", "averages"],
)
def test_what_would_be_rounded_too_often_is_widened(sizes, options):
    assert not check(maps_of(sizes=sizes), **options).bf16_products


@pytest.mark.usefixtures("multiplies_bf16")
def test_maxima_are_multiplied_as_they_are():
    assert check(maps_of(sizes=((6, 6), (3, 3), (6, 6), (3, 3)))).bf16_products


@pytest.mark.usefixtures("multiplies_bf16")
def test_other_dtypes_and_ready_matrices_are_widened():
    for dtypes in ((torch.float16,) * 4, (BF16, BF16, torch.float32, torch.float32)):
        maps = [x.detach().to(dtype) for x, dtype in zip(maps_of(), dtypes, strict=True)]
        plan = fsp.explain([maps[:2]], [maps[2:]], backend="torch")
        assert not plan.pairs[0].bf16_products
    a, b, c, d = maps_of()
    matrix = fsp.fsp_matrix(c, d).detach()
    assert not fsp.explain([(a, b)], [matrix], backend="torch").pairs[0].bf16_products


@pytest.mark.usefixtures("multiplies_bf16")
@pytest.mark.parametrize("symmetric", [False, True])
def test_large_differences_are_taken_in_blocks_and_added_in_fp32(planner, symmetric):
    planner(DIFFERENCES_WHOLE=0, DIFFERENCES_BLOCK=2 * 4 * (20 + 20) * 100)
    a, b, c, d = (x.detach() for x in maps_of(20, 20, sizes=((100, 100),) * 4, batch=4))
    maps = [a, a, c, c] if symmetric else [a, b, c, d]
    plan = fsp.explain([maps[:2]], [maps[2:]], backend="torch")
    with Products() as products:
        loss, _ = TorchBackend().loss(maps, plan, (1.0,))
    assert plan.pairs[0].bf16_products
    assert products.count == 100 * (1 if symmetric else 2)
    held = 2 * 100 * (20 + 20) + (2 + 4) * 20 * 20  # the differences, a block's product, their sum
    assert plan.workspace_bytes == 4 * held
    exact = oracle([maps[:2]], [maps[2:]])
    assert relative_error(loss, exact.loss) < 2e-4  # 1e-3 if each block were rounded in the sum


def test_a_processor_without_them_widens(multiplies_bf16):
    multiplies_bf16(False)
    assert not check(maps_of()).bf16_products


@pytest.mark.parametrize("has_them", [True, False])
def test_pytorch_says_what_the_processor_has(monkeypatch, has_them):
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    if hasattr(torch.cpu, "get_capabilities"):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": has_them})
    else:
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: has_them)
    devices.multiplies_bf16.cache_clear()
    try:
        assert devices.multiplies_bf16() is has_them
    finally:
        devices.multiplies_bf16.cache_clear()
