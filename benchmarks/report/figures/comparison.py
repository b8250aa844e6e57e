"""New over baseline, a bar for each thing that ours was timed at in both runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks.report.compare import Change, Comparison
from benchmarks.report.comparison import grouped, place
from benchmarks.report.figures.canvas import panels, plain_ticks

FINE_TICKS = (0.25, 0.5, 0.6, 0.7, 0.8, 0.9, 1, 1.1, 1.2, 1.4, 1.6, 2, 3, 4, 5)
COARSE_TICKS = (0.001, 0.01, 0.1, 0.2, 0.5, 1, 2, 5, 10, 100, 1000)
SLOWER, FASTER, ALIKE = "#cc3311", "#117733", "#aaaaaa"


def change_of(change: Change) -> float:
    """What is drawn: beyond drift where the machine's is known."""
    return change.ratio if change.beyond_drift is None else change.beyond_drift


def colour(change: Change) -> str:
    """Red what is flagged, green what is faster beyond the spread, else grey."""
    if change.slower:
        return SLOWER
    if change.drift is None:
        return ALIKE
    return FASTER if change.after.time.q3 / change.drift < change.before.time.q1 else ALIKE


def draw_panel(axes: Any, comparison: Comparison, found: Sequence[Change]) -> None:
    """One comparison, in the order of its tables."""
    ours = [change for changes in grouped(found).values() for change in changes]
    ratios = [change_of(change) for change in ours]
    axes.barh(
        range(len(ours)),
        [ratio - 1 for ratio in ratios],
        left=1,
        height=0.75,
        color=[colour(change) for change in ours],
    )
    for y, ratio in enumerate(ratios):
        axes.annotate(
            f"{ratio:.2f}",
            (ratio, y),
            xytext=(3 if ratio >= 1 else -3, 0),
            textcoords="offset points",
            ha="left" if ratio >= 1 else "right",
            va="center_baseline",
            fontsize=7,
        )
    axes.set_xscale("log")
    axes.axvline(1, color="black", linewidth=0.8)
    axes.margins(x=0.15)
    left, right = axes.get_xlim()
    ticks = FINE_TICKS if right / left < 5 else COARSE_TICKS
    plain_ticks(axes.xaxis, [tick for tick in ticks if left < tick < right])
    labels = [
        f"{title}, {place(change)}, {change.after.contender}"
        for title, changes in grouped(found).items()
        for change in changes
    ]
    axes.set_yticks(range(len(ours)), labels, fontsize=7)
    axes.set_ylim(len(ours) - 0.5, -0.5)
    drift = ", the machine's drift taken out" if comparison.same_device else ", on two devices"
    axes.set_xlabel(f"time of ours, new/baseline{drift}")
    axes.set_title(f"{comparison.new.label}\nagainst {comparison.baseline.label}", fontsize=9)


def figure(comparisons: Sequence[Comparison]) -> Any:
    """A panel for each new run, or None where ours was timed in none of them."""
    found = [
        (comparison, ours)
        for comparison in comparisons
        if (ours := [change for change in comparison.changes if change.counts])
    ]
    if not found:
        return None
    height = 1.6 + 0.2 * max(len(ours) for _, ours in found)
    picture, axes = panels(1, len(found), 9, height)
    for panel, (comparison, ours) in zip(axes[0], found, strict=True):
        draw_panel(panel, comparison, ours)
    return picture
