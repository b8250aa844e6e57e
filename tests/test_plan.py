"""The planner's decisions, also for devices not at hand; and that they are carried out."""

import dataclasses
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import fsp_kernels as fsp
from fsp_kernels.backends import registered_backends
from fsp_kernels.backends.torch_backend import TorchBackend
from fsp_kernels.loss_plan import LossPlan, MapSpec, PairPlan
from fsp_kernels.plan import CHUNK_BYTES, CHUNK_SAMPLES, plan_loss

TORCH = registered_backends()["torch"]
FP64, FP32, FP16, BF16 = torch.float64, torch.float32, torch.float16, torch.bfloat16
Size = int | tuple[int, ...]


def spec(
    batch: int, channels: int, size: Size, dtype: torch.dtype, device: str, grad: bool
) -> MapSpec:
    """``size`` is the side of a square map, or all its spatial axes."""
    spatial = (size, size) if isinstance(size, int) else size
    shape = (batch, channels, *spatial)
    return MapSpec(shape, dtype, torch.device(device), torch.strided, grad)


def plan(
    m: int,
    n: int,
    size: Size,
    *,
    second_size: Size | None = None,
    teacher_size: Size | None = None,
    batch: int = 4,
    dtype: torch.dtype = FP32,
    teacher_dtype: torch.dtype | None = None,
    device: str = "cpu",
    norm: str = "frobenius",
    pool: str = "max",
    wanted: str = "student",  # or "nothing", "everything"
    ready: bool = False,
) -> LossPlan:
    """The plan of one pair with ``m`` and ``n`` channels."""
    teacher_dtype = teacher_dtype or dtype
    student_grad, teacher_grad = wanted != "nothing", wanted == "everything"
    student = (
        spec(batch, m, size, dtype, device, student_grad),
        spec(batch, n, size if second_size is None else second_size, dtype, device, student_grad),
    )
    if ready:
        shape = (batch, m, n)
        matrix = MapSpec(shape, teacher_dtype, torch.device(device), torch.strided, teacher_grad)
        teacher = (matrix,)
    else:
        sizes = [size if teacher_size is None else teacher_size] * 2
        if teacher_size is None and second_size is not None:
            sizes[1] = second_size
        teacher = tuple(
            spec(batch, channels, side, teacher_dtype, device, teacher_grad)
            for channels, side in zip((m, n), sizes, strict=True)
        )
    return plan_loss((student,), (teacher,), pool, norm, TORCH, "tf32x3")


def plan_pair(*args, **kwargs) -> PairPlan:
    return plan(*args, **kwargs).pairs[0]


def random_pair(m: int, n: int, size: int, **kwargs) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(2, m, size, size, **kwargs), torch.randn(2, n, size, size, **kwargs)


# --- which evaluation -----------------------------------------------------------------------------

# m, n, side of the maps: form and passes on a GPU, and the form on a CPU (which always passes once
# where a sample fits its cache). fp32, gradients of the student.
TABLE = [
    # m, n <= 128: one program holds the residual in registers
    (16, 16, 32, "matrix", 1, "matrix"),
    (32, 64, 32, "matrix", 1, "matrix"),
    (64, 64, 8, "matrix", 1, "matrix"),
    (64, 64, 56, "matrix", 1, "matrix"),
    (128, 128, 28, "matrix", 1, "matrix"),
    (128, 128, 2, "matrix", 1, "gram"),  # a CPU goes by flops: 4 positions
    # few positions, many channels: Gram blocks of K x K
    (256, 256, 8, "gram", 1, "matrix"),  # on a CPU too few flops are saved
    (512, 512, 7, "gram", 1, "gram"),
    (2048, 2048, 7, "gram", 1, "gram"),
    (128, 512, 7, "gram", 1, "matrix"),
    (129, 129, 7, "gram", 1, "matrix"),
    # few positions but no fewer flops
    (129, 129, 8, "matrix", 2, "matrix"),
    # the rest: the residual tile by tile, then the gradients
    (256, 256, 14, "matrix", 2, "matrix"),
    (512, 512, 14, "matrix", 2, "matrix"),
    (1024, 1024, 14, "matrix", 2, "gram"),
    (768, 768, (196,), "matrix", 2, "matrix"),
    (256, 256, 56, "matrix", 2, "matrix"),
    (64, 256, 56, "matrix", 2, "matrix"),
]


