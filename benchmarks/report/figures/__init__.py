"""What a run measured, drawn: one module for each figure, PNGs from :func:`draw`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.report.figures import accuracy, plan, roofline, scaling, speedup
from benchmarks.report.figures.canvas import require_matplotlib, save
from benchmarks.report.runs import Part, Run

__all__ = ["FIGURES", "draw", "require_matplotlib"]

# The part each is drawn from, how, and what it shows. None where there is nothing to draw.
FIGURES: dict[str, tuple[str, Callable[[Part], Any], str]] = {
    "speedup.png": ("loss", speedup.figure, "speed-up over each peer"),
    "roofline.png": ("loss", roofline.figure, "what the device allows, and what is reached"),
    "scaling.png": ("scaling", scaling.figure, "time and memory over batch, channels and size"),
    "plan.png": ("plan", plan.figure, "every evaluation beside the planned one"),
    "accuracy.png": ("accuracy", accuracy.figure, "gradient error over noise"),
}


def draw(run: Run, folder: Path) -> list[Path]:
    """Write every figure that the parts of a run have data for."""
    require_matplotlib()  # raises where it is missing, whether or not there is data
    paths = []
    for name, (part, make, _) in FIGURES.items():
        figure = make(run.parts[part]) if part in run.parts else None
        if figure is not None:
            paths.append(save(figure, folder / name))
    return paths
