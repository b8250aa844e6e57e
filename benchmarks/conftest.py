"""Options, parameters and environment of the benchmarks."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from benchmarks import contenders, floor, options, workloads
from benchmarks.contenders import Contender
from benchmarks.environment import commit, machine
from benchmarks.race import Outcome, Race, Rounds
from benchmarks.replay import CLOCK


@dataclass
class Findings:
    """What a run has to say beside the durations."""

    not_measured: list[dict[str, Any]] = field(default_factory=list)
    errors: list[dict[str, Any]] = field(default_factory=list)


FINDINGS = pytest.StashKey[Findings]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("fsp benchmarks")
    group.addoption("--device", choices=list(options.ROUNDS), default="cpu")
    group.addoption("--dtype", action="append", choices=list(workloads.DTYPES))
    group.addoption("--layout", action="append", choices=list(workloads.LAYOUTS))
    group.addoption("--pass", action="append", choices=list(workloads.DIRECTIONS), dest="direction")
    group.addoption("--workload", action="append", choices=list(workloads.BY_NAME))
    group.addoption("--contender", action="append", choices=list(contenders.BY_NAME))
    group.addoption("--rounds", type=int)
    group.addoption("--quick", action="store_true", help="less of everything, in two minutes")
    group.addoption("--written-as", default="", help="the command, as results should quote it")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[FINDINGS] = Findings()


@pytest.fixture(scope="session")
def device(pytestconfig: pytest.Config) -> str:
    return pytestconfig.getoption("--device")


@pytest.fixture(scope="session")
def quick(pytestconfig: pytest.Config) -> bool:
    return pytestconfig.getoption("--quick")


@pytest.fixture(scope="session")
def chosen_contenders(pytestconfig: pytest.Config) -> list[Contender]:
    return options.competing(pytestconfig)


@pytest.fixture(scope="session")
def rounds(pytestconfig: pytest.Config, device: str, quick: bool) -> Rounds:
    usual = (options.QUICK_ROUNDS if quick else options.ROUNDS)[device]
    asked = pytestconfig.getoption("--rounds")
    return Rounds(asked, asked, 0.0) if asked else usual


@pytest.fixture(scope="session")
def race(device: str) -> Race:
    return options.RACES[device]


@pytest.fixture(scope="session")
def not_measured(pytestconfig: pytest.Config) -> list[dict[str, Any]]:
    """Where to say what has no result, and why."""
    return pytestconfig.stash[FINDINGS].not_measured


@pytest.fixture(scope="session")
def errors(pytestconfig: pytest.Config) -> list[dict[str, Any]]:
    """Where errors to float64 are kept."""
    return pytestconfig.stash[FINDINGS].errors


class Recorder:
    """Hands an outcome to pytest-benchmark, or says why there is none."""

    def __init__(self, benchmark: Any, not_measured: list[dict[str, Any]]):
        self._benchmark, self._not_measured = benchmark, not_measured

    def __call__(self, outcome: Outcome, group: str, identity: dict[str, Any]) -> None:
        if outcome.reason is not None:
            self._not_measured.append(identity | {"reason": outcome.reason, "fault": outcome.fault})
            give_up = pytest.fail if outcome.fault else pytest.skip
            give_up(outcome.reason)
        self._benchmark.group = group
        self._benchmark.extra_info.update(identity | outcome.facts)
        CLOCK.load(outcome.durations)
        self._benchmark.pedantic(CLOCK.step, setup=CLOCK.rewind, rounds=len(outcome.durations))


@pytest.fixture
def record(benchmark: Any, not_measured: list[dict[str, Any]]) -> Recorder:
    return Recorder(benchmark, not_measured)


def pytest_benchmark_generate_machine_info(config: pytest.Config) -> dict[str, Any]:
    """Ours in place of the plugin's, which records the host's name."""
    return machine(config.getoption("--device"))


def pytest_benchmark_generate_commit_info() -> dict[str, Any]:
    return commit()


def pytest_benchmark_update_json(config: pytest.Config, output_json: dict[str, Any]) -> None:
    findings = config.stash[FINDINGS]
    output_json["part"] = Path(config.args[0]).stem.removeprefix("bench_")
    output_json["device"] = config.getoption("--device")
    output_json["command"] = config.getoption("--written-as")
    output_json["not_measured"] = findings.not_measured
    output_json["errors"] = findings.errors
    for entry in output_json["benchmarks"]:
        entry["extra_info"] |= floor.settled(entry["extra_info"])