@pytest.mark.parametrize(("m", "n", "size", "form", "passes", "_"), TABLE)
def test_evaluation_on_a_gpu(m, n, size, form, passes, _):
    pair = plan_pair(m, n, size, device="cuda")
    assert (pair.form, pair.passes) == (form, passes)


@pytest.mark.parametrize(("m", "n", "size", "_form", "_passes", "form"), TABLE)
def test_form_on_a_cpu(m, n, size, _form, _passes, form):
    assert plan_pair(m, n, size).form == form


@pytest.mark.parametrize(
    ("m", "size", "passes"), [(16, 32, 1), (128, 28, 1), (512, 14, 1), (256, 56, 2), (256, 128, 2)]
)
def test_a_cpu_passes_once_where_a_sample_fits_its_cache(m, size, passes):
    assert plan_pair(m, m, size).passes == passes


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("norm", ["frobenius", "mse"])
def test_sums_of_squares_are_evaluated_alike(norm, device):
    for m, n, size, *_ in TABLE:
        options = {"device": device, "norm": norm}
        got = dataclasses.replace(plan_pair(m, n, size, **options), norm="frobenius")
        assert got == plan_pair(m, n, size, device=device)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_column_norm_needs_the_residual_itself(device):
    assert plan_pair(512, 512, 7, device=device).form == "gram"
    assert plan_pair(512, 512, 7, device=device, norm="column").form == "matrix"


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_ready_matrix_has_no_gram_form(device):
    assert plan_pair(512, 512, 7, device=device, ready=True).form == "matrix"


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_networks_of_unequal_positions_have_no_gram_form(device):
    assert plan_pair(512, 512, 7, device=device, teacher_size=6).form == "matrix"


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_positions_are_compared_after_pooling(device):
    pair = plan_pair(512, 512, 14, second_size=7, teacher_size=7, device=device)
    assert (pair.form, pair.positions) == ("gram", 49)


@pytest.mark.parametrize("wanted", ["nothing", "student", "everything"])
def test_gram_pays_where_it_saves_flops(wanted):
    """Per sample 6 (m + n) K^2 against 4 m n K, and per gradient 4 c K^2 against 2 m n K.

    Those of the blocks, which are fp64, take 2.6 times as long.
    """
    gradients = {"nothing": 0, "student": 2, "everything": 4}[wanted]
    m = n = 240
    for k in range(1, 300):
        gram = (2.6 * 6 + 2 * gradients) * (m + n) * k**2
        matrix = (4 + 2 * gradients) * m * n * k
        form = plan_pair(m, n, (k,), wanted=wanted).form
        assert form == ("gram" if gram < matrix else "matrix"), k


# --- which residual -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("device", "student", "teacher", "residual"),
    [
        ("cpu", FP64, FP64, "difference"),
        ("cpu", FP32, FP32, "difference"),
        ("cpu", FP16, FP16, "difference"),  # widened before it is subtracted
        ("cpu", BF16, FP16, "difference"),
        ("cuda", FP64, FP64, "difference"),
        ("cuda", FP32, FP32, "difference"),
        ("cuda", FP32, FP16, "difference"),
        ("cuda", BF16, FP32, "difference"),
        ("cuda", FP16, FP16, "direct"),  # products of halves are exact, their difference is not
        ("cuda", BF16, BF16, "direct"),
        ("cuda", BF16, FP16, "direct"),
    ],
    ids=str,
)
def test_residual_of_the_matrix_form(device, student, teacher, residual):
    pair = plan_pair(64, 64, 16, device=device, dtype=student, teacher_dtype=teacher)
    assert (pair.form, pair.residual) == ("matrix", residual)


