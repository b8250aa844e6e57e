"""What all figures share: matplotlib's objects, the markers, a legend of all panels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

MARKERS = ("o", "s", "D", "^", "v", "P", "X", "*")
LEGEND_KEY, LEGEND_LETTER = 0.65, 0.08  # inches that a legend's entry takes
GREY = "#666666"


def require_matplotlib() -> Any:
    """Matplotlib's ``Figure``, imported only where one is drawn; as PNG it needs no display."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "figures need matplotlib: pip install 'fsp-kernels[bench]'"
        ) from error
    return Figure


def panels(rows: int, columns: int, width: float, height: float) -> tuple[Any, Any]:
    """A figure and its axes, as a matrix; sizes in inches, of one panel."""
    figure = require_matplotlib()(figsize=(columns * width, rows * height), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


def wrapped_panels(count: int, columns: int, width: float, height: float) -> tuple[Any, list[Any]]:
    """A figure and this many axes, row by row."""
    columns = min(count, columns)
    figure, axes = panels(math.ceil(count / columns), columns, width, height)
    for empty in axes.flat[count:]:
        empty.remove()
    return figure, list(axes.flat[:count])


def shared_legend(figure: Any, axes: Sequence[Any]) -> None:
    """One legend below, with each label of any panel once, as wide as the figure allows."""
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


def markers(names: Sequence[str]) -> dict[str, str]:
    """A marker for each name, so that colour is not all there is to tell lines apart."""
    return {name: MARKERS[i % len(MARKERS)] for i, name in enumerate(names)}


def plain_ticks(axis: Any, places: Sequence[float]) -> None:
    """Ticks of a log axis at these places only, as plain numbers."""
    axis.set_ticks(places, [f"{place:g}" for place in places])
    axis.set_ticks([], minor=True)


def save(figure: Any, path: Path) -> Path:
    """As PNG."""
    figure.savefig(path, dpi=150)
    return path
