"""Speed-up of ours over each peer, drawn: a panel for each dtype, bars for each workload."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.rows import Row

COLORS = {
    "einsum": "#4477aa",
    "bmm": "#66ccee",
    "broadcast": "#bbbbbb",
    "torch.compile": "#ee6677",
}
BAR = 0.2  # of a workload's row


def matplotlib_figure() -> Any:
    """Matplotlib's ``Figure``, imported only where one is drawn; as PNG it needs no display."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "the figure needs matplotlib: pip install 'fsp-kernels[bench]'"
        ) from error
    return Figure


def draw_panel(axes: Any, rows: Sequence[Row]) -> None:
    """One dtype: workloads from top to bottom, each with a bar for every peer that ran."""
    for i, (peer, color) in enumerate(COLORS.items()):
        ratios = [(k + BAR * (i - 1.5), row.ratio(peer)) for k, row in enumerate(rows)]
        present = [(y, ratio) for y, ratio in ratios if ratio is not None]
        if not present:
            continue
        places = [y for y, _ in present]
        beyond = [ratio - 1 for _, ratio in present]
        bars = axes.barh(places, beyond, left=1, height=BAR, color=color, label=peer)
        labels = [f"{ratio:.1f}x" for _, ratio in present]
        axes.bar_label(bars, labels, fontsize=6, padding=2)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter("")  # every bar has its number
    axes.axvline(1, color="black", linewidth=0.8)
    axes.margins(x=0.15)
    axes.set_yticks(range(len(rows)), [row.workload for row in rows])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlabel("device time of the peer / ours (right of 1: ours is faster)")
    axes.set_title(rows[0].dtype)


def draw(rows: Sequence[Row], device: str, path: Path) -> None:
    """Write the figure as PNG."""
    panels: dict[str, list[Row]] = {}
    for row in rows:
        panels.setdefault(row.dtype, []).append(row)
    size = (6 * len(panels), 1.5 + 0.6 * max(map(len, panels.values())))
    figure = matplotlib_figure()(figsize=size, layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for panel, panel_rows in zip(axes, panels.values(), strict=True):
        draw_panel(panel, panel_rows)
    peers = {
        label: handle
        for panel in axes
        for handle, label in zip(*panel.get_legend_handles_labels(), strict=True)
    }
    figure.legend(peers.values(), peers, loc="outside lower center", ncols=len(COLORS))
    figure.suptitle(f"FSP loss, forward + backward: speed-up of ours on {device}")
    figure.savefig(path, dpi=150)