@pytest.mark.parametrize("dtype", [FP64, FP32, FP16, BF16], ids=str)
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_gram_form_is_always_that_of_the_difference(device, dtype):
    pair = plan_pair(512, 512, 7, device=device, dtype=dtype)
    assert (pair.form, pair.residual) == ("gram", "difference")


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_unequal_positions_cannot_be_subtracted(device):
    assert plan_pair(64, 64, 16, teacher_size=8, device=device).residual == "apart"


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_ready_matrix_cannot_be_subtracted_from_maps(device):
    assert plan_pair(64, 64, 16, ready=True, device=device).residual == "ready"


def test_only_the_number_of_positions_counts_for_subtraction():
    assert plan_pair(64, 64, (4, 9), teacher_size=(6, 6)).residual == "difference"
    assert plan_pair(64, 64, (4, 9), teacher_size=(36,)).residual == "difference"


# --- maps -----------------------------------------------------------------------------------------


def test_maps_come_pair_by_pair_student_before_teacher():
    student = tuple((spec(2, c, 8, FP32, "cpu", True),) * 2 for c in (3, 4))
    teacher = ((spec(2, 3, 6, FP32, "cpu", False),) * 2, (MapSpec((2, 4, 4), *student[0][0][1:]),))
    got = plan_loss(student, teacher, "max", "mse", TORCH, "tf32x3")
    shapes = [(2, 3, 8, 8)] * 2 + [(2, 3, 6, 6)] * 2 + [(2, 4, 8, 8)] * 2 + [(2, 4, 4)]
    assert [m.shape for m in got.maps] == shapes
    assert [len(pair.teacher) for pair in got.pairs] == [2, 1]


def test_a_map_is_pooled_to_the_smaller_size_axis_by_axis():
    pair = plan_pair(3, 4, (8, 6), second_size=(4, 9))
    assert [m.pooled_size for m in pair.student] == [(4, 6), (4, 6)]
    assert pair.positions == 24


def test_a_map_that_keeps_its_size_is_not_pooled():
    pair = plan_pair(3, 4, 8, second_size=4)
    assert [m.pooled_size for m in pair.student] == [(4, 4), None]
    assert [m.pooled_size for m in plan_pair(3, 4, 8).maps] == [None] * 4


def test_networks_are_pooled_apart_from_each_other():
    pair = plan_pair(3, 4, 8, second_size=4, teacher_size=6)
    assert [m.pooled_size for m in pair.teacher] == [None, None]
    assert [m.positions for m in pair.maps] == [16, 16, 36, 36]


@pytest.mark.parametrize(
    ("dtype", "held"), [(FP64, FP64), (FP32, FP32), (BF16, BF16), (FP16, FP32)], ids=str
)
def test_gradients_wait_in_their_dtype_but_those_of_fp16_in_fp32(dtype, held):
    pair = plan_pair(8, 8, 4, dtype=dtype, wanted="everything")
    assert [m.gradient_dtype for m in pair.maps] == [held] * 4


def test_only_maps_that_want_a_gradient_get_one():
    held = [m.gradient_dtype for m in plan_pair(8, 8, 4, wanted="student").maps]
    assert held == [FP32, FP32, None, None]


@pytest.mark.parametrize(
    ("student", "teacher", "compute"),
    [(FP32, FP32, FP32), (FP16, FP16, FP32), (BF16, FP16, FP32), (FP16, FP64, FP64)],
    ids=str,
)
def test_accumulation_is_in_fp32_or_in_fp64_if_any_map_is(student, teacher, compute):
    assert plan(8, 8, 4, dtype=student, teacher_dtype=teacher).compute_dtype == compute


# --- costs ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wanted", "products"), [("nothing", 2), ("student", 4), ("everything", 6)]
)
def test_flops_of_the_matrix_form(wanted, products):
    """A product of ``m n K`` multiply-adds per network and per gradient."""
    got = plan(16, 24, (10,), batch=3, wanted=wanted, norm="column")
    assert got.flops == products * 2 * 3 * 16 * 24 * 10


@pytest.mark.parametrize(
    ("wanted", "gradients"), [("nothing", 0), ("student", 1), ("everything", 2)]
)
def test_flops_of_the_gram_form(wanted, gradients):
    """Three ``K x K`` blocks of either layer, two products of ``c K^2`` per gradient."""
    got = plan(512, 256, 3, batch=4, wanted=wanted)
    assert got.pairs[0].form == "gram"
    assert got.flops == 4 * (3 * 2 + gradients * 2 * 2) * (512 + 256) * 9**2


