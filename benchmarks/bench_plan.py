"""Part ``plan``: every evaluation that a backend has for a shape, beside the one its plan picks.

The shapes lie around the borders of ``fsp_kernels/plan.py``: few positions and many channels, the
reverse, and what one program of a GPU can hold.
"""

from __future__ import annotations

from argparse import Namespace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import contenders
from benchmarks.cases import measure_case
from benchmarks.checks import Row
from benchmarks.contenders import Contender
from benchmarks.options import chosen_dtypes, chosen_rounds
from benchmarks.peers import Loss
from benchmarks.workloads import DTYPES, Case, Pairs, Workload
from fsp_kernels.autograd import planned_loss
from fsp_kernels.backends import registered_backends
from fsp_kernels.backends.devices import fp32_precision
from fsp_kernels.loss_plan import LossPlan, MapSpec, PairPlan
from fsp_kernels.plan import alternatives

BATCH = {"cpu": 8, "cuda": 32}
# Channels of both maps of a pair, and sides of the square maps.
CHANNELS = {"cpu": (16, 64, 256, 512, 1024), "cuda": (32, 64, 128, 256, 512, 1024)}
SIDES = {"cpu": (4, 7, 10, 14, 20, 32), "cuda": (4, 7, 8, 14, 16, 28, 56)}
# Channels times positions of the largest maps: a CPU takes a minute for a larger shape.
LARGEST = {"cpu": 1 << 17, "cuda": 1 << 20}
# An evaluation with more flops than this multiple of the fewest is not worth timing. A GPU may have
# flops to spare.
TOO_MANY_FLOPS = {"cpu": 4, "cuda": 16}


def cases(options: Namespace) -> list[Case]:
    """The grid of shapes; a quick run has every other number of channels and side."""
    device, every = options.device, 2 if options.quick else 1
    return [
        Case(Workload(f"{channels}-{channels}@{side}", BATCH[device], pair), BATCH[device], dtype)
        for dtype in chosen_dtypes(options)
        for channels in CHANNELS[device][::every]
        for side in SIDES[device][::every]
        if channels * side**2 <= LARGEST[device]
        for pair in [(((channels, side), (channels, side)),)]
    ]


def plans_of(case: Case, device: str, backend: str) -> list[LossPlan]:
    """Every evaluation of the case's one pair, the planned one first."""

    def specs(requires_grad: bool) -> tuple[MapSpec, MapSpec]:
        first, second = (
            MapSpec(shape, DTYPES[case.dtype], torch.device(device), torch.strided, requires_grad)
            for shape in (case.workload.shape(x, case.batch) for x in case.workload.layers[0])
        )
        return first, second

    maps = specs(case.training), specs(False)
    named = registered_backends()[backend]
    return alternatives(*maps, "max", "frobenius", named, fp32_precision())


def label(pair: PairPlan) -> str:
    """The name of an evaluation in tables."""
    if pair.evaluation == "chunks":
        return f"{pair.form} form, chunks of {pair.samples}"
    if pair.evaluation == "samples":
        return f"{pair.form} form"
    if pair.form == "gram":
        return "Gram form"
    return f"{pair.evaluation} and BLAS" if pair.blas_gradients else pair.evaluation


def loss_by(plan: LossPlan) -> Loss:
    """The loss of one pair by a given plan."""

    def loss(student: Pairs, teacher: Pairs) -> Tensor:
        return planned_loss(plan, (1.0,), [*student[0], *teacher[0]])

    return loss


def contenders_of(case: Case, device: str, backend: str) -> list[Contender]:
    """A contender for each evaluation that is worth timing, the planned one first."""
    plans = plans_of(case, device, backend)
    fewest = min(plan.flops for plan in plans)
    plans = [plan for plan in plans if plan.flops <= TOO_MANY_FLOPS[device] * fewest]
    by_name = {label(plan.pairs[0]): plan for plan in plans}
    return [Contender(name, partial(loss_by, p), ours=True) for name, p in by_name.items()]


def measure_part(options: Namespace) -> list[Row]:
    """The rows of ``python -m benchmarks plan``."""
    device, rows = options.device, []
    for case in cases(options):
        for backend in contenders.backends_on(device):
            chosen = contenders_of(case, device, backend)
            found = measure_case(case, chosen, device, chosen_rounds(options), backend=backend)
            rows += [row | {"planned": row["contender"] == chosen[0].name} for row in found]
    return rows


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    options = metafunc.config.option
    found = [
        (case, backend, contender.name)
        for case in cases(options)
        for backend in contenders.backends_on(options.device)
        for contender in contenders_of(case, options.device, backend)
    ]
    metafunc.parametrize(
        ("case", "backend", "contender"),
        found,
        ids=lambda x: f"{x.workload.name}-{x.dtype}" if isinstance(x, Case) else x,
    )


def test_plan(case: Case, backend: str, contender: str, device: str, time_case: Any) -> None:
    by_name = {c.name: c for c in contenders_of(case, device, backend)}
    time_case(case, by_name[contender], group=f"{case}, {backend}")
