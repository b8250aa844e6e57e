"""The figures of a report: speed-up, scaling and accuracy, as PNG."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from benchmarks.results import curve, groups, growth, names
from benchmarks.tables import MIB, digits

# Ours are warm, the peers cool; colours that colour-blind people can tell apart (after Paul Tol).
COLOURS = {
    "ours (triton)": "#ee7733",
    "ours (cuda)": "#cc3311",
    "ours (cpu)": "#ddaa33",
    "ours (torch)": "#aa3377",
    "ours (torch), matrix form": "#ee99aa",
    "ours (torch), gram form": "#882255",
    "einsum": "#0077bb",
    "bmm": "#33bbee",
    "broadcast": "#999999",
    "torch.compile": "#117733",
}
MARKERS = dict(zip(COLOURS, "osD^vPX*ph", strict=True))  # so that colour is not all to tell by
LEGEND_KEY, LEGEND_LETTER = 0.65, 0.08  # inches that a legend's entry takes
BARS = 0.8  # of a workload's row, for its bars
GRID = {"color": "#e5e5e5"}


def panels(rows: int, columns: int, width: float, height: float) -> tuple[Figure, Any]:
    """A figure and its axes as a matrix; sizes in inches, of one panel."""
    figure = Figure(figsize=(columns * width, rows * height), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


def shared_legend(figure: Figure, axes: Iterable[Any]) -> None:
    """One legend below all panels, as wide as the figure allows."""
    handles = {
        label: handle
        for panel in axes
        for handle, label in zip(*panel.get_legend_handles_labels(), strict=True)
    }
    longest = max(map(len, handles), default=0)
    columns = max(1, int(figure.get_figwidth() / (LEGEND_KEY + LEGEND_LETTER * longest)))
    figure.legend(
        handles.values(), handles, loc="outside lower center", ncols=columns, frameon=False
    )


def plain_ticks(axis: Any, places: Sequence[float]) -> None:
    """Ticks of a log axis at these places only, as plain numbers."""
    axis.set_ticks(places, [f"{place:g}" for place in places])
    axis.set_ticks([], minor=True)


# --- speedup.png ----------------------------------------------------------------------------------


def speedup(rows: pd.DataFrame, device: str) -> Figure | None:
    """Times of the peers over ours, forward + backward in nchw: a panel for each dtype."""
    rows = rows[(rows["part"] == "loss") & rows["ratio"].notna() & ~rows["ours"]]
    rows = rows[(rows["layout"] != "channels_last") & (rows["pass"] == "forward+backward")]
    found = list(groups(rows, "dtype"))
    if not found:
        return None
    peers = names(rows)
    most = max(group["workload"].nunique() for _, group in found)
    figure, axes = panels(1, len(found), 7, 1.6 + 0.17 * len(peers) * most)
    for panel, (dtype, group) in zip(axes[0], found, strict=True):
        draw_bars(panel, group, peers)
        panel.set_title(dtype)
    shared_legend(figure, axes[0])
    figure.suptitle(f"FSP loss, forward + backward: speed-up of ours on {device}")
    return figure


def draw_bars(axes: Any, rows: pd.DataFrame, peers: Sequence[str]) -> None:
    """Workloads from top to bottom, each with a bar from 1 to the ratio of every peer."""
    workloads = list(dict.fromkeys(rows["workload"]))
    height = BARS / len(peers)
    for i, peer in enumerate(peers):
        own = rows[rows["contender"] == peer]
        ratios = [float(ratio) for ratio in own["ratio"]]
        place = (i - (len(peers) - 1) / 2) * height
        ys = [workloads.index(name) + place for name in own["workload"]]
        lengths = [ratio - 1 for ratio in ratios]
        axes.barh(ys, lengths, left=1, height=height, color=COLOURS[peer], label=peer, zorder=2)
        for y, ratio in zip(ys, ratios, strict=True):
            # Beside the end that is away from 1, where no other bar of the row can be.
            axes.annotate(
                f"{digits(ratio)}x",
                (ratio, y),
                xytext=(3 if ratio >= 1 else -3, 0),
                textcoords="offset points",
                ha="left" if ratio >= 1 else "right",
                va="center_baseline",
                fontsize=6.5,
            )
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:g}x")
    axes.xaxis.set_minor_formatter("")  # every bar has its number
    axes.axvline(1, color="black", linewidth=0.8, zorder=3)
    axes.grid(axis="x", zorder=0, **GRID)
    axes.set_axisbelow(True)
    axes.margins(x=0.15)
    axes.set_xlim(left=min(axes.get_xlim()[0], 0.8))
    axes.set_yticks(range(len(workloads)), workloads)
    axes.set_ylim(len(workloads) - 0.5, -0.5)
    axes.set_xlabel("time of the peer / ours (right of 1x: ours is faster)")


# --- scaling.png ----------------------------------------------------------------------------------

AMOUNTS = (("time in ms", "median", 1e3), ("peak extra memory in MiB", "peak_bytes", 1 / MIB))


def scaling(rows: pd.DataFrame, device: str) -> Figure | None:
    """Time and memory over batch, channels and size: a column for each axis, memory below time."""
    rows = rows[(rows["part"] == "scaling") & rows["median"].notna()]
    found: dict[str, list[tuple[str, pd.DataFrame]]] = {}
    for title, sweep in groups(rows, "axis", "dtype", "layout", "pass"):
        found.setdefault(title.partition(", ")[2], []).append((title, sweep))
    if not found:
        return None
    columns = max(map(len, found.values()))
    figure, axes = panels(len(AMOUNTS) * len(found), columns, 5, 4.2)
    for panel in axes.flat:
        panel.set_visible(False)
    for i, sweeps in enumerate(found.values()):
        for column, (title, sweep) in enumerate(sweeps):
            for k, amount in enumerate(AMOUNTS):
                panel = axes[len(AMOUNTS) * i + k][column]
                panel.set_visible(True)
                draw_curves(panel, sweep, *amount)
                if k == 0:
                    panel.set_title(title, fontsize=10)
    figure.suptitle(f"How time and memory grow on {device}")
    return figure


def draw_curves(axes: Any, sweep: pd.DataFrame, what: str, column: str, unit: float) -> None:
    """A line for each contender, with its order of growth in the legend."""
    for name in names(sweep):
        points = curve(sweep, name, column, unit)
        slope = growth(points)
        axes.plot(
            list(points),
            list(points.values()),
            color=COLOURS[name],
            marker=MARKERS[name],
            markersize=4.5,
            linewidth=1.4,
            label=f"{name}: {'-' if slope is None else f'{slope:.2f}'}",
        )
    axes.set_xscale("log")
    axes.set_yscale("log")
    plain_ticks(axes.xaxis, sorted(sweep["value"].unique()))
    axes.grid(**GRID)
    bottom, top = axes.get_ylim()
    if bottom > 0:  # not an empty panel
        axes.set_ylim(bottom, top * (top / bottom) ** 0.45)  # room above lines that rise
    axes.legend(title="order of growth", fontsize=7, title_fontsize=7, loc="upper left")
    axis = sweep["axis"].iloc[0]
    axes.set_xlabel("side of the map" if axis == "size" else axis)
    axes.set_ylabel(what)


# --- accuracy.png ---------------------------------------------------------------------------------


def accuracy(rows: pd.DataFrame, device: str) -> Figure | None:
    """Gradient errors as the student nears its teacher: a panel for each dtype and shape."""
    rows = rows[(rows["part"] == "accuracy") & rows["gradient_error"].notna()]
    found = [x for _, maps in rows.groupby("workload", sort=False) for x in groups(maps, "dtype")]
    if not found:
        return None
    columns = min(len(found), math.ceil(len(found) / rows["workload"].nunique()))
    figure, axes = panels(math.ceil(len(found) / columns), columns, 4.6, 4.0)
    for empty in axes.flat[len(found) :]:
        empty.remove()
    used = list(axes.flat[: len(found)])
    for panel, (dtype, group) in zip(used, found, strict=True):
        draw_errors(panel, group)
        panel.set_title(f"{dtype}, {group['workload'].iloc[0]}")
    shared_legend(figure, used)
    figure.suptitle(f"Gradients near convergence on {device}\n(dashed: nothing of them is left)")
    return figure


def draw_errors(axes: Any, rows: pd.DataFrame) -> None:
    """A line for each contender; later ones are smaller, so that equal lines all show."""
    for rank, name in enumerate(names(rows)):
        own = rows[rows["contender"] == name].sort_values("noise", ascending=False)
        axes.plot(
            own["noise"].astype(float),
            own["gradient_error"].astype(float),
            color=COLOURS[name],
            marker=MARKERS[name],
            markersize=max(4, 9 - rank),
            linewidth=max(1, 3 - 0.5 * rank),
            label=name,
        )
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.xaxis.set_ticks([], minor=True)
    axes.invert_xaxis()  # to the right the student nears its teacher, as in training
    axes.axhline(1, color="black", linewidth=0.8, linestyle="--")
    axes.grid(**GRID)
    axes.set_xlabel("distance of student and teacher (noise)")
    axes.set_ylabel("relative error of the gradients")


# --------------------------------------------------------------------------------------------------

FIGURES = {"speedup.png": speedup, "scaling.png": scaling, "accuracy.png": accuracy}


def draw(rows: pd.DataFrame, device: str, folder: Path) -> list[Path]:
    """Write every figure that there are rows for; ``rows`` have ratios. Returns their paths."""
    paths = []
    for name, make in FIGURES.items():
        figure = make(rows, device)
        if figure is not None:
            figure.savefig(folder / name, dpi=150)
            paths.append(folder / name)
    return paths