def test_flops_with_a_ready_matrix():
    """One product for the student, one for each of its gradients; the matrix's own is a copy."""
    assert plan(16, 24, (10,), batch=3, ready=True).flops == 3 * 2 * 3 * 16 * 24 * 10
    everything = plan(16, 24, (10,), batch=3, ready=True, wanted="everything")
    assert everything.flops == 3 * 2 * 3 * 16 * 24 * 10


def test_flops_with_unequal_positions():
    got = plan(16, 24, (10,), teacher_size=(7,), batch=3, wanted="everything")
    assert got.flops == 2 * 3 * 16 * 24 * (3 * 10 + 3 * 7)


def test_flops_are_counted_at_the_pooled_size():
    got = plan(16, 24, 8, second_size=4, batch=3, norm="column")
    assert got.flops == 4 * 2 * 3 * 16 * 24 * 16


def test_one_pass_reads_each_map_once_and_writes_each_gradient_once():
    got = plan(16, 24, 8, batch=3)
    maps, gradients = 2 * 3 * (16 + 24) * 64 * 4, 3 * (16 + 24) * 64 * 4
    assert got.pairs[0].passes == 1
    assert got.gradient_bytes == gradients
    assert got.bytes_moved == maps + gradients


def test_two_passes_read_each_map_twice():
    got = plan(256, 256, 56, device="cuda")
    maps = 4 * 4 * 256 * 56**2 * 4
    assert got.pairs[0].passes == 2
    assert got.bytes_moved == 2 * maps + got.gradient_bytes


def test_without_gradients_maps_are_read_once():
    got = plan(256, 256, 56, device="cuda", wanted="nothing")
    assert got.gradient_bytes == 0
    assert got.bytes_moved == 4 * 4 * 256 * 56**2 * 4


def test_bytes_follow_the_dtypes():
    got = plan(16, 24, 8, batch=3, dtype=FP16, teacher_dtype=FP64)
    elements = 3 * (16 + 24) * 64
    assert got.gradient_bytes == 4 * elements  # fp16's are held in fp32
    assert got.bytes_moved == (2 + 8 + 4) * elements


def test_gradients_are_of_the_size_before_pooling():
    got = plan(16, 24, 8, second_size=4, batch=3)
    assert got.gradient_bytes == 3 * (16 * 64 + 24 * 16) * 4


def test_pairs_add_up_but_share_one_workspace():
    def pairs(*channels: int) -> LossPlan:
        entries = tuple((spec(4, c, 8, FP32, "cpu", True),) * 2 for c in channels)
        return plan_loss(entries, entries, "max", "frobenius", TORCH, "tf32x3")

    one, other, both = pairs(16), pairs(32), pairs(16, 32)
    assert both.flops == one.flops + other.flops
    assert both.bytes_moved == one.bytes_moved + other.bytes_moved
    assert both.gradient_bytes == one.gradient_bytes + other.gradient_bytes
    assert both.workspace_bytes == max(one.workspace_bytes, other.workspace_bytes)
    assert both.extra_bytes == both.gradient_bytes + both.workspace_bytes


def test_gram_form_holds_no_matrix():
    """No temporary of ``m n`` elements, let alone ``B`` of them."""
    pair = plan_pair(2048, 2048, (16,), batch=1)
    assert pair.form == "gram"
    assert pair.workspace_bytes < 2048 * 2048 * 4


# --- chunks ---------------------------------------------------------------------------------------


def chunk_bytes(pair: PairPlan) -> float:
    """Inputs, gradients and workspace of one chunk."""
    at_hand = sum(m.bytes for m in pair.maps) + pair.gradient_bytes
    return at_hand * pair.samples / pair.batch + pair.workspace_bytes


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_chunk_stays_within_its_budget(device):
    for m, n, size, *_ in TABLE:
        pair = plan_pair(m, n, size, batch=256, device=device)
        assert pair.samples == CHUNK_SAMPLES[device] or chunk_bytes(pair) <= CHUNK_BYTES[device]


