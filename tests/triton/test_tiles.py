"""The loss with its residual stored by tiles: parts of positions, chunks of samples, columns."""

from __future__ import annotations

import pytest
import torch
from calls import BF16, FP16, FP32, NORMS, REGIMES, Regime, check, four_of, pair_of, tensor
from tolerances import assert_near, flatten, oracle

import fsp_kernels as fsp
from fsp_kernels import plan as planning
from fsp_kernels.backends.triton import configurations, loss
from fsp_kernels.backends.triton.launch import Launch

TILES = REGIMES["tiles"]


def in_parts(parts: int, positions: int) -> Regime:
    return Regime((17, 15), (positions,), "tiles", parts=parts)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize(
    ("parts", "positions"),
    [
        pytest.param(2, 48, id="two blocks and one"),
        pytest.param(3, 60, id="two blocks, and a last part that is empty"),
        pytest.param(3, 100, id="a last part shorter than a block"),
    ],
)
def test_positions_are_split_where_tiles_would_not_fill_the_device(small, parts, positions, norm):
    small(GPU_PART_POSITIONS=positions // parts)
    regime = in_parts(parts, positions)
    check(*four_of(regime), regime, norm=norm)


def test_the_parts_of_networks_of_unequal_positions_are_added(small):
    small(GPU_PART_POSITIONS=20)
    regime = in_parts(2, 40)
    student, teacher = [pair_of(regime, batch=2)], [pair_of(regime, batch=2, size=(33,))]
    check(student, teacher, regime)


@pytest.mark.parametrize("grad", [True, False])
def test_a_ready_matrix_counts_once_however_many_parts_there_are(small, grad):
    small(GPU_PART_POSITIONS=20)
    regime = in_parts(2, 40)
    check([pair_of(regime, batch=2)], [tensor(2, 17, 15, grad=grad)], regime)


def test_no_more_programs_than_fill_the_device(small):
    small(GPU_PART_POSITIONS=1, GPU_PROGRAMS=5)
    regime = in_parts(2, 40)  # two tiles, so two parts of each
    check(*four_of(regime), regime)


@pytest.fixture
def samples_at_a_time(small, monkeypatch):
    """Sets how many samples' residuals of 17 x 20 a workspace holds."""

    def set_to(samples):
        monkeypatch.setitem(planning.CHUNK_BYTES, "cuda", samples * 4 * 17 * 20)
        small()

    yield set_to
    monkeypatch.undo()


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("samples", [1, 2])
def test_a_workspace_serves_some_samples_after_the_others(samples_at_a_time, samples, norm):
    samples_at_a_time(samples)
    plan = check(*four_of(TILES, batch=3), TILES, norm=norm)
    assert plan.pairs[0].samples == samples


def test_a_workspace_holds_the_parts_of_some_samples(samples_at_a_time, small):
    samples_at_a_time(2)
    small(GPU_PART_POSITIONS=9)
    plan = check(*four_of(TILES, batch=2), TILES._replace(parts=2))
    assert plan.pairs[0].samples == 1


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("norm", ["frobenius", "column"])
def test_the_gradient_of_a_ready_matrix_comes_chunk_by_chunk(samples_at_a_time, norm, transposed):
    samples_at_a_time(2)
    m, n = TILES.channels
    matrix = tensor(3, n, m).mT if transposed else tensor(3, m, n)
    matrix = matrix.detach().requires_grad_()
    plan = check([pair_of(TILES, batch=3)], [matrix], TILES, norm=norm, weights=[0.5])
    assert plan.pairs[0].samples == 2


def test_pairs_with_unequally_many_chunks_share_launches(samples_at_a_time):
    samples_at_a_time(2)
    student = [pair_of(TILES, batch=batch) for batch in (1, 3)]
    teacher = [pair_of(TILES, batch=batch) for batch in (1, 3)]
    check(student, teacher, TILES, TILES, weights=[3.0, 0.5])


def test_pairs_in_parts_and_in_one_share_launches(small):
    small(GPU_PART_POSITIONS=20)
    parts = in_parts(2, 40)
    student, teacher = ([pair_of(parts), pair_of(TILES), pair_of(parts)] for _ in range(2))
    check(student, teacher, parts, TILES, parts, weights=[1.0, 10.0, 100.0])


@pytest.mark.usefixtures("small")
def test_a_column_that_is_zero_has_no_gradient():
    a, b = pair_of(TILES)
    c, d = (x.detach().clone() for x in (a, b))
    with torch.no_grad():
        d[:, 16:18] += 1
    value = fsp.fsp_loss([(a, b)], [(c, d)], norm="column", backend="triton")
    expected = oracle([(a, b)], [(c, d)], norm="column")
    assert_near(value, expected.loss, 1e-5, "fp32")
    to_a, to_b = torch.autograd.grad(value, (a, b))
    assert_near(to_a, expected.gradients[0], 1e-5, "fp32")
    assert_near(to_b, expected.gradients[1], 1e-5, "fp32")
    assert not to_b[:, :16].any()
    assert not to_b[:, 18:].any()


@pytest.mark.usefixtures("small")
def test_without_gradients_or_parts_nothing_is_stored():
    student, teacher = four_of(TILES)
    with torch.no_grad():
        plan = fsp.explain(student, teacher, backend="triton")
    assert plan.workspace_bytes == 0
    plan = fsp.explain(student, teacher, backend="triton")
    assert plan.workspace_bytes == 4 * 17 * 20


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("dtype", [FP32, FP16, BF16], ids=str)
@pytest.mark.parametrize(("name", "kernel"), [("one pass", "one_pass"), ("gram", "gram")])
def test_a_chip_without_the_registers_for_one_pass_stores_tiles(name, kernel, dtype, monkeypatch):
    launched = set()
    start = Launch.__call__

    def remember(self, *arguments):
        launched.add(self.kernel.__name__)
        return start(self, *arguments)

    monkeypatch.setattr(Launch, "__call__", remember)
    regime = REGIMES[name]
    student, teacher = four_of(regime, batch=2, dtypes=(dtype, dtype))
    with configurations.using([r for r in configurations.rows() if r.kernel != kernel]):
        loss._PROGRAMS.clear()
        check(student, teacher, regime)
    assert "fsp_residual" in launched
    assert "fsp_" + kernel not in launched


@pytest.mark.parametrize("dtype", [FP32, FP16, BF16], ids=str)
def test_the_shipped_tiles_are_right(limits, dtype):
    limits(GPU_GRAM_POSITIONS=0, GPU_RECOMPUTE_POSITIONS=0)
    regime = Regime((130, 70), (3, 3), "tiles")
    student, teacher = four_of(regime, dtypes=(dtype, dtype))
    for x in flatten(student, teacher)[2:]:
        x.requires_grad_(False)
    check(student, teacher, regime)
    check(student, teacher, regime, norm="column")
