"""Error of the gradients as the student nears its teacher: a panel for each dtype and maps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from benchmarks.report.accuracy import Curves, by_setting
from benchmarks.report.figures.canvas import markers, shared_legend, wrapped_panels
from benchmarks.report.names import colours, contenders_in_order
from benchmarks.report.runs import Part


def draw_panel(axes: Any, setting: str, curves: Curves, names: Sequence[str]) -> None:
    """A line for each contender; later ones are smaller, so that equal lines all show."""
    colour, marker = colours(names), markers(names)
    for name, curve in curves.items():
        rank = names.index(name)
        axes.plot(
            list(curve),
            [errors["gradient_error"] for errors in curve.values()],
            color=colour[name],
            marker=marker[name],
            markersize=max(4, 9 - rank),
            linewidth=max(1, 3 - 0.5 * rank),
            label=name,
        )
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.xaxis.set_ticks([], minor=True)
    axes.invert_xaxis()  # to the right the student nears its teacher, as in training
    axes.axhline(1, color="black", linewidth=0.8, linestyle="--")
    axes.grid(color="#e5e5e5")
    axes.set_xlabel("distance of student and teacher (noise)")
    axes.set_ylabel("relative error of the gradients")
    axes.set_title(setting)


def figure(part: Part) -> Any:
    """The figure, or None where nothing was measured."""
    found = by_setting(part)
    if not found:
        return None
    names = contenders_in_order(name for curves in found.values() for name in curves)
    rows = len({error["maps"] for error in part.errors})
    picture, axes = wrapped_panels(len(found), math.ceil(len(found) / rows), 4.6, 4.0)
    for panel, (setting, curves) in zip(axes, found.items(), strict=True):
        draw_panel(panel, setting, curves, names)
    shared_legend(picture, axes)
    picture.suptitle(
        f"Gradients near convergence on {part.device_name}\n(dashed: nothing of them is left)"
    )
    return picture