def test_a_small_batch_is_one_chunk():
    assert plan_pair(16, 16, 8, batch=7).samples == 7


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_samples_larger_than_the_budget_go_by_the_fewest_that_are_fast(device):
    pair = plan_pair(512, 512, 256, batch=16, device=device)
    assert pair.samples == CHUNK_SAMPLES[device]
    assert chunk_bytes(pair) > CHUNK_BYTES[device]
    assert pair.passes == 2


def test_chunks_are_as_few_as_the_budget_allows():
    pair = plan_pair(64, 64, 56, batch=64)
    chunks = math.ceil(pair.batch / pair.samples)
    assert 1 < pair.samples < pair.batch
    # With one chunk fewer, the larger of them would hold this many samples.
    larger = math.ceil(pair.batch / (chunks - 1))
    assert chunk_bytes(pair) / pair.samples * larger > CHUNK_BYTES["cpu"]


def test_chunks_are_of_almost_equal_size():
    pair = plan_pair(64, 64, 56, batch=64)
    last = pair.batch % pair.samples or pair.samples
    assert pair.samples - last < math.ceil(pair.batch / pair.samples)


# --- any shape ------------------------------------------------------------------------------------

sides = st.integers(1, 40)
sizes = st.one_of(st.tuples(sides), st.tuples(sides, sides))
dtypes = st.sampled_from([FP64, FP32, FP16, BF16])
options = st.fixed_dictionaries(
    {
        "m": st.integers(1, 600),
        "n": st.integers(1, 600),
        "size": st.tuples(sides, sides),
        "second_size": st.none() | st.tuples(sides, sides),
        "teacher_size": st.none() | sizes,
        "batch": st.integers(1, 64),
        "dtype": dtypes,
        "teacher_dtype": dtypes,
        "device": st.sampled_from(["cpu", "cuda"]),
        "norm": st.sampled_from(["frobenius", "mse", "column"]),
        "wanted": st.sampled_from(["nothing", "student", "everything"]),
        "ready": st.booleans(),
    }
)


@given(options)
def test_costs_are_positive_and_chunks_within_the_batch(options):
    got = plan(**options)
    (pair,) = got.pairs
    assert got.flops > 0
    assert got.workspace_bytes > 0
    assert 1 <= pair.samples <= pair.batch
    assert pair.passes in (1, 2)
    assert got.bytes_moved >= sum(m.bytes for m in pair.maps) + got.gradient_bytes
    assert (got.gradient_bytes > 0) == (options["wanted"] != "nothing")


@given(options)
def test_a_chunk_of_more_samples_than_the_fewest_fits_the_budget(options):
    pair, device = plan_pair(**options), options["device"]
    fewest = CHUNK_SAMPLES[device]
    assert pair.samples <= fewest or chunk_bytes(pair) <= CHUNK_BYTES[device]


@given(options)
def test_the_chosen_form_never_has_more_flops_than_the_residual_itself(options):
    by_residual = plan(**{**options, "norm": "column"}).flops
    assert plan(**options).flops <= by_residual


@given(options)
def test_flops_and_bytes_are_proportional_to_the_batch(options):
    one, all_ = plan(**{**options, "batch": 1}), plan(**options)
    assert all_.flops == options["batch"] * one.flops
    assert all_.bytes_moved == options["batch"] * one.bytes_moved
    assert all_.pairs[0].form == one.pairs[0].form


@given(options)
def test_more_gradients_cost_no_less(options):
    nothing, student, everything = (
        plan(**{**options, "wanted": wanted}) for wanted in ("nothing", "student", "everything")
    )
    for fewer, more in ((nothing, student), (student, everything)):
        # A flop of a Gram block costs a CPU more, so the form of fewest flops may not be chosen.
        if fewer.pairs[0].form == more.pairs[0].form:
            assert fewer.flops <= more.flops
    assert nothing.bytes_moved < student.bytes_moved < everything.bytes_moved
    assert nothing.gradient_bytes < student.gradient_bytes < everything.gradient_bytes


