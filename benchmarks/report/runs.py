"""What a run of the benchmarks left in its ``<part>.json`` files, read and checked."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from benchmarks.report.names import PARTS, contenders_in_order

# What was measured: the keys that tell one contest of a part from the others.
KEYS = {
    "loss": ("workload", "dtype", "layout", "direction"),
    "step": ("networks", "dtype"),
    "scaling": ("axis", "value", "workload", "dtype", "layout", "direction"),
    "plan": ("backend", "workload", "dtype", "layout", "direction"),
    "accuracy": ("maps", "dtype", "noise"),
}
# What has to be known of a result beside its time.
MEMORY = ("ours", "batch", "peak_extra_bytes")
FLOOR = ("floor_bytes", "floor_flops", "copy_bytes_per_second", "matrix_flops_per_second")
FACTS = {
    "loss": (*MEMORY, *FLOOR),
    "step": (*MEMORY, "seconds_of", "fsp_share"),
    "scaling": MEMORY,
    "plan": ("planned",),
    "accuracy": (),
}


class Unreadable(ValueError):  # noqa: N818 - what it says is a sentence for the user
    """A path that holds no benchmark results, and why not."""


@dataclass(frozen=True)
class Timing:
    """Seconds: the median of the rounds and the quartiles around it."""

    median: float
    q1: float
    q3: float

    @property
    def spread(self) -> float:
        """Half the interquartile range."""
        return (self.q3 - self.q1) / 2


@dataclass(frozen=True)
class Result:
    """One contender in one contest; ``info`` holds its identity and all that was recorded."""

    contender: str
    time: Timing  # the device's own, on a GPU
    info: Mapping[str, Any]

    @property
    def ours(self) -> bool:
        return bool(self.info.get("ours"))

    @property
    def peak(self) -> int | None:
        """Peak memory beyond the inputs, in bytes, where it could be told."""
        return self.info["peak_extra_bytes"]

    def timing(self, clock: str) -> Timing | None:
        """What another clock than the device's said: ``eager`` or ``replay``; None if nothing."""
        median, iqr = self.info.get(f"{clock}_median"), self.info.get(f"{clock}_iqr")
        if median is None:
            return None
        half = (iqr or 0.0) / 2
        return Timing(median, median - half, median + half)


@dataclass(frozen=True)
class Missing:
    """Why a contender has no result; ``fault`` tells a defect from a limit of the device."""

    reason: str
    fault: bool


@dataclass(frozen=True)
class Contest:
    """Contenders that did the same work on the same tensors, turn by turn, in the listed order."""

    key: Mapping[str, Any]
    results: Mapping[str, Result]
    missing: Mapping[str, Missing] = field(default_factory=dict)

    @property
    def names(self) -> list[str]:
        """All who took part."""
        return contenders_in_order([*self.results, *self.missing])

    @cached_property
    def ours(self) -> Result | None:
        """Ours as users get it by default: the first of ours that has a result."""
        return next((result for result in self.results.values() if result.ours), None)

    @property
    def peers(self) -> list[Result]:
        return [result for result in self.results.values() if not result.ours]

    def ratio(self, name: str) -> float | None:
        """How many times faster ours is than ``name``; None where either has no result."""
        if self.ours is None or name == self.ours.contender or name not in self.results:
            return None
        return self.results[name].time.median / self.ours.time.median

    def ratio_to_fastest(self) -> float | None:
        """The ratio to the peer that was fastest here."""
        ratios = (self.ratio(peer.contender) for peer in self.peers)
        return min((ratio for ratio in ratios if ratio is not None), default=None)


