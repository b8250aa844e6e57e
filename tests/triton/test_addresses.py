"""Every address of a tensor that needs 64 bits: what the last program touches of a huge call.

The tensors have no memory. Triton's interpreter computes the addresses, as on a GPU in 32 or 64
bits, and here they are only compared with where the elements of the tensors lie.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from calls import BF16, FP32, MATRIX_ROADS, ROADS
from triton.runtime import interpreter

import fsp_kernels as fsp
from fsp_kernels.backends import get_backend
from fsp_kernels.backends.triton import TritonBackend, configurations
from fsp_kernels.backends.triton.launch import Launch
from fsp_kernels.backends.triton.maps import MapRef, layout_of, load_tile
from fsp_kernels.backends.triton.product import batched_product

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="there is no interpreter at work on a GPU"
)

LIMIT = 1 << 31
FAR = 1 << 30  # a stride that fits 32 bits, and twice which does not
MANY = 1 << 25  # samples; a few hundred elements kept for each are more than 2^31
TYPES = {FP32: tl.float32, BF16: tl.bfloat16, torch.int32: tl.int32}


class Memory:
    """Places for tensors, and which of their elements were touched there, by offset."""

    apart = 1 << 46  # bytes from one place to the next

    def __init__(self) -> None:
        self.tensors: list[torch.Tensor] = []
        self._touched: dict[int, list[np.ndarray]] = {}

    def place_of(self, x: torch.Tensor) -> int:
        for place, other in enumerate(self.tensors):
            if other is x:
                return place
        self.tensors.append(x)
        return len(self.tensors) - 1

    def pointer(self, x: torch.Tensor) -> tl.tensor:
        kind = tl.pointer_type(TYPES[x.dtype])
        address = np.array([(self.place_of(x) + 1) * self.apart], dtype=np.uint64)
        return tl.tensor(interpreter.TensorHandle(address, kind), kind)

    def touch(self, pointers: Any, mask: Any) -> None:
        addresses = pointers.data[mask.data.astype(bool)].astype(np.int64)
        if addresses.size:
            place = int(addresses[0] + self.apart // 2) // self.apart - 1
            itemsize = pointers.get_element_ty().primitive_bitwidth // 8
            offsets = (addresses - (place + 1) * self.apart) // itemsize
            self._touched.setdefault(place, []).append(offsets)

    def touched(self, x: torch.Tensor) -> np.ndarray:
        return np.unique(np.concatenate(self._touched.get(self.place_of(x), [np.empty(0, int)])))


@pytest.fixture
def memory(monkeypatch, small) -> Memory:
    """Calls launch the last programs alone, which load zeros and store nothing."""
    memory = Memory()
    builder = interpreter.InterpreterBuilder

    def load(self, pointers, mask, *rest):  # noqa: ARG001
        memory.touch(pointers, mask)
        kind = pointers.get_element_ty()
        zeros = np.zeros(pointers.data.shape, interpreter._get_np_dtype(kind))
        return interpreter.TensorHandle(zeros, kind)

    def store(self, pointers, value, mask, *rest):  # noqa: ARG001
        memory.touch(pointers, mask)

    def placed(tensors):
        if isinstance(tensors, tuple):
            return tuple(placed(x) for x in tensors)
        return None if tensors is None else memory.pointer(tensors)

    def launch(self, stream, tensors, *scalars):  # noqa: ARG001
        if self.kernel.__name__ == "fsp_finish":  # whose only program starts at 0
            return
        assert self.grid[0] < LIMIT
        for program in last_programs(self):
            last = interpreter.TensorHandle(np.array([program], np.int32), tl.int32)
            monkeypatch.setattr(builder, "create_get_program_id", lambda *_, last=last: last)
            self.kernel[(1,)](*placed(self.arrange(tensors)), *self.constants, *scalars)

    monkeypatch.setattr(builder, "create_masked_load", load)
    monkeypatch.setattr(builder, "create_masked_store", store)
    monkeypatch.setattr(Launch, "__call__", launch)
    monkeypatch.setattr(TritonBackend, "why_unsupported", lambda *_: None)
    small(CHUNK_BYTES={"cpu": 1 << 60, "cuda": 1 << 60})
    return memory


def last_programs(launch: Launch) -> list[int]:
    """Of a launch; in Gram form, of each side, and of each gradient."""
    grid = launch.grid[0]
    if launch.kernel.__name__ == "fsp_gram":
        return [grid - 2, grid - 1]
    if launch.kernel.__name__ == "fsp_gram_gradients":
        ((entry,), *_) = launch.constants
        gradients = sum(x is not None for x in entry.gradients)
        return [grid // gradients * (i + 1) - 1 for i in range(gradients)]
    return [grid - 1]


def huge(shape, strides, dtype=FP32, grad=True) -> torch.Tensor:
    return torch.empty_strided(shape, strides, dtype=dtype, device="meta").requires_grad_(grad)


def compute(student, teacher, mask=None, **options) -> list[torch.Tensor]:
    """Launch the loss of one pair; its maps and their gradients. Both networks have the mask."""
    teacher = teacher if isinstance(teacher, torch.Tensor) else tuple(teacher)
    maps = [*student, *([teacher] if isinstance(teacher, torch.Tensor) else teacher)]
    if mask is not None:
        options |= {"student_mask": mask, "teacher_mask": mask}
    plan = fsp.explain([tuple(student)], [teacher], **options)
    masks = [] if mask is None else [mask.flatten(1)]
    return [*maps, *get_backend("triton").loss(maps, plan, [1.0], masks)[1]]


def offsets_of_last_sample(x: torch.Tensor) -> np.ndarray:
    """Where its elements lie, in 64 bits."""
    found = np.array((x.shape[0] - 1) * x.stride(0))
    for size, stride in zip(x.shape[1:], x.stride()[1:], strict=True):
        found = found[..., None] + np.arange(size, dtype=np.int64) * stride
    return found.ravel()


def check(memory: Memory, tensors: Sequence[torch.Tensor]) -> None:
    """Of these, elements of the last sample were touched; of what was kept, up to its last ones."""
    batch = tensors[0].shape[0]
    for x in tensors:
        assert np.isin(memory.touched(x), offsets_of_last_sample(x)).all()
    assert sum(memory.touched(x).size > 0 for x in tensors) >= 2
    for x in memory.tensors:
        touched = memory.touched(x)
        if touched.size and not any(x is y for y in tensors):
            assert touched.min() >= 0
            assert x.numel() - x.numel() // batch <= touched.max() < x.numel()


# --- samples --------------------------------------------------------------------------------------


@pytest.mark.parametrize("regime", ROADS, indirect=True)
def test_samples_and_what_is_kept_for_them(memory, regime):
    size, dtype = regime.size, regime.dtype
    maps = [
        huge((MANY, c, *size), (1 << 10, *torch.empty(1, c, *size).stride()[1:]), dtype)
        for c in regime.channels * 2
    ]
    tensors = compute(maps[:2], maps[2:])
    check(memory, tensors)
    assert all(memory.touched(x).max() > LIMIT for x in maps)
    kept = [x for x in memory.tensors if not any(x is y for y in tensors) and x.numel() > LIMIT]
    assert bool(kept) == (regime.evaluation == "tiles" or regime.form == "gram")


@pytest.mark.parametrize("regime", ["one pass", "tiles"], indirect=True)
def test_ready_matrices(memory, regime):
    student = [huge((3, c, *regime.size), (1, 1, 1, 1), regime.dtype) for c in regime.channels]
    teacher = huge((3, *regime.channels), (FAR, FAR // 2, FAR // 4), regime.dtype)
    check(memory, compute(student, teacher))
    assert memory.touched(teacher).max() > LIMIT


@pytest.mark.parametrize("regime", MATRIX_ROADS, indirect=True)
def test_rows_of_a_mask(memory, regime):
    batch, size = LIMIT // math.prod(regime.size) + 2, regime.size
    strides = (1 << 10, *torch.empty(1, 1, *size).stride()[1:])
    maps = [huge((batch, c, *size), strides, regime.dtype) for c in regime.channels * 2]
    mask = huge((batch, *size), (math.prod(size), size[1], 1), torch.bool, grad=False)
    check(memory, compute(maps[:2], maps[2:], mask))
    (read,) = [x for x in memory.tensors if x.dtype == torch.int32]
    assert np.isin(memory.touched(read), offsets_of_last_sample(read)).all()
    assert memory.touched(read).max() >= LIMIT


# --- within a sample ------------------------------------------------------------------------------

FAR_APART = {
    "channels": (1, FAR, 3, 1),
    "positions": (1, 1, 3 * FAR, FAR),
    "rows": (1, 1, FAR, 3),
    "columns": (1, 1, 3, FAR),
}


@pytest.mark.parametrize("strides", FAR_APART.values(), ids=FAR_APART)
@pytest.mark.parametrize("regime", ROADS, indirect=True)
def test_elements_of_a_sample(memory, regime, strides):
    size = (3, 1) if strides == FAR_APART["rows"] and regime.form == "gram" else regime.size
    maps = [huge((2, c, *size), strides, regime.dtype) for c in regime.channels * 2]
    check(memory, compute(maps[:2], maps[2:]))
    assert max(memory.touched(x).max() for x in maps) >= LIMIT


@pytest.mark.parametrize("axis", ["depth", "height", "width"])
@pytest.mark.parametrize("pool", ["max", "avg"])
def test_elements_of_a_window(memory, regimes, pool, axis):
    m, n = regimes["one pass"].channels
    strides = [FAR if axis == name else 1 for name in ("depth", "height", "width")]
    first = [huge((2, m, 3, 6, 3), (1, 1, *strides)) for _ in range(2)]
    second = [huge((2, n, 1, 2, 1), (2 * n, 2, 2, 1, 1)) for _ in range(2)]
    check(memory, compute((first[0], second[0]), (first[1], second[1]), pool=pool))
    assert memory.touched(first[0]).max() > LIMIT


@pytest.mark.parametrize("axis", ["depth", "height"])
@pytest.mark.parametrize("pool", ["max", "avg"])
def test_two_neighbours_of_a_window(memory, regimes, pool, axis):
    m, n = regimes["one pass"].channels
    strides = [FAR if axis == name else 4 for name in ("depth", "height")]
    first = [huge((2, m, 3, 6, 4), (1 << 12, 1, *strides, 1)) for _ in range(2)]
    second = [huge((2, n, 1, 2, 2), (4 * n, 4, 4, 2, 1)) for _ in range(2)]
    check(memory, compute((first[0], second[0]), (first[1], second[1]), pool=pool))
    assert memory.touched(first[0]).max() > LIMIT


@triton.jit
def last_tile(pointer, layout, position, positions, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr):
    sample = tl.program_id(0)
    load_tile(MapRef(pointer, layout, 1, positions, None), sample, 0, position, BLOCK_C, BLOCK_K)


@pytest.mark.parametrize("size", [LIMIT, LIMIT + 64, 2 * LIMIT - 64])
def test_elements_of_a_pooled_row(memory, size):
    x = huge((1, 1, size), (size, size, 1))
    layout = layout_of(x.shape, x.stride(), (size // 2,), "max")
    last_tile[(1,)](memory.pointer(x), layout, size // 2 - 16, size // 2, 16, 16)
    assert memory.touched(x).tolist() == [*range(size - 32, size)]


# --- within a matrix ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("block_m", "block_n", "norm", "wanted"),
    [(16, 2048, "frobenius", 0), (16, 2048, "frobenius", 1), (2048, 16, "column", None)],
)
def test_entries_of_a_residual(memory, small, block_m, block_n, norm, wanted):
    m, n = 1 << 16, (1 << 15) + 1
    tile = configurations.Configuration(block_m, block_n, 16, warps=4, stages=2)
    rows = [row._replace(configuration=tile) for row in configurations.rows()]
    with configurations.using(rows):
        small()
        maps = [
            huge((1, c, 5, 1), (5 * c, 5, 1, 1), grad=i == wanted)
            for i, c in enumerate((m, n, m, n))
        ]
        check(memory, compute(maps[:2], maps[2:], norm=norm))
    (workspace,) = [x for x in memory.tensors if x.numel() == m * n]
    assert memory.touched(workspace).max() == m * n - 1


# --- products -------------------------------------------------------------------------------------


@pytest.mark.parametrize("strides", [(FAR, 18, 1), (1, FAR, 1), (1, 1, FAR)], ids=str)
def test_operands_of_a_product(memory, strides):
    batch, row, column = strides
    x, y = huge((3, 20, 18), strides), huge((3, 18, 17), (batch, column, row))
    batched_product(x, y, torch.empty(3, 20, 17, device="meta"), 1.0)
    check(memory, [x, y])
    assert memory.touched(x).max() >= LIMIT


def test_results_of_a_product(memory):
    m, n = 1 << 16, (1 << 15) + 1
    x, y = huge((1, m, 3), (3 * m, 3, 1)), huge((1, 3, n), (3 * n, n, 1))
    for out in (huge((1, m, n), (m * n, n, 1)), huge((1, m, n), (m * n, 1, m))):
        batched_product(x, y, out, 1.0)
        check(memory, [x, y])
        assert memory.touched(out).max() == m * n - 1


def test_parts_of_a_product(memory, limits):
    limits(GPU_PROGRAMS=1 << 40, GPU_PART_POSITIONS=16)
    m, parts = 40_000, 3
    x, y = huge((1, m, 48), (48 * m, 48, 1)), huge((1, 48, m), (48 * m, 1, 48))
    batched_product(x, y, torch.empty(1, m, m, device="meta"), 1.0)
    check(memory, [x, y])
    (partial,) = [z for z in memory.tensors if z.numel() == parts * m * m]
    assert memory.touched(partial).max() == parts * m * m - 1
