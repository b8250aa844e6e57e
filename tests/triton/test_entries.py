"""What kernels are told of a pair: blocks that hold its channels, strides, samples of a chunk."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from calls import BF16, DEVICE, FP32

import fsp_kernels as fsp
from fsp_kernels.backends.triton.configurations import configuration_of
from fsp_kernels.backends.triton.entries import COMBINED, PlannedPair
from fsp_kernels.backends.triton.residual import MatrixLayout

CHANNELS, SIZE = (20, 150), (6, 3)


def maps(dtype=FP32, size=SIZE, batch=5, channels=CHANNELS):
    return [torch.empty(batch, c, *size, dtype=dtype, device=DEVICE) for c in channels]


def mask_of(x):
    """A mask of the map ``x``."""
    return torch.ones(x.shape[0], *x.shape[2:], dtype=torch.bool, device=DEVICE)


def pair_of(
    student, teacher, wanted=(0, 1), precision="tf32x3", masks=(None, None), **changes
) -> PlannedPair:
    """A pair as the loss prepares it; ``changes`` are of its plan."""
    teacher = [teacher] if isinstance(teacher, torch.Tensor) else teacher
    tensors = [x.requires_grad_(i in wanted) for i, x in enumerate([*student, *teacher])]
    entry = tuple(tensors[2:]) if len(tensors) == 4 else tensors[2]
    options = {"student_mask": masks[0], "teacher_mask": masks[1]}
    (plan,) = fsp.explain([tuple(tensors[:2])], [entry], **options).pairs
    tensors += [None] * (4 - len(tensors))
    gradients = [torch.empty_like(x) if i in wanted else None for i, x in enumerate(tensors)]
    slots = [None if x is None else x.detach() for x in tensors] + gradients
    return PlannedPair(0, dataclasses.replace(plan, **changes), slots, "sm_80", precision)


@pytest.fixture(autouse=True)
def _triton(backend):
    return backend


def test_blocks_of_one_pass_are_powers_of_two_that_hold_the_channels():
    student, teacher = maps(channels=(5, 50)), maps(channels=(5, 50))
    entry, _ = pair_of(student, teacher).one_pass_entry()
    assert (entry.m.value, entry.n.value) == (5, 50)
    assert (entry.block_m.value, entry.block_n.value) == (16, 64)  # 16 is the smallest there is


def test_an_entry_has_the_strides_of_each_map_and_of_each_wanted_gradient():
    a, b = maps()
    a = a.to(memory_format=torch.channels_last)
    entry, _ = pair_of((a, b), maps(), wanted=(1,)).residual_entry(0)
    assert entry.layouts[0].sample == a.stride(0)
    assert entry.layouts[0].channel == a.stride(1)
    assert entry.layouts[1].channel == b.stride(1)
    assert [x is not None for x in entry.gradients] == [False, True, False, False]


def test_the_last_chunk_has_the_samples_that_are_left():
    pair = pair_of(maps(), maps(), samples=2)
    entries = [pair.residual_entry(chunk)[0] for chunk in range(3)]
    assert [(x.first_sample, x.samples) for x in entries] == [(0, 2), (2, 2), (4, 1)]


def test_tiles_are_the_tables_and_narrow_where_they_would_not_fill_a_device():
    pair = pair_of(maps(BF16), maps(BF16))
    c = configuration_of("residual", "half", "sm_80", "aligned", max(CHANNELS))
    entry, warps = pair.residual_entry(0)
    assert warps == c.warps
    assert entry.block_m.value == c.block_m
    assert entry.block_n.value == min(c.block_m, c.block_n)
    combined = pair.combine_entry(entry)
    assert combined.block_m.value == combined.block_n.value == COMBINED


def test_each_wanted_map_has_an_entry_for_its_gradient():
    pair = pair_of(maps(), maps(size=(3, 3)), wanted=(0, 1, 3))
    residual, _ = pair.residual_entry(0)
    (a, to_a, _), (b, to_b, _), (d, to_d, _) = pair.gradient_entries(residual)
    m, n = CHANNELS
    assert (a, b, d) == (0, 1, 3)
    assert (to_a.own_channels.value, to_a.other_channels.value) == (m, n)
    assert (to_b.own_channels.value, to_b.other_channels.value) == (n, m)
    assert to_a.slope == MatrixLayout(m * n, n, 1)
    assert to_b.slope == to_d.slope == MatrixLayout(m * n, 1, n)  # read across
    assert (to_a.positions, to_d.positions) == (18, 9)
    assert (to_a.ratio, to_d.ratio) == (1.0, -2.0)  # a teacher's part is subtracted, over its own K


@pytest.mark.parametrize(
    ("masked", "ratio"),
    [((True, False), -1 / 9), ((False, True), -18), ((True, True), -1)],
    ids=["the student's", "the teacher's", "both"],
)
def test_the_ratio_leaves_out_what_a_mask_counts(masked, ratio):
    student, teacher = maps(), maps(size=(3, 3))
    masks = [
        mask_of(x) if wanted else None
        for x, wanted in zip((student[0], teacher[0]), masked, strict=True)
    ]
    pair = pair_of(student, teacher, wanted=(0, 2), masks=masks)
    (_, to_a, _), (_, to_c, _) = pair.gradient_entries(pair.residual_entry(0)[0])
    assert (to_a.ratio, to_c.ratio) == (1, ratio)


@pytest.mark.parametrize("wanted", [(0,), (0, 2)], ids=["maps alone", "and the matrix"])
def test_a_ready_matrix_has_its_own_strides_and_no_gradient_entry(wanted):
    matrix = torch.empty(5, *reversed(CHANNELS), device=DEVICE).mT
    pair = pair_of(maps(), matrix, wanted=wanted)
    residual, _ = pair.residual_entry(0)
    assert residual.layouts[2] == MatrixLayout(*matrix.stride())
    assert pair.wants_matrix_gradient == (2 in wanted)
    assert [own for own, *_ in pair.gradient_entries(residual)] == [0]


def test_a_chip_without_a_row_is_named():
    pair = pair_of(maps(), maps())
    with pytest.raises(AssertionError, match="no row of one_pass for sm_80"):
        pair._configuration("one_pass", 10_000)
