"""Pooling and its gradient, held to ``torch.nn.functional.adaptive_*_pool*``."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fsp_kernels.pooling import pool, unpool

ADAPTIVE = {
    ("max", 1): F.adaptive_max_pool1d,
    ("max", 2): F.adaptive_max_pool2d,
    ("max", 3): F.adaptive_max_pool3d,
    ("avg", 1): F.adaptive_avg_pool1d,
    ("avg", 2): F.adaptive_avg_pool2d,
    ("avg", 3): F.adaptive_avg_pool3d,
}

# From a spatial size to a smaller one.
SIZES = [
    pytest.param((12,), (4,), id="1d integer"),
    pytest.param((10,), (3,), id="1d fractional"),
    pytest.param((9,), (1,), id="1d to one position"),
    pytest.param((8, 8), (4, 4), id="2d integer"),
    pytest.param((8, 6), (8, 3), id="2d one axis only"),
    pytest.param((7, 9), (3, 4), id="2d fractional"),
    pytest.param((8, 9), (4, 4), id="2d integer and fractional"),
    pytest.param((7, 7), (1, 1), id="2d to one position"),
    pytest.param((32, 48), (2, 2), id="2d large windows"),
    pytest.param((33, 31), (2, 3), id="2d large fractional windows"),
    pytest.param((1, 6), (1, 2), id="2d of height one"),
    pytest.param((4, 6, 8), (2, 3, 4), id="3d integer"),
    pytest.param((5, 7, 3), (2, 3, 3), id="3d fractional"),
    pytest.param((4, 4, 4), (1, 1, 1), id="3d to one position"),
]


def contiguous(x: Tensor) -> Tensor:
    return x.contiguous()


def channels_last(x: Tensor) -> Tensor:
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


def transposed(x: Tensor) -> Tensor:
    """The last axis outermost among the spatial ones, so they cannot be flattened as a view."""
    return x.movedim(-1, 2).contiguous().movedim(2, -1)


def every_second(x: Tensor) -> Tensor:
    """A view that skips every second element of the last axis."""
    wide = x.new_full((*x.shape[:-1], 2 * x.shape[-1]), 1e9)
    wide[..., ::2] = x
    return wide[..., ::2]


def channel_slice(x: Tensor) -> Tensor:
    wide = torch.cat([x.new_full(x.shape, 1e9), x], dim=1)
    return wide[:, x.shape[1] :]


LAYOUTS = [contiguous, channels_last, transposed, every_second, channel_slice]
Data = Callable[[tuple[int, ...]], Tensor]


def smooth(shape: tuple[int, ...]) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def tied(shape: tuple[int, ...]) -> Tensor:
    """ReLU outputs rounded to integers: most are zero and most windows have several maxima."""
    return smooth(shape).round().relu()


def with_nan(shape: tuple[int, ...]) -> Tensor:
    """Some windows hold one NaN, some several, some infinities of both signs."""
    x = smooth(shape)
    choice = torch.rand(shape, generator=torch.Generator().manual_seed(1))
    for bound, value in ((0.3, -torch.inf), (0.15, torch.inf), (0.1, torch.nan)):
        x[choice < bound] = value
    return x


def expected_value(x: Tensor, size: tuple[int, ...], mode: str) -> Tensor:
    return ADAPTIVE[mode, len(size)](x.contiguous(), size)


def expected_gradient(x: Tensor, size: tuple[int, ...], mode: str, incoming: Tensor) -> Tensor:
    leaf = x.detach().contiguous().requires_grad_()
    pooled = ADAPTIVE[mode, len(size)](leaf, size)
    pooled.backward(incoming.view(pooled.shape).to(leaf.dtype))
    return leaf.grad


def gradient_into(out: Tensor, x: Tensor, size: tuple[int, ...], mode: str, incoming: Tensor):
    _, indices = pool(x, size, mode, indexed=True)
    unpool(incoming.flatten(2), out, size, mode, indices)
    return out


def incoming_for(x: Tensor, size: tuple[int, ...]) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randn((*x.shape[:2], *size), generator=generator).to(x.dtype)


# --- values ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("indexed", [True, False], ids=["indexed", "not indexed"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("data", [smooth, tied, with_nan])
@pytest.mark.parametrize(("full", "part"), SIZES)
def test_max_is_exactly_that_of_pytorch(full, part, data, layout, indexed):
    x = layout(data((2, 3, *full)))
    value, _ = pool(x, part, "max", indexed)
    # A maximum is one of its inputs: no rounding, so no tolerance.
    wanted = expected_value(x, part, "max")
    torch.testing.assert_close(value.view(wanted.shape), wanted, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("data", [smooth, tied, with_nan])
@pytest.mark.parametrize(("full", "part"), SIZES)
def test_average_is_that_of_pytorch(full, part, data, layout):
    x = layout(data((2, 3, *full)))
    value, _ = pool(x, part, "avg", indexed=False)
    # The order of at most 768 summands of size 1 is free: some ten ulp of fp32 at the magnitude
    # of the partial sums, divided by the window again.
    wanted = expected_value(x, part, "avg")
    torch.testing.assert_close(
        value.view(wanted.shape), wanted, rtol=1e-5, atol=1e-6, equal_nan=True
    )


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("data", [smooth, tied, with_nan])
@pytest.mark.parametrize(("full", "part"), SIZES)
def test_index_of_the_maximum_is_the_one_pytorch_chooses(full, part, data, layout):
    x = layout(data((2, 3, *full)))
    _, indices = pool(x, part, "max", indexed=True)
    _, wanted = ADAPTIVE["max", len(part)](x.contiguous(), part, return_indices=True)
    assert torch.equal(indices.view(wanted.shape), wanted)


def test_average_has_no_indices():
    assert pool(smooth((1, 2, 4, 4)), (2, 2), "avg", indexed=True)[1] is None


@pytest.mark.parametrize("mode", ["max", "avg"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("full", "part"), SIZES)
def test_the_pooled_map_flattens_to_positions(full, part, layout, mode):
    x = layout(smooth((2, 3, *full)))
    value, _ = pool(x, part, mode, indexed=True)
    wanted = expected_value(x, part, mode).flatten(2)
    torch.testing.assert_close(value.flatten(2), wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("mode", ["max", "avg"])
@pytest.mark.parametrize("indexed", [True, False], ids=["indexed", "not indexed"])
@pytest.mark.parametrize(("full", "part"), SIZES)
def test_the_input_is_left_as_it_was(full, part, indexed, mode):
    x = smooth((2, 3, *full))
    before = x.clone()
    pool(x, part, mode, indexed)
    assert torch.equal(x, before)


@pytest.mark.parametrize("mode", ["max", "avg"])
def test_double_precision_stays_double(mode):
    x = smooth((2, 3, 8, 9)).double()
    for part in ((4, 3), (3, 4)):  # integer and fractional windows
        value, _ = pool(x, part, mode, indexed=False)
        # Thirty summands of size 1 in float64.
        torch.testing.assert_close(value, expected_value(x, part, mode), rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("mode", ["max", "avg"])
@pytest.mark.parametrize("indexed", [True, False], ids=["indexed", "not indexed"])
def test_one_channel(indexed, mode):
    x = smooth((2, 1, 6, 6))
    value, _ = pool(x, (3, 2), mode, indexed)
    torch.testing.assert_close(value, expected_value(x, (3, 2), mode), rtol=1e-5, atol=1e-6)


# --- gradients ------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["max", "avg"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("data", [smooth, tied, with_nan])
@pytest.mark.parametrize(("full", "part"), SIZES)
def test_gradient_is_that_of_pytorch(full, part, data, layout, mode):
    x = layout(data((2, 3, *full)))
    incoming = incoming_for(x, part)
    out = torch.full_like(x, torch.nan)  # an element left unwritten would show
    gradient_into(out, x, part, mode, incoming)
    # An element is reached by at most 2 to 8 overlapping windows, added in any order.
    wanted = expected_gradient(x, part, mode, incoming)
    torch.testing.assert_close(out, wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("mode", ["max", "avg"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradient_fills_an_output_of_any_strides(layout, mode):
    x = smooth((2, 3, 7, 9))
    incoming = incoming_for(x, (3, 4))
    out = layout(torch.full_like(x, torch.nan))
    gradient_into(out, x, (3, 4), mode, incoming)
    wanted = expected_gradient(x, (3, 4), mode, incoming)
    torch.testing.assert_close(out, wanted, rtol=1e-6, atol=1e-6)


def test_gradient_of_a_slice_leaves_its_neighbours_alone():
    x = smooth((2, 3, 7, 9))
    for mode in ("max", "avg"):
        base = torch.full((2, 6, 7, 9), 5.0)
        gradient_into(base[:, 3:], x, (3, 4), mode, incoming_for(x, (3, 4)))
        assert (base[:, :3] == 5).all()
        assert not (base[:, 3:] == 5).any()


# The gradient is computed in fp32. One rounding to the output's dtype per overlapping window
# (up to four in two dimensions), each half an ulp of a partial sum below 4.
OTHER_DTYPES = [(torch.float64, 1e-6), (torch.bfloat16, 4 * 2**-7), (torch.float16, 4 * 2**-10)]


@pytest.mark.parametrize(("dtype", "atol"), OTHER_DTYPES, ids=lambda v: str(v))
@pytest.mark.parametrize("layout", [contiguous, channels_last, transposed])
@pytest.mark.parametrize("mode", ["max", "avg"])
@pytest.mark.parametrize("part", [(4, 3), (3, 4)], ids=["integer", "fractional"])
def test_gradient_fills_an_output_of_another_dtype(part, mode, layout, dtype, atol):
    x = smooth((2, 3, 8, 9))
    incoming = incoming_for(x, part)
    out = layout(torch.full_like(x, torch.nan, dtype=dtype))
    gradient_into(out, x, part, mode, incoming)
    assert out.dtype == dtype
    wanted = expected_gradient(x, part, mode, incoming)
    torch.testing.assert_close(out.float(), wanted, rtol=0, atol=atol)


@pytest.mark.parametrize("mode", ["max", "avg"])
@pytest.mark.parametrize(("full", "part"), SIZES)
def test_gradient_may_arrive_transposed(full, part, mode):
    """Products write the gradient of a channels-last map channels last too."""
    x = smooth((2, 3, *full))
    incoming = incoming_for(x, part)
    flat = incoming.flatten(2).mT.contiguous().mT
    out = torch.full_like(x, torch.nan)
    _, indices = pool(x, part, mode, indexed=True)
    unpool(flat, out, part, mode, indices)
    wanted = expected_gradient(x, part, mode, incoming)
    torch.testing.assert_close(out, wanted, rtol=1e-6, atol=1e-6)


def test_among_ties_one_element_receives_the_gradient():
    x = torch.zeros(1, 1, 2, 4)
    out = torch.full_like(x, torch.nan)
    gradient_into(out, x, (1, 2), "max", torch.tensor([[[[3.0, 5.0]]]]))
    assert out.tolist() == [[[[3.0, 0.0, 5.0, 0.0], [0.0, 0.0, 0.0, 0.0]]]]


def test_average_spreads_the_gradient_evenly():
    x = torch.zeros(1, 1, 2, 4)
    out = torch.full_like(x, torch.nan)
    gradient_into(out, x, (1, 2), "avg", torch.tensor([[[[4.0, 8.0]]]]))
    assert out.tolist() == [[[[1.0, 1.0, 2.0, 2.0], [1.0, 1.0, 2.0, 2.0]]]]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("data", [tied, with_nan])
@pytest.mark.parametrize(
    ("channels", "full", "size"),
    [(64, (32, 32), (16, 16)), (60, (64, 32), (9, 32)), (64, (8, 8, 16), (4, 8, 4))],
)
def test_planes_of_a_power_of_two_are_transposed_sample_by_sample(
    channels, full, size, data, layout, monkeypatch
):
    """Most caches hold few of their rows at once, so they take another way to channels-last."""
    transposed_by_sample = []
    real = Tensor.copy_

    def copy_(self, *args):
        transposed_by_sample.append(self.dim() == 2)
        return real(self, *args)

    x = layout(data((2, channels, *full)))
    monkeypatch.setattr(Tensor, "copy_", copy_)
    pooled, indices = pool(x, size, "max", indexed=True)
    monkeypatch.undo()
    assert sum(transposed_by_sample) == (2 if x.stride(1) != 1 else 0)
    expected, expected_indices = ADAPTIVE["max", len(size)](
        x.contiguous(), size, return_indices=True
    )
    torch.testing.assert_close(pooled, expected, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(indices, expected_indices)
