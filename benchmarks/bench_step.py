"""A whole distillation step: teacher and student forward, FSP loss, backward, optimiser."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest

from benchmarks import cases, memory, networks, options
from benchmarks.contenders import Contender
from benchmarks.networks import Networks
from benchmarks.race import Outcome, Race, Rounds
from benchmarks.replay import CLOCK

Outcomes = dict[str, Outcome]


def contenders_of(config: pytest.Config) -> list[Contender]:
    """Those asked for by name, or else those who race with whole networks."""
    chosen = options.competing(config)
    return chosen if config.getoption("--contender") else networks.competing(chosen)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    config = metafunc.config
    names = networks.QUICK if config.getoption("--quick") else tuple(networks.BY_NAME)
    metafunc.parametrize("networks_name", names, scope="module")
    metafunc.parametrize("dtype", options.dtype_names(config), scope="module")
    metafunc.parametrize("contender_name", [c.name for c in contenders_of(config)])


@pytest.fixture(scope="module")
def outcomes(
    pytestconfig: pytest.Config,
    networks_name: str,
    dtype: str,
    device: str,
    race: Race,
    rounds: Rounds,
) -> Outcomes:
    """All contenders with two networks, raced together once."""
    where = networks.BY_NAME[networks_name]
    entrants = networks.entrants(where, contenders_of(pytestconfig), device, dtype)
    found = race(entrants, rounds)
    return with_peaks(found, where, dtype) if device == "cpu" else found


def with_peaks(outcomes: Outcomes, where: Networks, dtype: str) -> Outcomes:
    """The same with the peak memory of those that were timed on a CPU."""
    timed = [name for name, outcome in outcomes.items() if outcome.reason is None]
    jobs = [partial(networks.peak_step, where.name, name, dtype) for name in timed]
    peaks = memory.peaks_in_fresh_process(jobs) if jobs else []
    measured = zip(timed, peaks, strict=True)
    return outcomes | {name: cases.with_peak(outcomes[name], peak) for name, peak in measured}


@pytest.mark.benchmark(timer=CLOCK.now)
def test_step(
    networks_name: str,
    dtype: str,
    contender_name: str,
    outcomes: Outcomes,
    record: Callable[[Outcome, str, dict[str, Any]], None],
) -> None:
    identity = {"part": "step", "networks": networks_name, "dtype": dtype}
    record(
        outcomes[contender_name],
        f"{networks_name}, {dtype}",
        identity | {"contender": contender_name},
    )
