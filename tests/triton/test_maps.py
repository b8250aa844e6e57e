"""How a map is described to the kernels: one stride or three, 64-bit offsets, aligned rows."""

from __future__ import annotations

import pytest
import torch
from layouts import LAYOUTS

from fsp_kernels.backends.triton.limits import access_of
from fsp_kernels.backends.triton.maps import layout_of
from fsp_kernels.loss_plan import MapPlan


def layout(x: torch.Tensor, size=None, pool="max"):
    return layout_of(x.shape, x.stride(), size, pool)


def empty(*shape: int, dtype=torch.float32, kind: str = "contiguous") -> torch.Tensor:
    return LAYOUTS[kind](torch.empty(shape, dtype=dtype))


def offsets(found, shape) -> torch.Tensor:
    """Where a layout says the elements of one sample are, ``(C, K)``, as kernels compute it."""
    channel, position = torch.arange(shape[1])[:, None], torch.arange(torch.Size(shape[2:]).numel())
    if found.flat.value:
        return channel * found.channel + position * found.width
    line = position // found.columns
    return (
        channel * found.channel
        + position % found.columns * found.width
        + line % found.rows * found.height
        + line // found.rows * found.depth
    )


SHAPES = [(2, 3, 5), (2, 3, 4, 6), (2, 3, 4, 1), (2, 3, 1, 6), (2, 1, 2, 3, 4), (2, 3, 1, 1)]


@pytest.mark.parametrize("shape", [*SHAPES, (2, 3, 2, 1, 4), (2, 3, 1, 3, 1)], ids=str)
@pytest.mark.parametrize("kind", LAYOUTS)
def test_a_layout_leads_to_every_element(kind, shape):
    x = empty(*shape, kind=kind)
    numbers = torch.arange(x.untyped_storage().nbytes() // 4, dtype=torch.int32)
    placed = numbers.as_strided(x.shape, x.stride(), 0)[0].flatten(1)
    assert torch.equal(offsets(layout(x), shape), placed)


@pytest.mark.parametrize(
    ("kind", "flat"),
    [
        ("contiguous", True),
        ("channels last", True),
        ("slice of channels", True),
        ("slice of channels-last channels", True),
        ("one sample for all", True),
        ("one channel for all", True),
        ("cropped", False),
        ("slice of space", False),
        ("spatial axes permuted", False),
        ("one position for all", False),
    ],
)
def test_positions_lie_a_stride_apart_or_do_not(kind, flat):
    assert layout(empty(2, 3, 4, 6, kind=kind)).flat.value is flat


def test_an_axis_of_one_position_does_not_count():
    for shape in ((2, 3, 1, 6), (2, 3, 6, 1), (2, 3, 1, 6, 1)):
        assert layout(empty(*shape, kind="cropped")).flat.value
    assert layout(empty(2, 3, 1, 1, kind="cropped")).flat.value


def test_tokens_are_always_flat():
    for kind in LAYOUTS:
        assert layout(empty(2, 3, 5, kind=kind)).flat.value


def test_all_positions_at_one_place_are_flat():
    x = torch.empty(2, 3, 1, 1).expand(2, 3, 4, 6)
    assert layout(x).flat.value
    assert layout(x).width == 0


def test_a_pooled_map_has_its_windows_and_is_not_flat():
    found = layout(empty(2, 3, 6, 8), (3, 2), "avg")
    assert [w.value for w in found.window] == [1, 2, 4]
    assert (found.rows, found.columns) == (3, 2)
    assert found.pool.value == "avg"
    assert not found.flat.value


def test_a_map_that_keeps_its_size_is_not_pooled():
    found = layout(empty(2, 3, 6, 8), (6, 8), "max")
    assert found.pool.value == "none"
    assert found.flat.value


@pytest.mark.parametrize(
    ("shape", "wide"),
    [
        ((1, 2, 1 << 15, 1 << 15), False),  # 2^31 elements, the last at 2^31 - 1
        ((1, 2, (1 << 15) + 1, 1 << 15), True),
        ((1 << 20, 2, 64, 64), False),  # a sample alone counts
    ],
    ids=str,
)
def test_offsets_within_a_sample_take_64_bits_where_32_do_not_do(shape, wide):
    assert layout(torch.empty(shape, device="meta")).wide.value is wide


def test_elements_of_a_pooled_row_are_counted_too():
    x = torch.empty(1, 1, 1 << 31, device="meta")  # the last at 2^31 - 1
    assert layout(x, (1 << 30,)).wide.value
    assert not layout(x[..., 2:], ((1 << 30) - 1,)).wide.value


def test_strides_count_not_elements():
    x = torch.empty(1, 4, 1 << 30, device="meta")[:, :, :2]
    assert layout(x).wide.value
    assert not layout(torch.empty(1, 1, 1, device="meta").expand(1, 1 << 20, 1 << 20)).wide.value


# --- units of rows --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "kind", "unit"),
    [
        ((2, 3, 8, 8), "contiguous", 16),
        ((2, 3, 14, 14), "contiguous", 4),
        ((2, 3, 2, 7), "contiguous", 2),
        ((2, 3, 7, 7), "contiguous", 1),
        ((2, 8, 7, 7), "channels last", 8),
        ((2, 6, 7, 7), "channels last", 2),
        ((2, 8, 8, 8), "every second channel", 16),
        ((2, 3, 8, 14), "cropped", 2),
        ((2, 3, 7, 7), "cropped", 1),
    ],
    ids=str,
)
def test_rows_are_read_by_the_largest_unit_that_always_lies_together(shape, kind, unit):
    assert layout(empty(*shape, kind=kind)).unit.value == unit


