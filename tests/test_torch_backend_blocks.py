"""Large differences that have no gradient to be held in: the torch backend takes them in blocks."""

from __future__ import annotations

import pytest
import torch
from products import Products
from tolerances import TOLERANCES, assert_near

import fsp_kernels as fsp
from benchmarks.memory import profiled_peak
from fsp_kernels import plan as planning
from fsp_kernels import reference
from fsp_kernels.backends.torch_backend import TorchBackend

POSITIONS = 47
COLUMN = 4 * 3 * (5 + 7)  # bytes of one position of both differences


@pytest.fixture
def blocks_of_ten(planner):
    planner(DIFFERENCES_WHOLE=20 * COLUMN, DIFFERENCES_BLOCK=10 * COLUMN)


def maps_of(layout: str, positions: int = POSITIONS) -> list[torch.Tensor]:
    maps = [torch.randn(3, c, positions) for c in (5, 7, 5, 7)]
    return [x.mT.contiguous().mT for x in maps] if layout == "tokens" else maps


def run(maps, norm="frobenius"):
    """The loss, and what was done for it."""
    pairs, options = ([tuple(maps[:2])], [tuple(maps[2:])]), {"norm": norm, "backend": "torch"}
    plan = fsp.explain(*pairs, channel_dim=1, **options)
    with torch.no_grad(), Products() as products:
        loss, gradients = TorchBackend().loss(maps, plan, (1.0,))
    return loss, gradients, plan, products


@pytest.mark.usefixtures("blocks_of_ten")
@pytest.mark.parametrize("layout", ["contiguous", "tokens"])
@pytest.mark.parametrize("norm", ["frobenius", "column"])
def test_the_loss_is_the_same(layout, norm):
    maps = maps_of(layout)
    loss, _, _, products = run(maps, norm)
    assert products.count == 2 * 5  # 47 positions, ten at a time
    a, b, c, d = (x.double() for x in maps)
    exact = reference.fsp_loss([(a, b)], [(c, d)], norm=norm)
    assert_near(loss, exact, TOLERANCES[torch.float32].rtol, "fp32")


@pytest.mark.usefixtures("blocks_of_ten")
def test_a_block_is_all_that_is_held_and_the_plan_says_so():
    _, _, plan, products = run(maps_of("contiguous"))
    assert products.largest <= 10 * COLUMN
    assert plan.workspace_bytes == 10 * COLUMN + 4 * 3 * 5 * 7  # and the residual


@pytest.mark.usefixtures("blocks_of_ten")
def test_small_differences_are_formed_whole():
    _, _, plan, products = run(maps_of("contiguous", positions=20))
    assert products.count == 2
    assert plan.workspace_bytes == 20 * COLUMN + 4 * 3 * 5 * 7


@pytest.mark.usefixtures("blocks_of_ten")
def test_gradients_hold_them_whole_where_there_are_any():
    maps = maps_of("contiguous")
    for x in maps[:2]:
        x.requires_grad_()
    _, gradients, plan, products = run(maps)
    assert len(gradients) == 2
    assert products.count == 4
    assert plan.workspace_bytes == 4 * 3 * 5 * 7


def test_only_a_cpu_gains_by_it():
    assert planning.difference_block("cuda", 1000, 1 << 20) == 1000
    assert planning.difference_block("cpu", 1000, 1 << 20) == 4
    assert planning.difference_block("cpu", 16, 1 << 20) == 16
    assert planning.difference_block("cpu", 1000, 1 << 30) == 1


# --- Gram blocks ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("wanted", [0, 1, 4])
@pytest.mark.parametrize("shape", [(3, 300, 9), (4, 600, 49)], ids=str)
def test_gram_form_holds_what_the_plan_says(shape, wanted, dtype):
    batch, channels, positions = shape
    maps = [torch.randn(batch, c, positions, dtype=dtype) for c in (channels, channels - 20) * 2]
    for x in maps[:wanted]:
        x.requires_grad_()
    plan = fsp.explain([tuple(maps[:2])], [tuple(maps[2:])], backend="torch", channel_dim=1)
    assert plan.pairs[0].form == "gram"
    results = []
    with torch.no_grad():
        peak = profiled_peak(lambda: results.append(TorchBackend().loss(maps, plan, (1.0,))))
    numbers = 64 * batch  # the loss of each sample
    assert abs(peak - plan.extra_bytes) <= numbers


def test_channels_widened_at_a_time_make_no_difference(monkeypatch):
    maps = [torch.randn(3, c, 4) for c in (47, 60, 47, 60)]
    first, again = [], []
    for results, size in ((first, 1 << 20), (again, 16 * 3 * 4 * 10)):
        monkeypatch.setattr(planning, "GRAM_BLOCK_BYTES", size)
        loss, _, plan, products = run(maps)
        assert plan.pairs[0].form == "gram"
        results += [loss, products.count]
    assert again[1] > first[1] == 6
    assert_near(again[0], first[0].double(), TOLERANCES[torch.float32].rtol, "sums in fp64")
