"""The loss with its residual stored by tiles: parts of positions, chunks of samples, columns."""

from __future__ import annotations

import math

import pytest
import torch
from calls import BF16, FP16, FP32, NORMS, Regime, check, four_of, pair_of, tensor
from tolerances import assert_near, flatten, oracle

import fsp_kernels as fsp
from fsp_kernels import plan as planning


@pytest.fixture
def tiles(regimes):
    return regimes["tiles"]


@pytest.fixture
def in_parts(regimes):
    """Two tiles, whose positions are split."""
    return regimes["tiles in parts"]


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize(
    ("parts", "blocks", "more"),
    [
        pytest.param(2, 3, 0, id="two blocks and one"),
        pytest.param(3, 4, -4, id="two blocks, and a last part that is empty"),
        pytest.param(3, 6, 4, id="a last part shorter than a block"),
    ],
)
def test_positions_are_split_where_tiles_would_not_fill_the_device(
    small, tile, in_parts, parts, blocks, more, norm
):
    positions = blocks * tile.positions + more
    small(GPU_PART_POSITIONS=positions // parts)
    regime = in_parts._replace(size=(positions,), parts=parts)
    check(*four_of(regime), regime, norm=norm)


@pytest.mark.usefixtures("small")
def test_the_parts_of_networks_of_unequal_positions_are_added(in_parts):
    height, width = in_parts.size
    student, teacher = (pair_of(in_parts, batch=2, size=(height, w)) for w in (width, width - 1))
    check([student], [teacher], in_parts)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("grad", [True, False])
def test_a_ready_matrix_counts_once_however_many_parts_there_are(in_parts, grad):
    check([pair_of(in_parts, batch=2)], [tensor(2, *in_parts.channels, grad=grad)], in_parts)


def test_no_more_programs_than_fill_the_device(small, in_parts):
    small(GPU_PART_POSITIONS=1, GPU_PROGRAMS=5)  # two tiles, so two parts of each
    check(*four_of(in_parts), in_parts)


@pytest.fixture
def samples_at_a_time(small, tiles, monkeypatch):
    """Sets how many samples' residuals a workspace holds."""
    m, n = tiles.channels

    def set_to(samples):
        monkeypatch.setitem(planning.CHUNK_BYTES, "cuda", samples * 4 * m * n)
        small()

    yield set_to
    monkeypatch.undo()


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("samples", [1, 2])
def test_a_workspace_serves_some_samples_after_the_others(tiles, samples_at_a_time, samples, norm):
    samples_at_a_time(samples)
    plan = check(*four_of(tiles, batch=3), tiles, norm=norm)
    assert plan.pairs[0].samples == samples


@pytest.mark.parametrize("norm", NORMS)
def test_slopes_of_bf16_follow_the_parts_of_a_chunk(small, in_parts, norm, monkeypatch):
    m, n = in_parts.channels
    stored = (FP32.itemsize * in_parts.parts + BF16.itemsize) * m * n
    monkeypatch.setitem(planning.CHUNK_BYTES, "cuda", 2 * stored)
    small()
    plan = check(*four_of(in_parts, batch=3, dtypes=(BF16, BF16)), in_parts, norm=norm)
    assert plan.pairs[0].samples == 2


def test_a_workspace_holds_the_parts_of_some_samples(tiles, samples_at_a_time, small):
    samples_at_a_time(2)
    small(GPU_PART_POSITIONS=math.prod(tiles.size) // 2)
    plan = check(*four_of(tiles, batch=2), tiles._replace(parts=2))
    assert plan.pairs[0].samples == 1


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("norm", ["frobenius", "column"])
def test_the_gradient_of_a_ready_matrix_comes_chunk_by_chunk(
    tiles, samples_at_a_time, norm, transposed
):
    samples_at_a_time(2)
    m, n = tiles.channels
    matrix = tensor(3, n, m).mT if transposed else tensor(3, m, n)
    matrix = matrix.detach().requires_grad_()
    plan = check([pair_of(tiles, batch=3)], [matrix], tiles, norm=norm, weights=[0.5])
    assert plan.pairs[0].samples == 2


def test_pairs_with_unequally_many_chunks_share_launches(tiles, samples_at_a_time):
    samples_at_a_time(2)
    student, teacher = ([pair_of(tiles, batch=batch) for batch in (1, 3)] for _ in range(2))
    check(student, teacher, tiles, tiles, weights=[3.0, 0.5])


@pytest.mark.usefixtures("small")
def test_pairs_in_parts_and_in_one_share_launches(tiles, in_parts):
    regimes = [in_parts, tiles, in_parts]
    student, teacher = ([pair_of(regime) for regime in regimes] for _ in range(2))
    check(student, teacher, *regimes, weights=[1.0, 10.0, 100.0])


@pytest.mark.usefixtures("small")
def test_a_column_that_is_zero_has_no_gradient(tiles, tile):
    a, b = pair_of(tiles)
    c, d = (x.detach().clone() for x in (a, b))
    start, stop = tile.channels - 1, tile.channels + 1  # columns of two tiles
    with torch.no_grad():
        d[:, start:stop] += 1
    value = fsp.fsp_loss([(a, b)], [(c, d)], norm="column")
    expected = oracle([(a, b)], [(c, d)], norm="column")
    assert_near(value, expected.loss, 1e-5, "fp32")
    to_a, to_b = torch.autograd.grad(value, (a, b))
    assert_near(to_a, expected.gradients[0], 1e-5, "fp32")
    assert_near(to_b, expected.gradients[1], 1e-5, "fp32")
    assert not to_b[:, :start].any()
    assert not to_b[:, stop:].any()


@pytest.mark.usefixtures("small")
def test_without_gradients_or_parts_nothing_is_stored(tiles):
    student, teacher = four_of(tiles)
    with torch.no_grad():
        plan = fsp.explain(student, teacher)
    assert plan.workspace_bytes == 0
    plan = fsp.explain(student, teacher)
    assert plan.workspace_bytes == 4 * math.prod(tiles.channels)


@pytest.mark.parametrize("dtype", [FP32, FP16, BF16], ids=str)
def test_the_shipped_tiles_are_right(limits, dtype):
    limits(gram_positions=0)
    regime = Regime((130, 70), (3, 3), "tiles")
    student, teacher = four_of(regime, dtypes=(dtype, dtype))
    for x in flatten(student, teacher)[2:]:
        x.requires_grad_(False)
    check(student, teacher, regime)
    check(student, teacher, regime, norm="column")
