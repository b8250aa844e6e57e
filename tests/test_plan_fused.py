"""The planner's decisions for fused kernels: which evaluation, its parts, samples at a time."""

from __future__ import annotations

import math

import pytest
import torch

from fsp_kernels import plan as planning
from fsp_kernels.backends import registered_backends
from fsp_kernels.loss_plan import LossPlan, MapSpec, PairPlan
from fsp_kernels.plan import plan_loss

BACKENDS = registered_backends()
FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16


def spec(batch, channels, size, dtype, grad) -> MapSpec:
    spatial = (size, size) if isinstance(size, int) else size
    return MapSpec((batch, channels, *spatial), dtype, torch.device("cuda"), torch.strided, grad)


def plan(
    m: int,
    n: int,
    size,
    *,
    second_size=None,
    teacher_size=None,
    batch: int = 32,
    dtype: torch.dtype = BF16,
    teacher_dtype: torch.dtype | None = None,
    norm: str = "frobenius",
    pool: str = "max",
    gradients: bool = True,
    ready: bool = False,
    backend: str = "triton",
) -> LossPlan:
    second_size = size if second_size is None else second_size
    teacher_dtype = dtype if teacher_dtype is None else teacher_dtype
    student = tuple(spec(batch, c, s, dtype, gradients) for c, s in ((m, size), (n, second_size)))
    sizes = (size, second_size) if teacher_size is None else (teacher_size, teacher_size)
    teacher = tuple(
        spec(batch, c, s, teacher_dtype, False) for c, s in zip((m, n), sizes, strict=True)
    )
    if ready:
        teacher = (spec(batch, m, (n,), teacher_dtype, False),)
    return plan_loss((student,), (teacher,), pool, norm, BACKENDS[backend], "tf32x3")


def pair_of(*args, **options) -> PairPlan:
    return plan(*args, **options).pairs[0]


# m, n, side: the evaluation of half-precision maps and of fp32 ones.
TABLE = [
    (16, 16, 32, "one pass", "tiles"),
    (64, 64, 56, "one pass", "tiles"),
    (32, 32, 16, "one pass", "one pass"),
    (128, 64, 16, "one pass", "tiles"),
    (128, 128, 28, "one pass", "tiles"),
    (512, 512, 7, "blocks", "blocks"),
    (2048, 2048, 7, "blocks", "blocks"),
    (256, 256, 14, "tiles", "tiles"),
    (512, 512, 14, "tiles", "tiles"),
    (1024, 1024, 14, "tiles", "tiles"),
    (768, 768, (196,), "tiles", "tiles"),
    (256, 256, 56, "tiles", "tiles"),
    (256, 256, 128, "tiles", "tiles"),
]


@pytest.mark.parametrize(("m", "n", "size", "halves", "_fp32"), TABLE)
@pytest.mark.parametrize("dtype", [FP16, BF16], ids=str)
def test_evaluation_of_half_precision_maps(m, n, size, halves, _fp32, dtype):
    assert pair_of(m, n, size, dtype=dtype).evaluation == halves


@pytest.mark.parametrize(("m", "n", "size", "_halves", "fp32"), TABLE)
def test_evaluation_of_fp32_maps(m, n, size, _halves, fp32):
    assert pair_of(m, n, size, dtype=FP32).evaluation == fp32
    assert pair_of(m, n, size, teacher_dtype=FP32).evaluation == fp32


@pytest.mark.parametrize(("dtype", "batch"), [(BF16, 16), (FP32, 85)])
def test_one_pass_only_where_its_programs_keep_a_device_busy(dtype, batch):
    assert pair_of(64, 64, 56, dtype=dtype, batch=batch).evaluation == "tiles"
    assert pair_of(64, 64, 56, dtype=dtype, batch=batch + 1).evaluation == "one pass"
    assert pair_of(64, 64, 8, dtype=dtype, batch=1).evaluation == "one pass"  # soon done


@pytest.mark.parametrize(("m", "n", "size", "_halves", "_fp32"), TABLE)
def test_the_torch_backend_goes_by_chunks(m, n, size, _halves, _fp32):
    got = pair_of(m, n, size, backend="torch")
    assert (got.evaluation, got.parts) == ("chunks", 1)


