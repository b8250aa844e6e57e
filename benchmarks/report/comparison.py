"""A comparison as tables and as a figure's rows."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.report.cells import mebibytes, milliseconds
from benchmarks.report.compare import (
    ERROR,
    ERROR_FLOOR,
    LARGER,
    SLOWER,
    Change,
    Comparison,
    ErrorChange,
)
from benchmarks.report.layout import Column, Section, tabulate
from benchmarks.report.runs import Run
from benchmarks.tables import geometric_mean

ONE_DEVICE = (
    "Each cell: median ± half the interquartile range. The peers' code does not change with ours: "
    "the geometric mean of their new/baseline is the machine's drift, that beside a line or that "
    "of the whole run, whichever is larger. Beyond drift is ours divided by it. REGRESSION where "
    f"that is above {SLOWER:g} and the interquartile ranges do not overlap after the division; "
    f"MORE MEMORY where the peak grew by more than {100 * (LARGER - 1):.0f} % and half a MiB."
)
TWO_DEVICES = (
    "Two devices: nothing is flagged. The ratio says how much longer the new run's device takes."
)
ERRORS = (
    f"WORSE where the gradient error of ours grew more than {ERROR:g}x, and beyond {ERROR_FLOOR:g}."
)


def place(change: Change) -> str:
    """What was done, within a table."""
    key = change.key
    words = [f"{key['axis']} {key['value']}"] if "axis" in key else []
    return ", ".join([*words, key.get("workload") or key["networks"]])


def quotient(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def memory(change: Change) -> str:
    """Both peaks, where they differ as printed."""
    peaks = (result.info.get("peak_extra_bytes") for result in (change.before, change.after))
    before, after = map(mebibytes, peaks)
    return f"{before} -> {after}" if before != after else before


TIMES: list[Column[Change]] = [
    Column("", place),
    Column("contender", lambda change: change.after.contender),
    Column("baseline ms", lambda change: milliseconds(change.before.time)),
    Column("new ms", lambda change: milliseconds(change.after.time)),
    Column("new/baseline", lambda change: quotient(change.ratio)),
    Column("eager", lambda change: quotient(change.eager_ratio), "new/baseline of the host's time"),
    Column("beyond drift", lambda change: quotient(change.beyond_drift) if change.ours else ""),
    Column("peak MiB", memory),
    Column("flag", lambda change: ", ".join(change.flags)),
]
ACCURACY: list[Column[ErrorChange]] = [
    Column("", lambda error: f"{error.key['dtype']}, noise {error.key['noise']:g}"),
    Column("contender", lambda error: error.contender),
    Column("baseline", lambda error: f"{error.before:.1e}"),
    Column("new", lambda error: f"{error.after:.1e}"),
    Column("flag", lambda error: "WORSE" if error.worse else ""),
]


def mean_note(part: str, changes: Sequence[Change]) -> str:
    """Geometric means of ours and of the peers."""
    ours = geometric_mean([change.ratio for change in changes if change.ours])
    peers = geometric_mean([change.ratio for change in changes if not change.ours])
    beyond = geometric_mean([change.beyond_drift for change in changes if change.ours])
    found = {"ours": ours, "ours beyond drift": beyond, "peers": peers}
    texts = [f"{name} {value:.3f}" for name, value in found.items() if value is not None]
    return f"Geometric means of new/baseline, {part}: {', '.join(texts)}"


def grouped(changes: Sequence[Change]) -> dict[str, list[Change]]:
    """Of each part, dtype, layout and direction."""
    groups: dict[str, list[Change]] = {}
    for change in changes:
        names = ("backend", "dtype", "layout", "direction")
        words = [change.part, *(change.key[name] for name in names if change.key.get(name))]
        groups.setdefault(", ".join(words), []).append(change)
    return groups


def means(changes: Sequence[Change]) -> list[str]:
    """Of each part."""
    parts = dict.fromkeys(change.part for change in changes)
    return [mean_note(part, [c for c in changes if c.part == part]) for part in parts]


def commit(run: Run) -> str:
    return f"{run.label}, {next(iter(run.parts.values())).device_name}"


def verdict(comparison: Comparison) -> str:
    """In one sentence."""
    if not comparison.same_device:
        return "Two devices: no verdict"
    slower = sum(change.slower for change in comparison.changes)
    larger = sum(change.larger for change in comparison.changes)
    worse = len(comparison.flagged_errors)
    if not comparison.regressed:
        return "No regression"
    return (
        f"Slower: {slower}, more memory: {larger}, less accurate: {worse}, "
        f"fails now: {len(comparison.lost)}"
    )


def section(comparison: Comparison, everything: bool = True) -> Section:
    """All there is to say of two runs, or only what users run of ours."""
    changes = [change for change in comparison.changes if everything or change.counts]
    found = [tabulate(title, TIMES, group) for title, group in grouped(changes).items()]
    legend = [ONE_DEVICE if comparison.same_device else TWO_DEVICES]
    if comparison.errors:
        found.append(tabulate("gradient errors", ACCURACY, comparison.errors))
        legend += [ERRORS] * comparison.same_device
    if not comparison.changes and not comparison.errors:
        legend = ["The two runs have nothing in common."]
    versions = [f"Versions differ: {', '.join(comparison.versions)}"] * bool(comparison.versions)
    lost = [f"FAILS NOW: {text}" for text in comparison.lost]
    return Section(
        f"{commit(comparison.new)} against {commit(comparison.baseline)}",
        " ".join(legend),
        found,
        [*means(comparison.changes), *versions, *lost, verdict(comparison)],
    )
