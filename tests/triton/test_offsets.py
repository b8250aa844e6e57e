"""Every address of a tensor that needs 64 bits: what the last program touches of a huge call.

The tensors have no memory. Triton's interpreter computes the addresses, as on a GPU in 32 or 64
bits, and here they are only compared with where the elements of the tensors lie.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
import triton.language as tl
from calls import BF16, FP32, MATRIX_ROADS, ROADS
from triton.runtime import interpreter

import fsp_kernels as fsp
from fsp_kernels.backends import get_backend
from fsp_kernels.backends.triton import TritonBackend, configurations, elementwise
from fsp_kernels.backends.triton.launch import Launch

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="there is no interpreter at work on a GPU"
)

LIMIT = 1 << 31
FAR = 1 << 30  # a stride that fits 32 bits, and twice which does not
MANY = 1 << 25  # samples; a few hundred elements kept for each are more than 2^31
TYPES = {FP32: tl.float32, BF16: tl.bfloat16}


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
        masked = np.broadcast_to(mask.data.astype(bool), pointers.data.shape)
        addresses = pointers.data[masked].astype(np.int64)
        if addresses.size:
            place = int(addresses[0] + self.apart // 2) // self.apart - 1
            itemsize = pointers.get_element_ty().primitive_bitwidth // 8
            offsets = (addresses - (place + 1) * self.apart) // itemsize
            self._touched.setdefault(place, []).append(offsets.ravel())

    def touched(self, x: torch.Tensor) -> np.ndarray:
        return np.unique(np.concatenate(self._touched.get(self.place_of(x), [np.empty(0, int)])))


@pytest.fixture
def memory(monkeypatch, small) -> Memory:
    """Calls launch the last program alone, which loads zeros and stores nothing."""
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
        last = interpreter.TensorHandle(np.array([self.grid[0] - 1], np.int32), tl.int32)
        monkeypatch.setattr(builder, "create_get_program_id", lambda *_: last)
        count = interpreter.TensorHandle(np.array([self.grid[0]], np.int32), tl.int32)
        monkeypatch.setattr(builder, "create_get_num_programs", lambda *_: count)
        self.kernel[(1,)](*placed(tensors), *self.constants, *scalars)

    monkeypatch.setattr(builder, "create_masked_load", load)
    monkeypatch.setattr(builder, "create_masked_store", store)
    monkeypatch.setattr(Launch, "__call__", launch)
    monkeypatch.setattr(TritonBackend, "why_unsupported", lambda *_: None)
    small(CHUNK_BYTES={"cpu": 1 << 60, "cuda": 1 << 60})
    return memory


def huge(shape, strides, dtype=FP32, grad=True) -> torch.Tensor:
    return torch.empty_strided(shape, strides, dtype=dtype, device="meta").requires_grad_(grad)


def compute(student, teacher, **options) -> list[torch.Tensor]:
    """Launch the loss of one pair; its maps and their gradients."""
    teacher = teacher if isinstance(teacher, torch.Tensor) else tuple(teacher)
    maps = [*student, *([teacher] if isinstance(teacher, torch.Tensor) else teacher)]
    plan = fsp.explain([tuple(student)], [teacher], **options)
    return [*maps, *get_backend("triton").loss(maps, plan, [1.0])[1]]


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
    assert sum(memory.touched(x).size > 0 for x in tensors) >= min(3, len(tensors))
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


# The last program of tiles in parts has a later part, and the first reads the ready matrix.
@pytest.mark.parametrize(
    "regime", [x for x in MATRIX_ROADS if x != "tiles in parts"], indirect=True
)
def test_ready_matrices(memory, regime):
    student = [huge((3, c, *regime.size), (1, 1, 1, 1), regime.dtype) for c in regime.channels]
    teacher = huge((3, *regime.channels), (FAR, FAR // 2, FAR // 4), regime.dtype)
    check(memory, compute(student, teacher))
    assert memory.touched(teacher).max() > LIMIT


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


# --- within a matrix ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("block_m", "block_n", "norm", "wanted"),
    [(16, 1024, "frobenius", 0), (16, 1024, "frobenius", 1), (1024, 16, "column", None)],
)
def test_entries_of_a_residual(memory, small, block_m, block_n, norm, wanted):
    channels = 1 << 16
    tile = configurations.Configuration(block_m, block_n, 16, warps=4, stages=2)
    rows = [row._replace(configuration=tile) for row in configurations.rows()]
    with configurations.using(rows):
        small()
        shape, strides = (1, channels, 3, 6), (18 * channels, 18, 6, 1)
        maps = [huge(shape, strides, grad=i == wanted) for i in range(4)]
        check(memory, compute(maps[:2], maps[2:], norm=norm))
    (workspace,) = [x for x in memory.tensors if x.numel() == channels**2]
    assert memory.touched(workspace).max() == channels**2 - 1


# --- products and scalings ------------------------------------------------------------------------


@pytest.mark.parametrize("strides", [(FAR, 18, 1), (1, FAR, 1), (1, 1, FAR)], ids=str)
def test_operands_of_a_product(memory, strides):
    x, y = (huge((3, c, 18), strides) for c in (20, 17))
    get_backend("triton").matrix(x, y)
    check(memory, memory.tensors)
    assert memory.touched(x).max() >= LIMIT


def test_results_of_a_product(memory):
    x, y = (huge((1, 1 << 16, 3), (3 << 16, 3, 1)) for _ in range(2))
    out = get_backend("triton").matrix(x, y)
    assert memory.touched(out).max() == out.numel() - 1


def test_parts_of_a_product(memory, limits):
    limits(GPU_PROGRAMS=1 << 40, GPU_PART_POSITIONS=16, CHUNK_BYTES={"cpu": 1, "cuda": 1})
    x, y = (huge((1, 40_000, 48), (48 * 40_000, 48, 1)) for _ in range(2))
    get_backend("triton").matrix(x, y)
    (parts,) = [z for z in memory.tensors if z.numel() == 3 * 40_000**2]
    assert memory.touched(parts).max() == parts.numel() - 1


def test_scaled_gradients(memory, monkeypatch):
    monkeypatch.setattr(elementwise, "BLOCK", 1 << 20)  # each of two sweeps takes 2^30 elements
    gradient = huge((LIMIT + 5,), (1,), grad=False)
    factor = huge((), (), grad=False)
    (out,) = elementwise.scale([gradient], [BF16], factor, in_place=False)
    for x in (gradient, out):
        assert memory.touched(x).max() == LIMIT - 1
        assert memory.touched(x).size == 2 << 20
