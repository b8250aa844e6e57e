"""Every evaluation that a backend has for a shape, beside the one its plan picks.

The shapes lie around the borders of ``plan.py``: few positions and many channels against the
reverse, and what one program of a GPU can hold.

And what Python takes for a planned call beside the least that autograd can do, on any machine.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import lru_cache, partial
from statistics import median
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

import fsp_kernels as fsp
from benchmarks import cases, contenders, options
from benchmarks.contenders import Contender
from benchmarks.race import Outcome, Race, Rounds
from benchmarks.replay import CLOCK
from benchmarks.workloads import DTYPES, Case, Pairs, Workload
from fsp_kernels.autograd import planned_loss
from fsp_kernels.backends import registered_backends
from fsp_kernels.backends.devices import fp32_precision
from fsp_kernels.loss_plan import LossPlan, MapSpec, PairPlan
from fsp_kernels.plan import alternatives

BATCH = {"cpu": 8, "cuda": 32}
# Of both maps of a pair, and the sides of the square maps.
CHANNELS = {"cpu": (16, 64, 256, 512, 1024), "cuda": (32, 64, 128, 256, 512, 1024)}
SIDES = {"cpu": (4, 7, 10, 14, 20, 32), "cuda": (4, 7, 8, 14, 16, 28, 56)}
# Channels times positions of the largest maps: beyond, a CPU takes a minute for one shape.
LARGEST = {"cpu": 1 << 17, "cuda": 1 << 20}
# Times the flops of the evaluation with fewest: one with more is not worth timing. A GPU may have
# flops to spare.
TOO_MANY_FLOPS = {"cpu": 4, "cuda": 16}


def cases_of(config: pytest.Config) -> list[Case]:
    """The grid of shapes; a quick run takes every other one of each kind."""
    device, every = config.getoption("--device"), 2 if config.getoption("--quick") else 1
    return [
        Case(Workload(f"{channels}-{channels}@{side}", BATCH[device], pair), BATCH[device], dtype)
        for dtype in options.dtype_names(config)
        for channels in CHANNELS[device][::every]
        for side in SIDES[device][::every]
        if channels * side**2 <= LARGEST[device]
        for pair in [(((channels, side), (channels, side)),)]
    ]


def plans_of(case: Case, device: str, backend: str) -> list[LossPlan]:
    """Every evaluation of the case's one pair, the planned one first."""

    def specs(wanted: bool) -> tuple[MapSpec, MapSpec]:
        first, second = (
            MapSpec(shape, DTYPES[case.dtype], torch.device(device), torch.strided, wanted)
            for shape in (case.workload.shape(x, case.batch) for x in case.workload.layers[0])
        )
        return first, second

    maps = specs(case.training), specs(False)
    named = registered_backends()[backend]
    return alternatives(*maps, "max", "frobenius", named, fp32_precision())


def label(pair: PairPlan) -> str:
    """An evaluation as tables name it."""
    if pair.evaluation == "chunks":
        return f"{pair.form} form, chunks of {pair.samples}"
    if pair.form == "gram":
        return "Gram form"
    return f"{pair.evaluation} and BLAS" if pair.blas_gradients else pair.evaluation


def contenders_of(case: Case, device: str, backend: str) -> dict[str, Contender]:
    """A contender for each evaluation worth timing, the planned one first."""
    plans = plans_of(case, device, backend)
    fewest = min(plan.flops for plan in plans)
    plans = [plan for plan in plans if plan.flops <= TOO_MANY_FLOPS[device] * fewest]
    by_name = {label(plan.pairs[0]): plan for plan in plans}

    def build(plan: LossPlan) -> Any:
        def loss(student: Pairs, teacher: Pairs) -> Tensor:
            return planned_loss(plan, (1.0,), [*student[0], *teacher[0]])

        return loss

    return {name: Contender(name, partial(build, p), ours=True) for name, p in by_name.items()}


# --- the time of the host -------------------------------------------------------------------------


class Bare(torch.autograd.Function):
    """What autograd, allocations and launches take by themselves: as many of each, nothing else."""

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
    pairs = zip(student, teacher, strict=True)
    return Bare.apply(512, *[x for s, t in pairs for x in (*s, *t)])


def _no_launch(*_: Any, **__: Any) -> None:
    """In place of a compiled kernel."""


@contextmanager
def without_launches() -> Iterator[None]:
    """The Triton backend serves CPU tensors as it serves a GPU's, but launches nothing."""
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
        programs = registered_backends()["triton"].prepared
        programs.clear()
        yield
        programs.clear()


def host_times(pairs: int, rounds: int = 200, calls: int = 10) -> tuple[float, float]:
    """Seconds of the CPU for forward and backward of ours and of the bare Function, medians.

    By turns, on small maps of as many pairs: ``pairs`` is 3 for a ResNet of CIFAR.
    """
    shapes = [(2, 16 << i, 8, 8) for i in range(pairs)]
    student, teacher = (
        [(torch.randn(s, requires_grad=grad), torch.randn(s, requires_grad=grad)) for s in shapes]
        for grad in (True, False)
    )
    leaves = [x for pair in student for x in pair]
    took: dict[Any, list[float]] = {partial(fsp.fsp_loss, backend="triton"): [], bare_loss: []}
    with without_launches():
        for _ in range(rounds):
            for loss, times in took.items():
                start = time.thread_time()
                for _ in range(calls):
                    torch.autograd.grad(loss(student, teacher), leaves)
                times.append((time.thread_time() - start) / calls)
    ours, bare = map(median, took.values())
    return ours, bare


@pytest.mark.parametrize("pairs", [1, 3])
def test_host_time(pairs: int) -> None:
    pytest.importorskip("triton")
    ours, bare = host_times(pairs)
    print(
        f"host time of {pairs} pairs, no launches: {1e6 * ours:.0f} us, "
        f"{ours / bare:.2f} of a bare Function's"
    )


# --- the evaluations ------------------------------------------------------------------------------


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" not in metafunc.fixturenames:
        return
    device = metafunc.config.getoption("--device")
    metafunc.parametrize(
        ("case", "backend", "contender_name"),
        [
            (case, backend, name)
            for case in cases_of(metafunc.config)
            for backend in contenders.backends_on(device)
            for name in contenders_of(case, device, backend)
        ],
        ids=lambda x: f"{x.workload.name}-{x.dtype}" if isinstance(x, Case) else x,
    )


@pytest.fixture(scope="module")
def outcomes_of(device: str, race: Race, rounds: Rounds) -> Any:
    @lru_cache(maxsize=1)
    def outcomes(case: Case, backend: str) -> dict[str, Outcome]:
        chosen = list(contenders_of(case, device, backend).values())
        return cases.measure(case, chosen, device, race, rounds)

    return outcomes


@pytest.mark.benchmark(timer=CLOCK.now)
def test_plan(
    case: Case, backend: str, contender_name: str, device: str, outcomes_of: Any, record: Any
) -> None:
    outcome = outcomes_of(case, backend)[contender_name]
    (((channels, side), _),) = case.workload.layers
    identity = {
        "part": "plan",
        "backend": backend,
        "channels": channels,
        "positions": side**2,
        "planned": contender_name == next(iter(contenders_of(case, device, backend))),
        **cases.identity(case, contender_name),
    }
    record(outcome, f"{case.workload.name}, {case.dtype}, {backend}", identity)
