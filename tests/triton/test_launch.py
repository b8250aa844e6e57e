"""Launching a compiled kernel, and what it is looked up by."""

from __future__ import annotations

import pytest
import torch

from fsp_kernels.backends.triton import launch
from fsp_kernels.backends.triton.launch import Launch


class FakeKernel:
    """Stands for a Triton kernel, and for what it compiles to."""

    __name__ = "fsp_fake"

    def __init__(self):
        self.started: list[tuple] = []
        self.launched: list[tuple] = []

    def __getitem__(self, grid):
        self.grid = grid

        def start(*arguments, num_warps):
            self.started.append((arguments, num_warps))
            return self.Compiled(self)

        return start

    class Compiled:
        def __init__(self, kernel):
            self._kernel = kernel

        def __getitem__(self, grid):
            def go(*arguments, stream):
                self._kernel.launched.append((grid, arguments, stream))

            return go


@pytest.fixture
def kernel(monkeypatch):
    monkeypatch.setattr(launch, "INTERPRETED", False)
    return FakeKernel()


def aligned_by(elements: int) -> torch.Tensor:
    """A tensor that many fp32 elements behind a multiple of 16 bytes."""
    x = torch.empty(16)
    assert x.data_ptr() % 16 == 0
    return x[elements:]


def test_the_first_call_compiles_and_later_ones_bring_addresses(kernel):
    x, y = aligned_by(0), aligned_by(0)
    bound = Launch(kernel, 5, 4, "constant")
    bound(7, (x, y), 0.5)
    assert kernel.grid == (5, 1, 1)
    assert kernel.started == [((x, y, "constant", 0.5), 4)]
    assert kernel.launched == []
    bound(8, (y, x), 2.5)
    arguments = (y.data_ptr(), x.data_ptr(), "constant", 2.5)
    assert kernel.launched == [((5, 1, 1), arguments, 8)]
    assert len(kernel.started) == 1


def test_tensors_go_where_the_kernel_takes_them(kernel):
    x, y = aligned_by(0), aligned_by(0)
    bound = Launch(kernel, 1, 4, places=(((1, None), (None, 2)), 1))
    for _ in range(2):
        bound(0, [aligned_by(0), x, y])
    px, py = x.data_ptr(), y.data_ptr()
    assert kernel.started == [(((((x, None), (None, y)), x)), 4)]
    assert kernel.launched[0][1] == (((px, None), (None, py)), px)


def test_each_alignment_compiles_once(kernel):
    bound = Launch(kernel, 1, 4)
    places = [(0, 0), (1, 0), (0, 1), (1, 1)]
    for _ in range(3):
        for first, second in places:
            bound(0, (aligned_by(first), aligned_by(second)))
    assert len(kernel.started) == len(places)
    assert len(kernel.launched) == 2 * len(places)


def test_addresses_of_one_alignment_share_a_kernel(kernel):
    bound = Launch(kernel, 1, 4)
    for elements in (1, 2, 3, 5):  # none a multiple of 16 bytes
        bound(0, (aligned_by(elements),))
    bound(0, (aligned_by(4),))
    assert len(kernel.started) == 2


# --- in a CUDA graph ------------------------------------------------------------------------------


@pytest.fixture
def capture(monkeypatch):
    """Begins a capture of the current stream."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    return lambda: monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)


def test_a_first_call_in_a_capture_says_what_to_do_and_starts_nothing(kernel, capture):
    capture()
    with pytest.raises(
        RuntimeError, match=r"^Triton compiles and loads fsp_fake at .* call it once before captur"
    ):
        Launch(kernel, 1, 4)(0, (aligned_by(0),))
    assert kernel.started == []


def test_a_call_that_was_made_before_is_captured(kernel, capture):
    bound = Launch(kernel, 1, 4)
    bound(0, (aligned_by(0),))
    capture()
    bound(0, (aligned_by(0),))
    assert len(kernel.launched) == 1


def test_another_alignment_is_another_first_call(kernel, capture):
    bound = Launch(kernel, 1, 4)
    bound(0, (aligned_by(0),))
    capture()
    with pytest.raises(RuntimeError, match="call it once before capturing"):
        bound(0, (aligned_by(1),))


def test_a_later_call_does_not_ask_whether_it_is_captured(kernel, monkeypatch):
    bound = Launch(kernel, 1, 4)
    bound(0, (aligned_by(0),))
    monkeypatch.setattr(launch, "check_not_capturing", None)
    bound(0, (aligned_by(0),))
    assert len(kernel.launched) == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is no interpreter at work on a GPU")
def test_the_interpreter_compiles_nothing():
    kernel = FakeKernel()
    bound = Launch(kernel, 1, 4)
    for _ in range(2):
        bound(0, (aligned_by(0),))
    assert len(kernel.started) == 2
