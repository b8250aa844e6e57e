"""Time and memory over batch, channels and size: a panel for each axis, memory below time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from benchmarks.report.figures.canvas import markers, panels, plain_ticks
from benchmarks.report.names import colours, contenders_in_order
from benchmarks.report.runs import Part, Result
from benchmarks.report.scaling import Sweep, growth, mebibytes, order, seconds, sweeps

ROWS: tuple[tuple[str, Callable[[Result], float | None], float], ...] = (
    ("time in ms", seconds, 1e3),
    ("peak extra memory in MiB", mebibytes, 1),
)
AXIS_NAMES = {"size": "side of the map"}


def draw_panel(
    axes: Any,
    sweep: Sweep,
    amount: Callable[[Result], float | None],
    unit: float,
    names: Sequence[str],
) -> None:
    """A line for each contender; how it grows stands in the legend."""
    colour, marker = colours(names), markers(names)
    for name in sweep.names:
        curve = sweep.curve(name, amount)
        axes.plot(
            list(curve),
            [y * unit for y in curve.values()],
            color=colour[name],
            marker=marker[name],
            markersize=4.5,
            linewidth=1.4,
            label=f"{name}: {order(growth(curve))}",
        )
    axes.set_xscale("log")
    axes.set_yscale("log")
    plain_ticks(axes.xaxis, list(sweep.contests))
    axes.grid(color="#e5e5e5")
    bottom, top = axes.get_ylim()
    axes.set_ylim(bottom, top * (top / bottom) ** 0.45)  # lines rise to the right: room above them
    axes.legend(title="order of growth", fontsize=7, title_fontsize=7, loc="upper left")


def rows_of(found: Sequence[Sweep]) -> list[list[Sweep]]:
    """The axes of each dtype, layout and direction, a row of panels each."""
    groups: dict[tuple[str, ...], list[Sweep]] = {}
    for sweep in found:
        groups.setdefault((sweep.dtype, sweep.layout, sweep.direction), []).append(sweep)
    return list(groups.values())


def figure(part: Part) -> Any:
    """The figure, or None where nothing was measured."""
    rows = rows_of([sweep for sweep in sweeps(part) if sweep.names])
    if not rows:
        return None
    names = contenders_in_order(name for row in rows for sweep in row for name in sweep.names)
    columns = max(map(len, rows))
    picture, axes = panels(len(ROWS) * len(rows), columns, 5, 4.2)
    for panel in axes.flat:
        panel.set_visible(False)
    for i, row in enumerate(rows):
        for column, sweep in enumerate(row):
            for k, (what, amount, unit) in enumerate(ROWS):
                panel = axes[len(ROWS) * i + k][column]
                panel.set_visible(True)
                draw_panel(panel, sweep, amount, unit, names)
                panel.set_xlabel(AXIS_NAMES.get(sweep.axis, sweep.axis))
                panel.set_ylabel(what)
                if k == 0:
                    panel.set_title(sweep.title, fontsize=10)
    picture.suptitle(f"How time and memory grow on {part.device_name}")
    return picture
