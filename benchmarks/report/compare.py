"""Two runs of the same benchmarks: what changed, beyond what the machine's drift explains.

The peers' code does not change between two commits of ours. On one device their times therefore
tell how much faster or slower the machine was, and ours are held against that: against the peers of
the same contest or of the whole run, whichever drifted more, since few peers drift by chance, too.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.report.names import contenders_in_order
from benchmarks.report.runs import Contest, Part, Result, Run
from benchmarks.tables import MIB, geometric_mean

SLOWER = 1.05  # and more is a regression, if it is beyond the spread
LARGER, LARGER_BYTES = 1.05, MIB // 2  # of peak memory, both
ERROR, ERROR_FLOOR = 2.0, 1e-6  # of a gradient, both
VERSIONS = ("torch", "triton")


@dataclass(frozen=True)
class Change:
    """One contender in one contest, in both runs."""

    part: str
    key: Mapping[str, Any]
    before: Result
    after: Result
    drift: float | None  # of the machine, by the peers; None on two devices

    @property
    def ours(self) -> bool:
        return self.after.ours

    @property
    def ratio(self) -> float:
        """New time over the baseline's."""
        return self.after.time.median / self.before.time.median

    @property
    def beyond_drift(self) -> float | None:
        """The same if the machine had not drifted; None on two devices."""
        return None if self.drift is None else self.ratio / self.drift

    @property
    def counts(self) -> bool:
        """Whether users run it: ours, and of several evaluations the planned one."""
        return self.ours and self.after.info.get("planned", True)

    @property
    def eager_ratio(self) -> float | None:
        """As ``ratio``, of the host's time, where a GPU's was measured."""
        before, after = self.before.timing("eager"), self.after.timing("eager")
        return after.median / before.median if before and after else None

    @property
    def slower(self) -> bool:
        """Whether ours takes longer than drift and spread explain."""
        if not self.counts or self.drift is None:
            return False
        apart = self.after.time.q1 / self.drift > self.before.time.q3
        return apart and self.ratio / self.drift > SLOWER

    @property
    def larger(self) -> bool:
        """Whether ours takes more memory than before."""
        before, after = (r.info.get("peak_extra_bytes") for r in (self.before, self.after))
        if not self.counts or self.drift is None or before is None or after is None:
            return False
        return after > LARGER * before and after - before > LARGER_BYTES

    @property
    def flags(self) -> list[str]:
        return ["REGRESSION"] * self.slower + ["MORE MEMORY"] * self.larger


@dataclass(frozen=True)
class ErrorChange:
    """One contender's gradient error at one noise, in both runs."""

    key: Mapping[str, Any]
    contender: str
    before: float
    after: float

    @property
    def worse(self) -> bool:
        """Whether ours has lost accuracy."""
        grown = self.after > ERROR * self.before and self.after > ERROR_FLOOR
        return self.contender.startswith("ours") and grown


@dataclass(frozen=True)
class Comparison:
    """All that two runs have in common."""

    baseline: Run
    new: Run
    changes: Sequence[Change]
    errors: Sequence[ErrorChange]
    lost: Sequence[str]  # what ours could do before and has no result of now
    versions: Sequence[str]  # that differ
    same_device: bool

    @property
    def regressed(self) -> bool:
        """Whether anything is flagged."""
        worse = any(change.flags for change in self.changes)
        return worse or any(error.worse for error in self.flagged_errors) or bool(self.lost)

    @property
    def flagged_errors(self) -> Sequence[ErrorChange]:
        """Errors that got worse; of two devices they say nothing about the code."""
        return [error for error in self.errors if error.worse] if self.same_device else []


def identity(key: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(key.values())


def shared_contests(before: Part, after: Part) -> Iterator[tuple[Contest, Contest]]:
    """The contests that both runs held."""
    known = {identity(contest.key): contest for contest in before.contests}
    for contest in after.contests:
        if identity(contest.key) in known:
            yield known[identity(contest.key)], contest


def drift_of(pairs: Sequence[tuple[Contest, Contest]]) -> float | None:
    """How much longer the peers took; None where there is none to tell."""
    return geometric_mean(
        [
            after.results[name].time.median / result.time.median
            for before, after in pairs
            for name, result in before.results.items()
            if not result.ours and name in after.results
        ]
    )


def changes_of(before: Part, after: Part, overall: float) -> list[Change]:
    """Of one part; a contest without peers drifts as the whole run did."""
    same = before.hardware == after.hardware
    return [
        Change(
            after.name,
            new.key,
            old.results[name],
            new.results[name],
            max(drift_of([(old, new)]) or overall, overall) if same else None,
        )
        for old, new in shared_contests(before, after)
        for name in contenders_in_order(new.results)
        if name in old.results
    ]


def lost_of(before: Part, after: Part) -> list[str]:
    """Ours that had a result and now fails on the same device, by name and place."""
    if before.hardware != after.hardware:
        return []
    return [
        f"{after.name}, {', '.join(map(str, new.key.values()))}: {name}, {missing.reason}"
        for old, new in shared_contests(before, after)
        for name, missing in new.missing.items()
        if name in old.results and old.results[name].ours
    ]


def errors_of(before: Part, after: Part) -> list[ErrorChange]:
    """Of the part ``accuracy``."""
    names = ("maps", "dtype", "noise", "contender")
    known = {tuple(e[name] for name in names): e["gradient_error"] for e in before.errors}
    return [
        ErrorChange(dict(zip(names[:3], key, strict=False)), key[3], known[key], gradient)
        for key, gradient in (
            (tuple(e[x] for x in names), e["gradient_error"]) for e in after.errors
        )
        if key in known
    ]


def different_versions(before: Part, after: Part) -> list[str]:
    """``torch 2.11 -> 2.12`` and the like."""
    old, new = before.machine, after.machine
    return [
        f"{name} {old.get(name)} -> {new.get(name)}"
        for name in VERSIONS
        if old.get(name) != new.get(name)
    ]


def compare(baseline: Run, new: Run) -> Comparison:
    """Part by part, what both runs have."""
    shared = [name for name in new.parts if name in baseline.parts]
    pairs = [(baseline.parts[name], new.parts[name]) for name in shared]
    overall = drift_of([pair for parts in pairs for pair in shared_contests(*parts)]) or 1.0
    return Comparison(
        baseline,
        new,
        [change for parts in pairs for change in changes_of(*parts, overall)],
        [error for parts in pairs for error in errors_of(*parts)],
        [text for before, after in pairs for text in lost_of(before, after)],
        list(dict.fromkeys(text for parts in pairs for text in different_versions(*parts))),
        all(before.hardware == after.hardware for before, after in pairs),
    )
