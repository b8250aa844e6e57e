"""Every evaluation's time over the fastest one's, a line for each shape, the planned ringed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks.report.figures.canvas import markers, plain_ticks, shared_legend, wrapped_panels
from benchmarks.report.names import colours
from benchmarks.report.plan import LOSS, evaluations, excess, fastest, grouped, loses
from benchmarks.report.runs import Contest, Part

COLUMNS = 3
FINE_TICKS = (1, 1.1, 1.25, 1.5, 2, 3, 4)
COARSE_TICKS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)


def draw_panel(axes: Any, title: str, contests: Sequence[Contest], names: Sequence[str]) -> None:
    """Shapes from top to bottom; the further right, the slower."""
    colour, marker = colours(names), markers(names)
    for name in names:
        found = [
            (contest.results[name].time.median / best.time.median, y)
            for y, contest in enumerate(contests)
            if name in contest.results and (best := fastest(contest))
        ]
        axes.plot(
            [x for x, _ in found],
            [y for _, y in found],
            linestyle="none",
            marker=marker[name],
            markersize=7,
            color=colour[name],
            label=name,
            zorder=3,
        )
    chosen = [(ratio, y) for y, c in enumerate(contests) if (ratio := excess(c)) is not None]
    axes.plot(
        [x for x, _ in chosen],
        [y for _, y in chosen],
        linestyle="none",
        marker="o",
        markersize=13,
        markerfacecolor="none",
        markeredgecolor="black",
        label="planned",
        zorder=4,
    )
    axes.set_xscale("log")
    axes.margins(x=0.08)
    right = axes.get_xlim()[1]
    ticks = FINE_TICKS if right < 5 else COARSE_TICKS
    plain_ticks(axes.xaxis, [tick for tick in ticks if tick < right])
    axes.axvspan(1, LOSS, color="#eeeeee", zorder=0)
    axes.grid(color="#e5e5e5")
    axes.set_yticks(range(len(contests)), [contest.key["workload"] for contest in contests])
    for label, contest in zip(axes.get_yticklabels(), contests, strict=True):
        if loses(contest):
            label.set_color("#cc3311")
            label.set_fontweight("bold")
    axes.set_ylim(len(contests) - 0.5, -0.5)
    axes.set_xlabel("time / that of the fastest")
    axes.set_title(title)


def figure(part: Part) -> Any:
    """The figure, or None where nothing was measured."""
    groups = {
        title: found
        for title, contests in grouped(part.contests).items()
        if (found := [contest for contest in contests if contest.results])
    }
    if not groups:
        return None
    names = evaluations(part.contests)
    height = 2 + 0.32 * max(map(len, groups.values()))
    picture, axes = wrapped_panels(len(groups), COLUMNS, 6.5, height)
    for panel, (title, contests) in zip(axes, groups.items(), strict=True):
        draw_panel(panel, title, contests, names)
    shared_legend(picture, axes)
    picture.suptitle(
        f"Evaluations on {part.device_name}\n(bold red: the plan loses to the fastest)"
    )
    return picture
