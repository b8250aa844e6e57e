"""Maps pooled while they are read: windows, ties and what is not a number as PyTorch has them."""

from __future__ import annotations

import pytest
import torch
from calls import BF16, DTYPES, FP16, FP32, NORMS, POOLS, Regime, check, run, tensor
from tolerances import FUSED, assert_near, flatten, oracle

import fsp_kernels as fsp
from fsp_kernels.loss_plan import GPU_WINDOW

ONE_PASS = Regime((5, 6), (), "one pass")
SIZES = {
    "2 x 2 windows": ((6, 8), (3, 4)),
    "windows of an axis": ((8, 3), (2, 3)),
    "each map on its own axis": ((4, 3), (2, 6)),
    "tokens": ((12,), (4,)),
    "volumes": ((2, 4, 6), (2, 2, 3)),
    "volumes, each map on its own axes": ((4, 2, 3), (2, 4, 3)),
    "one window": ((6, 6), (1, 1)),
    "the largest window": ((8, 8), (1, 1)),
}
# Windows of several sizes, which overlap; or one too large to unroll.
POOLED_BEFORE = {
    "uneven": ((7, 8), (3, 5)),
    "uneven, each map on its own axis": ((7, 4), (5, 6)),
    "uneven tokens": ((7,), (5,)),
    "uneven volumes": ((3, 5, 4), (2, 5, 3)),
    "too large": ((9, 8), (1, 1)),
}


def pooled_pair(sizes, dtype=FP32, batch=2, channels=ONE_PASS.channels, **options):
    return tuple(
        tensor(batch, c, *size, dtype=dtype, **options)
        for c, size in zip(channels, sizes, strict=True)
    )


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_windows_of_one_size_are_pooled_while_they_are_read(sizes, pool):
    plan = check([pooled_pair(sizes)], [pooled_pair(sizes)], ONE_PASS, pool=pool)
    assert all(m.fused_windows for m in plan.maps)
    assert plan.workspace_bytes == 0


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("sizes", POOLED_BEFORE.values(), ids=POOLED_BEFORE)
def test_other_windows_are_pooled_before(sizes, pool):
    plan = check([pooled_pair(sizes)], [pooled_pair(sizes)], ONE_PASS, pool=pool)
    assert not all(m.fused_windows for m in plan.maps)
    assert plan.workspace_bytes > 0


@pytest.mark.parametrize("dtype", [FP16, BF16], ids=str)
@pytest.mark.parametrize("sizes", [((4, 6), (2, 3)), ((5, 6), (3, 4))], ids=["while", "before"])
def test_half_precision_maxima_are_halves_and_averages_are_not(sizes, dtype):
    for pool, halves in (("max", True), ("avg", False)):
        student, teacher = [pooled_pair(sizes, dtype)], [pooled_pair(sizes, dtype)]
        plan = check(student, teacher, ONE_PASS, pool=pool)
        assert plan.pairs[0].halves == halves


@pytest.mark.parametrize("layout", ["channels last", "cropped", "spatial axes permuted"])
@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("sizes", [((4, 6), (2, 3)), ((5, 6), (3, 4))], ids=["while", "before"])
def test_pooled_maps_may_lie_in_memory_in_any_way(sizes, pool, layout):
    student = [pooled_pair(sizes, layout=layout)]
    check(student, [pooled_pair(sizes)], ONE_PASS, pool=pool)


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize("pool", POOLS)
def test_a_gradient_of_a_pooled_map_may_lie_otherwise_than_the_map(pool, dtype):
    wide, second = pooled_pair(((4, 12), (2, 3)), dtype, grad=False)
    first = wide[..., ::2].requires_grad_()
    assert torch.empty_like(first).stride(-1) == 1
    check(
        [(first, second.requires_grad_())],
        [pooled_pair(((4, 6), (2, 3)), dtype)],
        ONE_PASS,
        pool=pool,
    )


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("regime", ["tiles"], indirect=True)
def test_tiles_are_pooled_while_they_are_read(regime, pool, norm):
    height, width = regime.size
    sizes = ((height, 2 * width), (height, width))
    student, teacher = ([pooled_pair(sizes, batch=1, channels=regime.channels)] for _ in range(2))
    check(student, teacher, regime, pool=pool, norm=norm)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("more", [0, 1], ids=["while", "before"])
