"""Maps, gradients and workspaces whose elements lie more than 2^31 elements apart.

Nothing is as large as it looks: the system gives memory to those pages only that are touched.
"""

from __future__ import annotations

import mmap

import pytest
import torch
from calls import BF16, DEVICE, FP32, ROADS, check, four_of, pair_of, tensor
from cuda_entries import flat_map, plain_product

from fsp_kernels.backends import get_backend
from fsp_kernels.backends.cuda.extension import module

pytestmark = [
    pytest.mark.usefixtures("small"),
    pytest.mark.skipif(DEVICE == "cuda", reason="a GPU has no memory that is only reserved"),
]
FAR = 1 << 31  # in 32 bits every second multiple is 0, and the others are negative
AXES = {"samples": 0, "channels": 1, "rows": 2, "columns": 3}
empty_like = torch.empty_like


def reserved(elements: int, dtype: torch.dtype) -> torch.Tensor:
    """Zeros in memory that is only promised."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)
    return torch.frombuffer(mmap.mmap(-1, elements * dtype.itemsize, flags=flags), dtype=dtype)


def far_apart(x: torch.Tensor, axis: int) -> torch.Tensor:
    """A copy with neighbours along one axis that far apart; what precedes it is there, too."""
    strides = list(torch.empty(x.shape, device="meta").stride())
    strides[axis] = FAR
    room = reserved(FAR * (x.shape[axis] + 1) + x.numel(), x.dtype)
    copy = room.as_strided(x.shape, strides, FAR).copy_(x.detach())
    return copy.requires_grad_(x.requires_grad)


def is_far_apart(x: torch.Tensor) -> bool:
    return FAR in x.stride()


@pytest.fixture
def _gradients_far_apart(monkeypatch):
    """Gradients lie as their maps do, which PyTorch does not do for maps with gaps."""

    def like(x, **options):
        if not is_far_apart(x):
            return empty_like(x, **options)
        dtype = options.get("dtype", x.dtype)
        return far_apart(torch.empty(x.shape, dtype=dtype), x.stride().index(FAR))

    monkeypatch.setattr(torch, "empty_like", like)


@pytest.mark.usefixtures("_gradients_far_apart")
@pytest.mark.parametrize("axis", AXES.values(), ids=AXES)
@pytest.mark.parametrize("regime", ROADS, indirect=True)
def test_maps_and_gradients(regime, axis):
    (student,), (teacher,) = four_of(regime, batch=2)
    student, teacher = (tuple(far_apart(x, axis) for x in pair) for pair in (student, teacher))
    check([student], [teacher], regime)


@pytest.mark.usefixtures("_gradients_far_apart")
@pytest.mark.parametrize("axis", [2, 3], ids=["rows", "columns"])
@pytest.mark.parametrize("pool", ["max", "avg"])
def test_windows(regimes, pool, axis):
    regime = regimes["one pass"]
    size = [2 * x for x in regime.size]
    first, second = pair_of(regime, size=size)[0], pair_of(regime)[1]
    check([(far_apart(first, axis), second)], [pair_of(regime)], regime, pool=pool)


@pytest.mark.usefixtures("_gradients_far_apart")
@pytest.mark.parametrize("axis", [0, 1, 2], ids=["samples", "lines", "columns"])
@pytest.mark.parametrize("regime", ["one pass", "tiles"], indirect=True)
def test_ready_matrices_and_their_gradients(regime, axis):
    matrix = far_apart(tensor(2, *regime.channels, dtype=regime.dtype), axis)
    check([pair_of(regime, batch=2)], [matrix], regime)


@pytest.mark.parametrize("axis", [0, 1, 2], ids=["samples", "lines", "columns"])
def test_products(axis):
    x, y, out = (tensor(2, *shape, grad=False) for shape in ((3, 4), (4, 5), (3, 5)))
    x, y, out = (far_apart(operand, axis) for operand in (x, y, out))
    get_backend("cuda").product(x, y, out, 1)
    torch.testing.assert_close(out, x @ y)


@pytest.mark.parametrize("scalar", ["fp32", "bf16"])
def test_workspaces_in_parts(scalar):
    of = module()
    a, b = torch.randn(2, 2, 3, 65).to({"fp32": FP32, "bf16": BF16}[scalar])
    maps = [flat_map(of, i, *x.stride(), scalar) for i, x in enumerate((a, b))]
    parts = flat_map(of, 2, 2 * FAR, 3, 1, "fp32")
    fields = {
        "out": parts,
        "out_part": FAR,
        "samples": 2,
        "channels": (3, 3),
        "positions": (65, 65),
        "parts": 2,
        "split": True,
    }
    residual, combine = of.LaunchSequence(0, "a residual"), of.LaunchSequence(0, "its parts")
    pair = plain_product(of, maps=[*maps, None, None], **fields)
    residual.add_residual(getattr(of.Scalar, scalar), [pair])
    combined = plain_product(of, maps=[parts, None, None, None], finishes=True, **fields)
    combine.add_combine([combined])
    stored, loss = reserved(5 * FAR, FP32), torch.zeros(())
    for program in (residual, combine):
        partials = torch.zeros(program.partials)
        program(0, [x.data_ptr() for x in (a, b, stored, partials, loss)], [1.0])
    expected = torch.einsum("bik,bjk->bij", a.double(), b.double())
    found = stored.as_strided((2, 3, 3), (2 * FAR, 3, 1)) * 65 / 2  # slopes
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(loss.double(), expected.square().sum(), rtol=1e-5, atol=0)


def test_partial_losses_are_counted_in_64_bits():
    of = module()
    program = of.LaunchSequence(0, "many partial losses")
    for _ in range(4):
        program.add_residual(of.Scalar.fp32, [plain_product(of, samples=1 << 30, finishes=True)])
    assert program.partials == 1 << 32
