"""Ways of the Triton kernels that no call small enough for a test would take by itself."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from calls import BF16, DEVICE, DTYPES, FP32, ROADS, Regime, check, four_of, scaling_of, tensor
from tolerances import assert_near

import fsp_kernels as fsp
from fsp_kernels import reference
from fsp_kernels.backends import get_backend
from fsp_kernels.backends.devices import raw_stream
from fsp_kernels.backends.triton import configurations, elementwise, maps, product
from fsp_kernels.backends.triton.entries import PlannedPair
from fsp_kernels.backends.triton.launch import Launch
from fsp_kernels.plan import GPU_PROGRAMS

every_regime = pytest.mark.parametrize("regime", ROADS, indirect=True)


# --- gradients by BLAS ----------------------------------------------------------------------------


@pytest.mark.parametrize("wanted", [(0, 1), (0, 1, 2, 3), (1,), (2,)], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels last"])
@pytest.mark.parametrize("norm", ["frobenius", "column"])
def test_blas_writes_the_same_gradients(small, layout, norm, wanted):
    regime = Regime((32, 24), (4, 8), "tiles", dtype=BF16)
    small(GPU_BLAS_INTENSITY=0, CHUNK_BYTES={"cuda": 1 << 12})
    student, teacher = four_of(regime, batch=3, layout=layout, grad=False)
    for i in wanted:
        (*student[0], *teacher[0])[i].requires_grad_()
    plan = check(student, teacher, regime, norm=norm)
    assert len(plan.launch_groups) > 1  # chunks of samples
    assert plan.launches.count("bmm") == len(plan.launch_groups) * len(wanted)


# --- offsets of 64 bits ---------------------------------------------------------------------------


@pytest.fixture
def _offsets_of_64_bits(monkeypatch, small):
    monkeypatch.setattr(maps, "INT32_LIMIT", 3)
    monkeypatch.setattr(product, "INT32_LIMIT", 3)
    small()


@pytest.mark.usefixtures("_offsets_of_64_bits")
@every_regime
def test_offsets_of_64_bits_find_the_same_elements(regime):
    check(*four_of(regime, layout="cropped"), regime)


@pytest.mark.usefixtures("_offsets_of_64_bits")
def test_products_with_offsets_of_64_bits_find_the_same_elements():
    x, y = tensor(2, 17, 18), tensor(2, 5, 18, layout="channels last")
    exact = [t.detach().double().requires_grad_() for t in (x, y)]
    found, wanted = fsp.fsp_matrix(x, y, channel_dim=1), reference.fsp_matrix(*exact)
    assert_near(found, wanted, 1e-5, "fp32")
    gradients = torch.autograd.grad(found.square().sum(), (x, y))
    expected = torch.autograd.grad(wanted.square().sum(), exact)
    for gradient, w in zip(gradients, expected, strict=True):
        assert_near(gradient, w, 1e-5, "fp32")


# --- chips with few registers ---------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("regime", "kernel"), [("one pass", "one_pass"), ("gram", "gram")], indirect=["regime"]
)
def test_a_chip_without_the_registers_for_one_pass_goes_by_tiles(
    small, regime, kernel, dtype, monkeypatch
):
    launched = set()
    start = Launch.__call__

    def remember(self, *arguments):
        launched.add(self.kernel.__name__)
        return start(self, *arguments)

    monkeypatch.setattr(Launch, "__call__", remember)
    student, teacher = four_of(regime, batch=2, dtypes=(dtype, dtype))
    with configurations.using([r for r in configurations.rows() if r.kernel != kernel]):
        small()
        check(student, teacher, regime._replace(evaluation="tiles", form="matrix", parts=1))
    assert "fsp_residual" in launched
    assert "fsp_" + kernel not in launched


# --- sums and scalings ----------------------------------------------------------------------------


def scaled(gradients, factor, in_place, dtypes=None):
    return get_backend("triton").scale(
        gradients, scaling_of(gradients, dtypes), torch.tensor(factor, device=DEVICE), in_place
    )


def test_more_elements_than_programs_times_block(monkeypatch):
    monkeypatch.setattr(elementwise, "_PROGRAMS", 2)
    elementwise._scale_launches.cache_clear()
    gradient = tensor(5 * elementwise.BLOCK + 3, grad=False)
    (found,) = scaled([gradient], 3.0, in_place=False)
    elementwise._scale_launches.cache_clear()
    assert torch.equal(found, 3 * gradient)


def test_each_launch_sees_tensors_of_the_same_dtypes_every_time(monkeypatch):
    # What it compiled for the first is what it launches for the others.
    seen: dict[int, set] = {}
    call = Launch.__call__

    def record(self, stream, tensors, *scalars):
        seen.setdefault(id(self), set()).add(tuple(x.dtype for x in tensors))
        return call(self, stream, tensors, *scalars)

    monkeypatch.setattr(Launch, "__call__", record)
    kinds = [FP32] * elementwise._MOST_TENSORS + [BF16] * elementwise._MOST_TENSORS
    scaled([tensor(4, dtype=dtype, grad=False) for dtype in kinds], 3.0, in_place=True)
    assert len(seen) == 2
    for held in (FP32, BF16):
        scaled([tensor(4, dtype=held, grad=False)], 3.0, in_place=True, dtypes=[BF16])
    assert len(seen) == 4
    assert all(len(dtypes) == 1 for dtypes in seen.values())


def sum_of(partials):
    result = partials.new_empty(())
    ranges = ((0, len(partials)),)
    Launch(elementwise.fsp_finish, 1, 8, ranges, 0, 1, elementwise.BLOCK)(
        raw_stream(partials.device), (partials, result)
    )
    return result.double()


@pytest.mark.parametrize("count", [1, 1023, 1024, 1025, 5000])
def test_the_sum_takes_every_partial_loss(count):
    partials = 1 + torch.randn(count, dtype=torch.float64).to(DEVICE, FP32) / 8
    exact = partials.double().sum()
    assert (sum_of(partials) - exact).abs() <= 1e-6 * exact


@pytest.mark.parametrize(
    ("partials", "loss"),
    [([1.0, -1.5], 0.0), ([-2.0], 0.0), ([0.5, float("nan")], None), ([float("-inf")], None)],
    ids=str,
)
def test_a_sum_below_zero_is_zero_and_what_is_not_finite_nan(partials, loss):
    found = sum_of(torch.tensor(partials, device=DEVICE))
    assert found.isnan() if loss is None else found == loss


# --- chunks of samples ---------------------------------------------------------------------------


def test_a_smaller_last_chunk_has_the_tiles_of_the_others():
    """Places of partial losses are reserved for as many tiles of each sample."""
    pair = [tensor(2, 512, 4, 32, dtype=BF16, grad=False) for _ in range(2)]
    [plan] = fsp.explain([pair], [pair], norm="column", backend="triton").pairs
    chunk = configurations.configuration_of("residual", "half", "sm_90", "aligned", 512)
    tiles = (512 // chunk.block_m) * (512 // chunk.block_n)
    samples = GPU_PROGRAMS // tiles  # as many as need no smaller tiles
    plan = dataclasses.replace(plan, batch=samples + 1, samples=samples, parts=1)
    planned = PlannedPair(0, plan, (*pair, *pair, *[None] * 4), "sm_90", "tf32x3")
    whole, last = (planned.residual_entry(number)[0] for number in (0, 1))
    assert (whole.samples, last.samples) == (samples, 1)
    assert last.block_n.value == whole.block_n.value == chunk.block_n > chunk.block_m