@given(options)
def test_gram_only_where_both_networks_have_maps_of_equal_positions(options):
    pair = plan_pair(**options)
    if pair.form == "gram":
        assert not options["ready"]
        assert options["norm"] != "column"
        assert pair.teacher[0].positions == pair.positions
        assert pair.residual == "difference"


# --- a pure function ------------------------------------------------------------------------------


def test_equal_signatures_share_one_plan():
    assert plan(16, 24, 8) is plan(16, 24, 8)


@pytest.mark.parametrize(
    "change",
    [
        {"norm": "mse"},
        {"pool": "avg"},
        {"batch": 5},
        {"dtype": BF16},
        {"teacher_dtype": BF16},
        {"device": "cuda"},
        {"wanted": "nothing"},
        {"ready": True},
        {"teacher_size": 7},
    ],
    ids=str,
)
def test_other_signatures_have_other_plans(change):
    assert plan(16, 24, 8, **change) != plan(16, 24, 8)


def test_plans_cannot_be_changed():
    got = plan(16, 24, 8)
    for part in (got, got.pairs[0], got.maps[0]):
        field = dataclasses.fields(part)[0].name
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(part, field, None)


def test_spec_of_a_tensor():
    x = torch.randn(2, 3, 4, 5, dtype=FP64, requires_grad=True)
    got = MapSpec.of(x)
    strides = (60, 20, 5, 1)
    assert got == MapSpec((2, 3, 4, 5), FP64, torch.device("cpu"), torch.strided, True, strides)
    assert got.positions == 20


# --- explain --------------------------------------------------------------------------------------


def test_explain_returns_the_plan():
    pair = random_pair(16, 24, 8)
    specs = tuple(map(MapSpec.of, pair))
    got = fsp.explain([pair], [pair], pool="avg", norm="mse", backend="torch")
    assert isinstance(got, fsp.LossPlan)
    assert got == plan_loss((specs,), (specs,), "avg", "mse", TORCH, "tf32x3")


def test_explain_prints_what_was_decided():
    got = plan(512, 256, 7, batch=4, norm="mse", pool="avg")
    text = str(got)
    for part in ("cpu", "torch backend", "norm='mse'", "pool='avg'", "accumulating in float32"):
        assert part in text
    for part in ("512 x 256", "49", "difference, gram form, one pass", "4 samples"):
        assert part in text


def test_explain_prints_one_line_for_each_pair_and_one_for_all():
    layers = [torch.randn(2, c, 4, 4) for c in (3, 5, 7, 9)]
    pairs = fsp.pairs_of(layers)
    lines = str(fsp.explain(pairs, pairs)).splitlines()
    assert len(lines) == 1 + 1 + 3 + 1  # head, columns, pairs, all
    for line, channels in zip(lines[2:], ("3 x 5", "5 x 7", "7 x 9"), strict=False):
        assert channels in line
    assert lines[-1].startswith("all")


def test_explain_prints_the_costs():
    got = plan(512, 512, 28, batch=32)
    *_, row, total = str(got).splitlines()
    costs = [got.flops / 1e9, got.bytes_moved / 1e6, got.extra_bytes / 1e6]
    printed = [f"{costs[0]:.3f}", f"{costs[1]:.2f}", f"{costs[2]:.2f}"]
    assert row.split()[-3:] == printed
    assert total.split()[-3:] == printed


def test_explain_prints_two_passes_and_the_direct_form():
    text = str(plan(256, 256, 56, device="cuda", dtype=BF16))
    assert "direct, matrix form, two passes" in text


def test_repr_is_the_table_too():
    got = plan(16, 24, 8)
    assert repr(got) == str(got)


def test_explain_reads_and_changes_nothing():
    student, teacher = (random_pair(16, 24, 8, device="meta") for _ in range(2))
    assert (
        fsp.explain([student], [teacher]).flops == plan(16, 24, 8, batch=2, wanted="nothing").flops
    )


# --- what is planned is what happens --------------------------------------------------------------

