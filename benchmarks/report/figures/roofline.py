"""What the device allows and what each contender reaches of it: a panel for each dtype."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from benchmarks.report.figures.canvas import GREY, markers, panels, shared_legend
from benchmarks.report.loss import headline
from benchmarks.report.names import colours, contenders_in_order
from benchmarks.report.runs import Contest, Part, Result

LABEL_ROOM = 0.055  # between two workloads' names, of a panel's width
ASIDE = 1.012  # from one contender to the next, so that equal ones can be seen


def intensity(result: Result) -> float:
    """Flops for each byte that has to move."""
    return result.info["floor_flops"] / result.info["floor_bytes"]


def reached(result: Result) -> float:
    """Needed flops per second: work that a contender does beyond the needed does not count."""
    return result.info["floor_flops"] / result.time.median


def roof(result: Result, x: float) -> float:
    """The flops per second that the device's measured rates allow at an intensity."""
    info = result.info
    return min(info["matrix_flops_per_second"], x * info["copy_bytes_per_second"])


def spread_out(places: Sequence[float], room: float) -> list[float]:
    """Sorted places within 0..1, moved no more than needed for each to have its room."""
    room = min(room, 1 / max(len(places) - 1, 1))
    moved: list[float] = []
    for place in places:
        moved.append(max(place, moved[-1] + room) if moved else place)
    limit = 1.0
    for i in reversed(range(len(moved))):
        moved[i] = min(moved[i], limit)
        limit = moved[i] - room
    return moved


def label_workloads(axes: Any, contests: Sequence[Contest]) -> None:
    """Names above the panel, each with a line down to its contenders."""
    left, right = (math.log(x) for x in axes.get_xlim())
    results = sorted((next(iter(c.results.values())) for c in contests), key=intensity)
    fractions = [(math.log(intensity(r)) - left) / (right - left) for r in results]
    bottom, top = axes.get_ylim()
    for result, fraction in zip(results, spread_out(fractions, LABEL_ROOM), strict=True):
        x = intensity(result)
        axes.plot([x, x], [bottom, top], color="#dddddd", linewidth=0.8, zorder=0)
        axes.annotate(
            result.info["workload"],
            (x, top),
            xytext=(fraction, 1.05),
            textcoords="axes fraction",
            rotation=50,
            ha="left",
            va="bottom",
            rotation_mode="anchor",
            fontsize=8,
            arrowprops={"arrowstyle": "-", "color": "#bbbbbb", "linewidth": 0.8},
        )


def draw_roof(axes: Any, results: Sequence[Result]) -> None:
    """The two measured rates, over the panel's whole width."""
    left, right = axes.get_xlim()
    one = fastest_copy(results)
    corners = [left, ridge(one), right]
    axes.plot(corners, [roof(one, x) for x in corners], color="black", linewidth=1.4, zorder=1)


def set_limits(axes: Any, results: Sequence[Result]) -> None:
    """Room around every point, and for both sides of the roof."""
    one = fastest_copy(results)
    xs = [ridge(one), *(intensity(result) for result in results)]
    ys = [reached(result) for result in results]
    left, right = min(xs) / 1.6, max(xs) * 1.6
    axes.set_xlim(left, right)
    axes.set_ylim(min(*ys, roof(one, left)) / 1.6, max(*ys, roof(one, right)) * 1.6)


def fastest_copy(results: Sequence[Result]) -> Result:
    """The one with the highest roof: a CPU copies small maps from its caches."""
    return max(results, key=lambda result: result.info["copy_bytes_per_second"])


def ridge(result: Result) -> float:
    """Flops for each byte from which on flops bind."""
    return result.info["matrix_flops_per_second"] / result.info["copy_bytes_per_second"]


def copy_rates(results: Sequence[Result]) -> str:
    """One number, or from the slowest to the fastest."""
    rates = [result.info["copy_bytes_per_second"] / 1e9 for result in results]
    low, high = f"{min(rates):.3g}", f"{max(rates):.3g}"
    return f"{high} GB/s" if low == high else f"{low} to {high} GB/s, by size"


def draw_panel(axes: Any, contests: Sequence[Contest], names: Sequence[str]) -> None:
    """Points of all contenders under the roof of their dtype."""
    axes.set_xscale("log")
    axes.set_yscale("log")
    results = [result for contest in contests for result in contest.results.values()]
    colour, marker = colours(names), markers(names)
    for i, name in enumerate(names):
        found = [result for result in results if result.contender == name]
        axes.plot(
            [intensity(result) * ASIDE ** (i - (len(names) - 1) / 2) for result in found],
            [reached(result) for result in found],
            linestyle="none",
            marker=marker[name],
            markersize=7,
            markeredgecolor="white",
            markeredgewidth=0.6,
            color=colour[name],
            label=name,
            zorder=3 - i / len(names),  # ours on top
        )
    set_limits(axes, results)
    draw_roof(axes, results)
    label_workloads(axes, contests)
    rates = results[0].info
    axes.text(
        0.02,  # where no workload is: left of all of them lies the ridge
        0.02,
        f"{contests[0].key['dtype']}\n"
        f"copy {copy_rates(results)}\n"
        f"matrix product {rates['matrix_flops_per_second'] / 1e9:.4g} Gflop/s",
        transform=axes.transAxes,
        ha="left",
        va="bottom",
        color=GREY,
    )
    axes.set_xlabel("needed flops / needed bytes")
    axes.set_ylabel("needed flops / measured second")


def figure(part: Part) -> Any:
    """The figure, or None where nothing of it was measured."""
    groups = {
        dtype: found
        for dtype, contests in headline(part).items()
        if (found := [contest for contest in contests if contest.results])
    }
    if not groups:
        return None
    names = contenders_in_order(
        name for contests in groups.values() for contest in contests for name in contest.results
    )
    picture, axes = panels(1, len(groups), 7.5, 6.8)
    for panel, contests in zip(axes[0], groups.values(), strict=True):
        draw_panel(panel, contests, names)
    shared_legend(picture, axes[0])
    picture.suptitle(f"FSP loss, forward + backward, under the roofs of {part.device_name}")
    return picture
