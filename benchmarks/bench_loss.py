"""The loss on every workload: every contender, dtype, memory format and pass.

The peaks of a CPU come last of a workload, in a process of their own, so its cases are raced
together, before the first of them is recorded.
"""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks import cases, options, workloads
from benchmarks.contenders import Contender
from benchmarks.race import Outcome, Race, Rounds
from benchmarks.replay import CLOCK
from benchmarks.workloads import Case, Workload

Outcomes = dict[tuple[Case, str], Outcome]


def cases_of(workload: Workload, config: pytest.Config) -> list[Case]:
    """All that is asked of a workload."""
    batch = workload.batch_on(config.getoption("--device"))
    return [
        Case(workload, batch, dtype, layout, direction)
        for dtype in options.dtype_names(config)
        for layout in workload.layouts(options.layouts(config))
        for direction in options.directions(config)
    ]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    chosen = [workloads.BY_NAME[name] for name in options.workload_names(metafunc.config)]
    found = [case for workload in chosen for case in cases_of(workload, metafunc.config)]
    names = ["-".join(map(str, cases.identity(case, "").values())) for case in found]
    metafunc.parametrize("case", found, ids=[name.rstrip("-") for name in names], scope="module")
    contender_names = [contender.name for contender in options.competing(metafunc.config)]
    metafunc.parametrize("contender_name", contender_names)


@pytest.fixture(scope="module")
def outcomes_of(
    pytestconfig: pytest.Config,
    device: str,
    chosen_contenders: list[Contender],
    race: Race,
    rounds: Rounds,
) -> Any:
    """All outcomes of a workload; the next workload's replace them."""
    kept: dict[str, Outcomes] = {}

    def outcomes(workload: Workload) -> Outcomes:
        if workload.name not in kept:
            kept.clear()
            kept[workload.name] = _race_all(
                cases_of(workload, pytestconfig), chosen_contenders, device, race, rounds
            )
        return kept[workload.name]

    return outcomes


def _race_all(
    all_cases: list[Case], chosen: list[Contender], device: str, race: Race, rounds: Rounds
) -> Outcomes:
    outcomes = {
        (case, name): outcome
        for case in all_cases
        for name, outcome in cases.measure(case, chosen, device, race, rounds).items()
    }
    if device == "cpu":
        peaks = cases.peaks(all_cases, chosen)
        for key, peak in peaks.items():
            outcomes[key] = cases.with_peak(outcomes[key], peak)
    return outcomes


@pytest.mark.benchmark(timer=CLOCK.now)
def test_loss(case: Case, contender_name: str, outcomes_of: Any, record: Any) -> None:
    outcome = outcomes_of(case.workload)[case, contender_name]
    identity = {"part": "loss"} | cases.identity(case, contender_name)
    record(
        outcome, f"{case.workload.name}, {case.dtype}, {case.layout}, {case.direction}", identity
    )
