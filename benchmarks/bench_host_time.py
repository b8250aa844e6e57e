"""The host's time of a planned call beside the least that autograd can do, on any machine.

It is for ``pytest benchmarks/bench_host_time.py`` alone. The Triton backend runs on CPU tensors as
it does on a GPU's, but launches nothing.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any
from unittest import mock

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

import fsp_kernels as fsp
from benchmarks.checks import maps_of
from benchmarks.workloads import Pairs
from fsp_kernels.backends import registered_backends


class Bare(torch.autograd.Function):
    """As many allocations and launches as ours, and nothing else."""

    @staticmethod
    def forward(ctx: Any, partials: int, *maps: Tensor) -> Tensor:
        gradients = [torch.empty_like(x) for x in maps if x.requires_grad]
        maps[0].new_empty(partials, dtype=torch.float32)
        result = maps[0].new_empty((), dtype=torch.float32)
        _no_launch()
        _no_launch()
        ctx.gradients, ctx.wanted = gradients, [x.requires_grad for x in maps]
        return result

    @staticmethod
    def backward(ctx: Any, incoming: Tensor) -> Any:  # noqa: ARG004
        _no_launch()
        gradients = iter(ctx.gradients)
        return None, *[next(gradients) if wanted else None for wanted in ctx.wanted]


def bare_loss(student: Pairs, teacher: Pairs) -> Tensor:
    """``Bare`` as a loss."""
    pairs = zip(student, teacher, strict=True)
    return Bare.apply(512, *[x for s, t in pairs for x in (*s, *t)])


def _no_launch(*_: Any, **__: Any) -> None:
    """Stands in for a compiled kernel."""


@contextmanager
def without_launches() -> Iterator[None]:
    """Within the block, the Triton backend serves CPU tensors and launches nothing."""
    from fsp_kernels.backends.triton import TritonBackend, launch, loss

    with ExitStack() as patches:
        for where, name, value in (
            (TritonBackend, "why_unavailable", lambda _: None),
            (TritonBackend, "why_unsupported", lambda *_: None),
            (launch, "device_family", lambda *_: "sm_90"),
            (loss, "device_family", lambda *_: "sm_90"),
            (launch, "INTERPRETED", False),
            (launch.Launch, "start", lambda *_: defaultdict(lambda: _no_launch)),
        ):
            patches.enter_context(mock.patch.object(where, name, value))
        backend = registered_backends()["triton"]
        assert isinstance(backend, TritonBackend)
        backend.prepared.clear()
        yield
        backend.prepared.clear()


LOSSES: dict[str, Callable[..., Tensor]] = {
    "ours": partial(fsp.fsp_loss, backend="triton"),
    "bare": bare_loss,
}


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("pairs", [1, 3])  # a ResNet of CIFAR has 3
def test_host_time(benchmark: BenchmarkFixture, pairs: int, name: str) -> None:
    pytest.importorskip("triton")
    shapes = [(2, 16 << i, 8, 8) for i in range(pairs)]
    student, teacher = (
        [(torch.randn(s, requires_grad=grad), torch.randn(s, requires_grad=grad)) for s in shapes]
        for grad in (True, False)
    )
    loss, leaves = LOSSES[name], maps_of(student)
    benchmark.group = f"host time of {pairs} pairs, no launches"
    with without_launches():
        benchmark(lambda: torch.autograd.grad(loss(student, teacher), leaves))