@pytest.mark.parametrize(("size", "form"), [(8, "gram"), ((65,), "matrix")])
def test_the_most_positions_in_gram_form(size, form):
    assert pair_of(1024, 1024, size).form == form


@pytest.mark.parametrize("options", [{"norm": "column"}, {"ready": True}, {"teacher_size": 6}])
def test_no_gram_form_without_a_residual_of_differences(options):
    assert pair_of(512, 512, 7, **options).form == "matrix"


def test_the_column_norm_stores_its_residual():
    assert pair_of(512, 512, 14, norm="column").evaluation == "tiles"
    assert pair_of(512, 512, 7, norm="column").evaluation == "tiles"


def test_a_ready_matrix_has_a_dtype_that_does_not_matter():
    for teacher_dtype in (BF16, FP32):
        got = pair_of(512, 512, 14, ready=True, teacher_dtype=teacher_dtype)
        assert got.evaluation == "tiles"


def test_averages_are_no_longer_half_precision():
    assert pair_of(64, 64, 16, second_size=8).halves
    assert not pair_of(64, 64, 16, second_size=8, pool="avg").halves


# --- gradients by BLAS ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "by_blas"),
    [
        ((512, 512, 28), True),
        ((1024, 1024, 16), True),
        ((768, 768, (196,)), False),  # rows of 392 bytes, no multiple of 16; as tokens they are
        ((1024, 1024, 14), False),
        ((256, 256, 56), False),  # memory binds
        ((512, 516, 28), False),  # the tiles' rows are 1032 bytes
    ],
)
def test_blas_computes_the_gradients_of_large_products_of_whole_16_bytes(shape, by_blas):
    assert pair_of(*shape).blas_gradients == by_blas
    assert ("gradients by BLAS" in str(plan(*shape))) == by_blas
    assert plan(*shape).launches.count("bmm") == (2 if by_blas else 0)


@pytest.mark.parametrize(
    "options",
    [
        {"dtype": FP16},  # whose slopes would be too small
        {"dtype": FP32},
        {"teacher_dtype": FP32},
        {"second_size": 56},
        {"ready": True},
        {"gradients": False},
        {"backend": "torch"},
    ],
    ids=str,
)
def test_blas_computes_no_gradients_of_other_than_plain_maps_of_bf16(options):
    assert pair_of(512, 512, 28).blas_gradients
    assert not pair_of(512, 512, 28, **options).blas_gradients


def test_blas_takes_the_maps_of_transformers():
    tokens = MapSpec(
        (64, 768, 196), BF16, torch.device("cuda"), torch.strided, True, (768 * 196, 1, 768)
    )
    maps = ((tokens, tokens),)
    assert (
        plan_loss(maps, maps, "max", "frobenius", BACKENDS["triton"], "tf32x3")
        .pairs[0]
        .blas_gradients
    )


# --- parts and samples ----------------------------------------------------------------------------


def test_positions_are_split_where_tiles_would_not_fill_a_device():
    # 4 samples of 2 x 2 tiles are 16 programs; 16 parts of 1024 positions make them 256.
    got = pair_of(256, 256, 128, batch=4)
    assert (got.evaluation, got.parts) == ("tiles", 16)
    assert pair_of(256, 256, 128, batch=64).parts == 1


def test_no_part_is_short():
    for size in (32, 56, 128):
        got = pair_of(256, 256, size, batch=1)
        assert size**2 / got.parts >= planning.GPU_PART_POSITIONS
        assert got.parts * 4 <= planning.GPU_PROGRAMS


def test_few_positions_are_not_split():
    assert pair_of(256, 256, 14, batch=1).parts == 1


def test_the_workspace_stays_within_its_budget():
    for m, n, size, *_ in TABLE:
        for batch in (1, 32, 1024):
            got = pair_of(m, n, size, batch=batch, norm="column")
            assert got.workspace_bytes <= planning.CHUNK_BYTES["cuda"]


def test_samples_come_in_equal_chunks():
    got = pair_of(2048, 2048, 14, batch=33, norm="column")
    chunks = math.ceil(33 / got.samples)
    assert chunks > 1
    assert got.samples == math.ceil(33 / chunks)
    assert got.workspace_bytes == got.samples * (4 + 2) * 2048**2  # a part, and slopes in bf16


def test_a_sample_larger_than_the_budget_comes_alone():
    assert pair_of(16384, 16384, 14, norm="column", batch=3).samples == 1