@pytest.mark.parametrize("regime", ["tiles in parts"], indirect=True)
def test_pooled_positions_are_split(regime, more):
    height, width = regime.size
    sizes = ((2 * height + more, width), regime.size)
    student, teacher = ([pooled_pair(sizes, batch=1, channels=regime.channels)] for _ in range(2))
    check(student, teacher, regime)


def test_student_and_teacher_may_be_pooled_to_different_sizes():
    student, teacher = [pooled_pair(((4, 6), (2, 3)))], [pooled_pair(((6, 6), (3, 6)))]
    for pool in POOLS:
        check(student, teacher, ONE_PASS, pool=pool)


def test_a_map_is_pooled_beside_a_ready_matrix():
    check([pooled_pair(((4, 6), (2, 3)))], [tensor(2, 5, 6)], ONE_PASS)


# --- which element is the maximum -----------------------------------------------------------------


def supports(student, teacher):
    """Where gradients are not zero, by the kernels and by PyTorch."""
    tensors = flatten(student, teacher)
    _, *gradients = run(student, teacher)
    wanted = [g for g, x in zip(oracle(student, teacher).gradients, tensors, strict=True)]
    return [(g != 0, w != 0) for g, w in zip(gradients, wanted, strict=True)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", [*SIZES.values(), ((7, 5), (4, 3))], ids=str)
def test_the_first_of_equal_maxima_gets_the_gradient(sizes, dtype):
    # Every map is made of three values, so most windows tie.
    maps = [
        torch.randint(-1, 2, x.shape, device=x.device).to(dtype).requires_grad_()
        for _ in range(2)
        for x in pooled_pair(sizes, batch=1)
    ]
    check([tuple(maps[:2])], [tuple(maps[2:])], ONE_PASS)


def test_zeros_of_either_sign_are_equal():
    student, teacher = [pooled_pair(((4, 4), (2, 2)))], [pooled_pair(((2, 2), (2, 2)))]
    with torch.no_grad():
        student[0][0].zero_()[..., 1::2].neg_()
    for mine, wanted in supports(student, teacher):
        assert torch.equal(mine, wanted)


@pytest.mark.parametrize(
    "places", [[0], [3], [1, 2], [0, 3], [0, 1, 2, 3]], ids=lambda p: f"elements {p}"
)
@pytest.mark.parametrize("value", [float("nan"), -float("inf"), float("inf")], ids=str)
def test_what_is_not_a_number_is_chosen_as_pytorch_does(value, places):
    student, teacher = [pooled_pair(((4, 4), (2, 2)))], [pooled_pair(((4, 4), (2, 2)))]
    with torch.no_grad():
        window = student[0][0][1, 2, 2:, :2]
        for place in places:
            window[place // 2, place % 2] = value
    for mine, wanted in supports(student, teacher):
        assert torch.equal(mine, wanted)


def test_a_nan_in_a_window_does_not_reach_other_windows():
    student, teacher = [pooled_pair(((4, 4), (2, 2)))], [pooled_pair(((4, 4), (2, 2)))]
    with torch.no_grad():
        student[0][0][1, 2, 3, 3] = float("nan")
    loss, to_a, *_ = run(student, teacher)
    assert loss.isnan()
    assert to_a[0].isfinite().all()


@pytest.mark.parametrize("pool", POOLS)
def test_averages_of_windows_are_taken_in_fp32(pool):
    # In fp16 the sum of a window of these overflows, and its small terms are lost.
    student, teacher = [pooled_pair(((8, 8), (1, 1)), FP16)], [pooled_pair(((1, 1), (1, 1)), FP16)]
    with torch.no_grad():
        student[0][0].mul_(0.25).add_(3000)
    loss, *_ = run(student, teacher, pool=pool)
    bound = {"max": FUSED["matrix", FP16].loss, "avg": FUSED["matrix", FP32].loss}[pool]
    assert_near(loss, oracle(student, teacher, pool=pool).loss, bound, "no sum in fp16")


def test_the_largest_window_is_that_of_the_plan():
    sizes = ((8, 8), (1, 1))
    assert GPU_WINDOW == 64
    plan = fsp.explain([pooled_pair(sizes)], [pooled_pair(sizes)])
    assert all(m.fused_windows for m in plan.maps)
