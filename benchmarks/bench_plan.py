"""Every evaluation that a backend has for a shape, beside the one its plan picks.

The shapes lie around the borders of ``plan.py``: few positions and many channels against the
reverse, and what one program of a GPU can hold.
"""

from __future__ import annotations

from functools import lru_cache, partial
from typing import Any

import pytest
import torch

from benchmarks import cases, contenders, options
from benchmarks.contenders import Contender
from benchmarks.race import Outcome, Race, Rounds
from benchmarks.replay import CLOCK
from benchmarks.workloads import DTYPES, Case, Pairs, Workload
from fsp_kernels.autograd import planned_loss
from fsp_kernels.backends import registered_backends
from fsp_kernels.backends.fused import fp32_precision
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
    return "Gram form" if pair.form == "gram" else pair.evaluation


def contenders_of(case: Case, device: str, backend: str) -> dict[str, Contender]:
    """A contender for each evaluation worth timing, the planned one first."""
    plans = plans_of(case, device, backend)
    fewest = min(plan.flops for plan in plans)
    plans = [plan for plan in plans if plan.flops <= TOO_MANY_FLOPS[device] * fewest]
    by_name = {label(plan.pairs[0]): plan for plan in plans}

    def build(plan: LossPlan) -> Any:
        def loss(student: Pairs, teacher: Pairs) -> torch.Tensor:
            return planned_loss(plan, (1.0,), [*student[0], *teacher[0]])

        return loss

    return {name: Contender(name, partial(build, p), ours=True) for name, p in by_name.items()}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
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