@pytest.mark.parametrize(("m", "n", "size", "halves", "_fp32"), TABLE)
def test_no_matrix_is_held_unless_tiles_are_stored(m, n, size, halves, _fp32):
    stored = 32 * 2 * m * n
    got = plan(m, n, size)
    assert (got.workspace_bytes >= stored) == (halves == "tiles")
    if got.pairs[0].form == "matrix":
        assert (got.workspace_bytes > 0) == (halves == "tiles")
        # Of so many samples no tile is in parts, which would have to be added.
        assert plan(m, n, size, batch=1024, gradients=False).workspace_bytes == 0


@pytest.mark.parametrize(("gradients", "operands"), [(False, 0), (True, 2 * 2)])
def test_gram_form_holds_its_blocks(gradients, operands):
    # Each a power of two wide, 64 for 49 positions; and what the gradients are products with.
    got = plan(512, 256, 7, gradients=gradients)
    parts = got.pairs[0].parts
    assert got.workspace_bytes == 32 * (parts * 6 + operands) * 64 * 64 * 4


def test_channels_are_split_where_samples_would_not_fill_a_device():
    assert [pair_of(512, 512, 7, batch=n).parts for n in (1, 32, 64, 128)] == [4, 4, 2, 1]
    assert pair_of(2048, 2048, 7, batch=1).parts == 16  # no part is shorter than 128 channels


def test_gram_blocks_stay_within_the_budget_of_a_workspace():
    got = pair_of(512, 512, 7, batch=2048)
    assert got.samples < 2048
    assert got.workspace_bytes <= planning.CHUNK_BYTES["cuda"]


def test_pairs_in_one_launch_hold_their_workspaces_together():
    maps = tuple((spec(32, c, 14, BF16, True),) * 2 for c in (256, 320))
    got = plan_loss(maps, maps, "max", "frobenius", BACKENDS["triton"], "tf32x3")
    assert got.workspace_bytes == 32 * 2 * (256**2 + 320**2)
    # The torch backend takes one after the other.
    torchs = plan_loss(maps, maps, "max", "frobenius", BACKENDS["torch"], "tf32x3")
    assert torchs.workspace_bytes == max(p.workspace_bytes for p in torchs.pairs)


# --- windows --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "second_size", "fused"),
    [(16, 8, True), (16, 2, True), (9, 1, False), (15, 8, False), ((8, 3), (2, 3), True)],
)
def test_windows_of_one_size_that_are_not_too_large_are_pooled_on_the_way(size, second_size, fused):
    got = plan(16, 16, size, second_size=second_size)
    assert got.maps[0].fused_windows is fused
    assert got.maps[1].fused_windows
    assert (got.pooled_before == ()) is fused
    assert (got.workspace_bytes == 0) is fused


def test_what_is_pooled_before_takes_memory():
    # The maximum in the map's dtype, its index and an fp32 gradient; the teacher's maximum alone.
    got = plan(16, 16, 15, second_size=8, batch=2)
    assert got.workspace_bytes == 2 * 16 * 64 * (2 + 8 + 4) + 2 * 16 * 64 * 2


# --- launches -------------------------------------------------------------------------------------


def groups_of(*shapes, dtype=FP32):
    specs = [(spec(32, m, s, dtype, True), spec(32, n, s, dtype, True)) for m, n, s in shapes]
    planned = plan_loss(
        tuple(specs), tuple(specs), "max", "frobenius", BACKENDS["triton"], "tf32x3"
    )
    return [group.pairs for group in planned.launch_groups]


def test_tiles_that_take_other_warps_have_launches_of_their_own():
    assert groups_of((64, 64, 56), (256, 256, 14), (512, 512, 14)) == [(0,), (2, 1)]


# --- as it prints ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ((64, 64, 16), "difference, matrix form, one pass"),
        ((512, 512, 7), "difference, gram form, blocks in 4 parts"),
        ((256, 256, 14), "difference, matrix form, tiles"),
    ],
)
def test_a_plan_prints_its_evaluation(arguments, text):
    assert text in str(plan(*arguments))
    assert "triton backend" in str(plan(*arguments))


def test_a_plan_prints_its_parts():
    assert "tiles in 16 parts" in str(plan(256, 256, 128, batch=4))
