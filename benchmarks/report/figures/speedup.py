"""Speed-up of ours over each peer: a panel for each dtype, bars for each workload."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks.report.figures.canvas import panels, shared_legend
from benchmarks.report.loss import headline
from benchmarks.report.names import colours, contenders_in_order
from benchmarks.report.runs import Contest, Part
from benchmarks.tables import digits

ROOM = 0.8  # of a workload's row, for its bars


def draw_panel(axes: Any, contests: Sequence[Contest], peers: Sequence[str]) -> None:
    """Workloads from top to bottom, each with a bar for every peer that ran."""
    height = ROOM / len(peers)
    for i, (peer, colour) in enumerate(colours(peers).items()):
        place = (i - (len(peers) - 1) / 2) * height
        ratios = [(k + place, contest.ratio(peer)) for k, contest in enumerate(contests)]
        present = [(y, ratio) for y, ratio in ratios if ratio is not None]
        bars = axes.barh(
            [y for y, _ in present],
            [ratio - 1 for _, ratio in present],
            left=1,
            height=height,
            color=colour,
            label=peer,
        )
        for bar, (y, ratio) in zip(bars, present, strict=True):
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
            bar.set_zorder(2)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:g}x")
    axes.xaxis.set_minor_formatter("")  # every bar has its number
    axes.axvline(1, color="black", linewidth=0.8, zorder=3)
    axes.grid(axis="x", color="#e5e5e5", zorder=0)
    axes.set_axisbelow(True)
    axes.margins(x=0.15)
    axes.set_xlim(left=min(axes.get_xlim()[0], 0.8))
    axes.set_yticks(range(len(contests)), [contest.key["workload"] for contest in contests])
    axes.set_ylim(len(contests) - 0.5, -0.5)
    axes.set_xlabel("time of the peer / ours (right of 1x: ours is faster)")
    axes.set_title(contests[0].key["dtype"])


def figure(part: Part) -> Any:
    """The figure, or None where ours and a peer have no result in common."""
    groups = {
        dtype: found
        for dtype, contests in headline(part).items()
        if (found := [contest for contest in contests if contest.ratio_to_fastest()])
    }
    if not groups:
        return None
    every = [contest for contests in groups.values() for contest in contests]
    peers = contenders_in_order(peer.contender for contest in every for peer in contest.peers)
    height = 1.6 + 0.17 * len(peers) * max(map(len, groups.values()))
    picture, axes = panels(1, len(groups), 7, height)
    for panel, contests in zip(axes[0], groups.values(), strict=True):
        draw_panel(panel, contests, peers)
    shared_legend(picture, axes[0])
    picture.suptitle(f"FSP loss, forward + backward: speed-up of ours on {part.device_name}")
    return picture