@pytest.mark.parametrize(
    ("shape", "size", "kind", "unit"),
    [
        ((2, 3, 16, 16), (8, 8), "contiguous", 16),
        ((2, 3, 14, 28), (7, 14), "contiguous", 4),
        ((2, 3, 14, 12), (7, 6), "contiguous", 4),
        ((2, 3, 6, 8), (2, 8), "contiguous", 8),
        ((2, 3, 4, 4, 24), (2, 2, 12), "contiguous", 8),
        ((2, 8, 6, 14), (3, 7), "cropped", 2),  # rows of 14 elements, 16 apart
        ((2, 3, 8, 12), (4, 3), "contiguous", 1),  # windows of 4, of which one element is read
        ((2, 16, 8, 8), (4, 4), "channels last", 1),
        ((2, 3, 8, 8), (4, 4), "spatial axes permuted", 1),
    ],
    ids=str,
)
def test_rows_of_pooled_maps_have_units_too(shape, size, kind, unit):
    assert layout(empty(*shape, kind=kind), size).unit.value == unit


def test_every_stride_but_that_of_a_row_is_divisible_by_its_unit():
    strides = [64, 32, 16, 1]
    assert layout(torch.empty(512).as_strided((2, 2, 2, 16), strides), (1, 8)).unit.value == 16
    for axis in range(3):
        odd = [*strides[:axis], strides[axis] + 4, *strides[axis + 1 :]]
        x = torch.empty(512).as_strided((2, 2, 2, 16), odd)
        assert layout(x, (1, 8)).unit.value == 4


@pytest.mark.parametrize(
    ("shape", "size", "kind", "span"),
    [
        ((2, 3, 6, 8), (3, 4), "contiguous", 2),
        ((2, 3, 6, 8), (6, 4), "cropped", 2),
        ((2, 3, 6, 8), (3, 8), "contiguous", 1),
        ((2, 3, 6, 8), (3, 2), "contiguous", 1),
        ((2, 3, 6, 9), (3, 3), "contiguous", 1),
        ((2, 3, 6, 8), (3, 4), "channels last", 1),
        ((2, 3, 6, 8), (3, 4), "spatial axes permuted", 1),
    ],
    ids=str,
)
def test_two_neighbours_of_a_window_are_read_at_once(shape, size, kind, span):
    assert layout(empty(*shape, kind=kind), size).span.value == span


def test_of_positions_that_are_apart_none_lie_together():
    assert layout(torch.empty(2, 8, 16)[..., ::4]).unit.value == 1


def test_samples_may_be_neighbours_in_memory():
    assert layout(torch.empty(2, 8, 4).as_strided((2, 8, 4), (1, 2, 16))).unit.value == 1


def test_a_row_ends_where_a_unit_does():
    """The last unit of a row must not reach into the next channel's."""
    x = torch.empty(160).as_strided((2, 5, 6), (80, 16, 1))
    assert layout(x).unit.value == 2


def access(x: torch.Tensor, size=None, mask=None) -> str:
    pool = "max" if size else "none"
    plan = MapPlan(tuple(x.shape), x.stride(), x.dtype, size, pool, None, mask)
    return access_of((plan, plan), (plan, plan))


@pytest.mark.parametrize(
    ("shape", "dtype", "kind", "wanted"),
    [
        ((2, 3, 8, 8), torch.float32, "contiguous", "aligned"),
        ((2, 3, 7, 7), torch.float32, "contiguous", "aligned"),
        ((2, 3, 14, 14), torch.float16, "contiguous", "aligned"),
        ((2, 3, 7, 7), torch.float16, "contiguous", "odd"),
        ((2, 6, 7, 7), torch.float16, "channels last", "aligned"),
        ((2, 3, 8, 8), torch.float32, "cropped", "scattered"),
    ],
    ids=str,
)
def test_rows_of_whole_4_bytes_are_aligned(shape, dtype, kind, wanted):
    assert access(empty(*shape, dtype=dtype, kind=kind)) == wanted


def test_rows_without_neighbours_are_not_aligned():
    assert access(torch.empty(2, 8, 16)[..., ::4]) == "odd"


def test_what_is_pooled_is_scattered():
    assert access(empty(2, 3, 8, 8), (4, 4)) == "scattered"


def test_a_mask_takes_positions_out_of_rows_but_not_channels():
    x = empty(2, 8, 4, 8)
    assert access(x, mask=0) == "odd"
    assert access(empty(2, 8, 4, 8, kind="channels last"), mask=0) == "aligned"