EXECUTED = {
    "matrix": {"student": (16, 24, 12)},
    "gram": {"student": (128, 96, 4)},
    "unequal positions": {"student": (16, 24, 12), "teacher": (16, 24, 9)},
    "column norm": {"student": (128, 96, 4), "norm": "column"},
    "mse": {"student": (128, 96, 4), "norm": "mse"},
    "half": {"student": (16, 24, 12), "dtype": FP16},
    "double": {"student": (128, 96, 4), "dtype": FP64},
}


def executed_arguments(case: dict, wanted: tuple[bool, ...]) -> tuple[list, list, dict]:
    student = random_pair(*case["student"])
    teacher = random_pair(*case.get("teacher", case["student"]))
    dtype = case.get("dtype", FP32)
    maps = [
        x.to(dtype).requires_grad_(want)
        for x, want in zip((*student, *teacher), wanted, strict=True)
    ]
    return [tuple(maps[:2])], [tuple(maps[2:])], {"norm": case.get("norm", "frobenius")}


executed = pytest.mark.parametrize("case", EXECUTED.values(), ids=EXECUTED)
wanting = pytest.mark.parametrize(
    "wanted",
    [(False,) * 4, (True, True, False, False), (False, True, True, False), (True,) * 4],
    ids=["no gradients", "student's", "one of each", "all"],
)


@pytest.fixture
def plans_seen(monkeypatch) -> list[LossPlan]:
    """The plans that reach the torch backend."""
    seen: list[LossPlan] = []
    compute = TorchBackend.loss

    def loss(self, maps, plan, *rest):
        seen.append(plan)
        return compute(self, maps, plan, *rest)

    monkeypatch.setattr(TorchBackend, "loss", loss)
    return seen


@executed
@wanting
def test_explain_tells_the_plan_that_is_executed(plans_seen, case, wanted):
    student, teacher, options = executed_arguments(case, wanted)
    explained = fsp.explain(student, teacher, backend="torch", **options)
    fsp.fsp_loss(student, teacher, backend="torch", **options)
    assert plans_seen == [explained]


def test_explain_tells_the_plan_that_is_executed_without_gradients(plans_seen):
    student, teacher, _ = executed_arguments(EXECUTED["matrix"], (True,) * 4)
    with torch.no_grad():
        explained = fsp.explain(student, teacher, backend="torch")
        fsp.fsp_loss(student, teacher, backend="torch")
    assert plans_seen == [explained]
    assert explained.gradient_bytes == 0


@executed
@wanting
def test_planned_flops_are_those_of_the_products_executed(case, wanted):
    student, teacher, options = executed_arguments(case, wanted)
    explained = fsp.explain(student, teacher, backend="torch", **options)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        TorchBackend().loss([*student[0], *teacher[0]], explained, (1.0,))
    assert counter.get_total_flops() == explained.flops


@executed
@wanting
def test_planned_gradient_bytes_are_those_held_for_backward(case, wanted):
    student, teacher, options = executed_arguments(case, wanted)
    explained = fsp.explain(student, teacher, backend="torch", **options)
    with torch.no_grad():
        _, gradients = TorchBackend().loss([*student[0], *teacher[0]], explained, (1.0,))
    assert sum(g.nbytes for g in gradients) == explained.gradient_bytes


class ProductSizes(TorchDispatchMode):
    """Records how many samples each batched product takes."""

    def __init__(self):
        super().__init__()
        self.sizes: list[int] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in (torch.ops.aten.bmm, torch.ops.aten.baddbmm):
            self.sizes.append(args[-1].shape[0])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("shape", [(64, 56), (512, 7)], ids=["matrix", "gram"])
def test_samples_are_computed_a_chunk_at_a_time(shape):
    channels, side = shape
    batch = 45
    student, teacher = (
        [tuple(torch.randn(batch, channels, side, side, requires_grad=grad) for _ in range(2))]
        for grad in (True, False)
    )
    explained = fsp.explain(student, teacher, backend="torch")
    with torch.no_grad(), ProductSizes() as products:
        TorchBackend().loss([*student[0], *teacher[0]], explained, (1.0,))
    samples = explained.pairs[0].samples
    assert samples < batch
    assert set(products.sizes) == {samples, batch % samples or samples}
