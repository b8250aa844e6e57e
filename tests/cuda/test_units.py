"""How many bytes are read at a time: as many as every line of a map begins at a multiple of."""

from __future__ import annotations

import pytest
import torch
from calls import BF16, DEVICE, FP16, FP32, Regime, check, pair_of
from layouts import LAYOUTS

from fsp_kernels.backends.cuda import maps
from fsp_kernels.backends.cuda.extension import module

pytestmark = pytest.mark.usefixtures("small")
REGIMES = {
    "one pass": Regime((35, 40), (), "one pass"),
    "tiles": Regime((131, 140), (), "tiles"),
    "gram": Regime((140, 36), (), "one pass", form="gram"),
}
# Positions of maps whose rows are such multiples; in Gram form there are few.
SIZES = {
    ("one pass", BF16): {16: (6, 8), 8: (14, 14), 4: (6, 7), 2: (7, 7)},
    ("one pass", FP16): {16: (6, 8), 8: (14, 14), 4: (6, 7), 2: (7, 7)},
    ("one pass", FP32): {16: (6, 6), 8: (6, 7), 4: (7, 7)},
    ("tiles", BF16): {16: (6, 12), 8: (4, 19), 4: (7, 10), 2: (3, 25)},
    ("tiles", FP32): {16: (6, 12), 8: (7, 10), 4: (3, 25)},
    ("gram", BF16): {16: (2, 4), 8: (3, 4), 4: (3, 6), 2: (3, 5)},
    ("gram", FP32): {16: (3, 4), 8: (3, 6), 4: (3, 5)},
}
CASES = [
    (road, dtype, unit, size)
    for (road, dtype), sizes in SIZES.items()
    for unit, size in sizes.items()
]


def unit_of(x: torch.Tensor) -> int:
    """Of a map, by its strides."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module(), "Map", lambda **fields: fields["unit"])
        return maps.map_spec(0, x)


def shifted(x: torch.Tensor, elements: int) -> torch.Tensor:
    """The same that many elements after an address which is a multiple of 64 bytes."""
    room = x.new_full([x.numel() + elements], float("nan"))
    assert room.data_ptr() % 64 == 0
    return room[elements:].view(x.shape).copy_(x.detach()).requires_grad_()


def in_lines(x: torch.Tensor, line: int) -> torch.Tensor:
    """The same in lines of that many elements, NaN after the positions."""
    room = x.new_full([*x.shape[:2], line], float("nan"))[..., : x.shape[2]]
    return room.copy_(x.detach()).requires_grad_()


@pytest.mark.parametrize(("road", "dtype", "unit", "size"), CASES, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels last"])
def test_maps_are_read_by_units(road, dtype, unit, size, layout):
    regime = REGIMES[road]._replace(size=size)
    student, teacher = (
        [pair_of(regime, batch=2, dtypes=(dtype, dtype), layout=layout)] for _ in range(2)
    )
    if layout == "contiguous":
        assert unit_of(student[0][0]) == unit
    check(student, teacher, regime)


@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
@pytest.mark.parametrize("elements", [1, 2, 4])
@pytest.mark.parametrize("road", ["one pass", "gram"])
def test_addresses_may_be_multiples_of_less_than_strides_are(road, elements, dtype):
    size = (2, 8) if road == "gram" else (6, 8)
    regime = REGIMES[road]._replace(size=size)
    student, teacher = ([pair_of(regime, batch=2, dtypes=(dtype, dtype))] for _ in range(2))
    assert unit_of(student[0][0]) == 16
    moved = [tuple(shifted(x, elements) for x in pair) for pair in (student[0], teacher[0])]
    check([moved[0]], [moved[1]], regime)


@pytest.mark.parametrize(("dtype", "line", "unit"), [
    (BF16, 24, 16), (BF16, 28, 8), (BF16, 22, 4), (FP32, 24, 16), (FP32, 22, 8), (FP32, 23, 4),
], ids=str)  # fmt: skip
@pytest.mark.parametrize("road", ["one pass", "gram"])
def test_lines_may_end_within_a_unit(road, dtype, line, unit):
    regime = REGIMES[road]._replace(size=(21,))
    pairs = [pair_of(regime, dtypes=(dtype, dtype)) for _ in range(2)]
    student, teacher = ([tuple(in_lines(x, line) for x in pair)] for pair in pairs)
    assert unit_of(student[0][0]) == unit
    check(student, teacher, regime)


@pytest.mark.parametrize(
    "layout", ["every second position", "cropped", "slice of channels-last channels"]
)
def test_other_strides_have_units_of_their_own(layout):
    x = LAYOUTS[layout](torch.randn(2, 40, 6, 8, device=DEVICE))
    assert unit_of(x) == {"slice of channels-last channels": 4}.get(layout, 1)