@dataclass(frozen=True)
class Part:
    """One part of a run; of the part ``accuracy`` the results are errors, the others' are times."""

    name: str
    device: str
    command: str
    date: str
    commit: Mapping[str, Any]
    machine: Mapping[str, Any]
    contests: tuple[Contest, ...]
    errors: tuple[Mapping[str, Any], ...] = ()

    @property
    def hardware(self) -> tuple[Any, ...]:
        """What has to be the same for times to be comparable."""
        if "gpu" in self.machine:
            return (self.machine["gpu"],)
        return self.machine["cpu"], self.machine["cores"]

    @property
    def device_name(self) -> str:
        """For a title."""
        if "gpu" in self.machine:
            return self.machine["gpu"]
        return f"{self.machine['cpu']}, {self.machine['cores']} cores"


@dataclass(frozen=True)
class Run:
    """The parts found at a path, in the order of ``PARTS``."""

    path: Path
    parts: Mapping[str, Part]

    @property
    def label(self) -> str:
        """The commit and where it lies, which tells runs apart."""
        commit = next(iter(self.parts.values())).commit
        return f"{commit['id'][:10]}{'+' if commit['dirty'] else ''} ({self.path})"


def result_of(entry: Mapping[str, Any], part: str) -> Result:
    """From pytest-benchmark's entry of one test."""
    info, stats = entry["extra_info"], entry["stats"]
    for name in (*KEYS[part], *FACTS[part]):
        info[name]  # a KeyError here is explained by ``read``
    return Result(info["contender"], Timing(stats["median"], stats["q1"], stats["q3"]), info)


def contests_of(
    part: str, results: Iterable[Result], missing: Iterable[Mapping[str, Any]]
) -> tuple[Contest, ...]:
    """Who competed with whom, in the order of the run."""
    found: dict[tuple[Any, ...], tuple[dict[str, Result], dict[str, Missing]]] = {}
    for result in results:
        key = tuple(result.info[name] for name in KEYS[part])
        found.setdefault(key, ({}, {}))[0][result.contender] = result
    for entry in missing:
        key = tuple(entry[name] for name in KEYS[part])
        absent = Missing(entry["reason"], entry["fault"])
        found.setdefault(key, ({}, {}))[1][entry["contender"]] = absent
    return tuple(
        Contest(
            dict(zip(KEYS[part], key, strict=True)),
            {name: present[name] for name in contenders_in_order(present)},
            absent,
        )
        for key, (present, absent) in found.items()
    )


def part_of(content: Mapping[str, Any]) -> Part:
    """From the content of a file; a KeyError names what is missing."""
    name = content["part"]
    if name not in PARTS:
        raise Unreadable(f"its part is {name!r}, none of {', '.join(PARTS)}")
    # Of accuracy only the measuring is timed.
    timed, errors = content["benchmarks"], content["errors"]
    results = [result_of(entry, name) for entry in timed] if name != "accuracy" else []
    for error in errors:
        for key in (*KEYS[name], "contender", "loss_error", "gradient_error"):
            error[key]
    return Part(
        name,
        content["device"],
        content["command"],
        content["datetime"],
        {key: content["commit_info"][key] for key in ("id", "dirty")},
        content["machine_info"],
        contests_of(name, results, content["not_measured"]),
        tuple(errors),
    )


def read(path: Path) -> Part:
    """One part from its file."""
    try:
        return part_of(json.loads(path.read_text()))
    except KeyError as error:
        raise Unreadable(f"{path} is not a benchmark result: it has no {error}") from error
    except (TypeError, json.JSONDecodeError) as error:
        raise Unreadable(f"{path} is not a benchmark result: {error}") from error
    except Unreadable as error:
        raise Unreadable(f"{path} is not a benchmark result: {error}") from error


def load(path: Path) -> Run:
    """The run at a path: one part's file, or a folder with a file for each part."""
    if not path.exists():
        raise Unreadable(f"{path}: no such file or folder")
    if path.is_file():
        part = read(path)
        return Run(path, {part.name: part})
    files = {name: path / f"{name}.json" for name in PARTS}
    found = {name: read(file) for name, file in files.items() if file.is_file()}
    if not found:
        names = ", ".join(file.name for file in files.values())
        raise Unreadable(f"{path} holds no results: none of {names}")
    return Run(path, found)
