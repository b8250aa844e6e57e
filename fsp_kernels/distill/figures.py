"""The report's pictures. Only matplotlib's ``Figure`` is used: no pyplot, no global state."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

from fsp_kernels.distill.compare import ARMS, Comparison
from fsp_kernels.distill.train import Phase

_COLOURS = {"baseline": "#0072B2", "baseline-long": "#56B4E9", "distilled": "#D55E00"}
_TEACHER_COLOUR = "#555555"
_DPI = 150


def draw_accuracy(comparison: Comparison, path: Path) -> None:
    """Accuracy by task steps and by all steps: mean over seeds, shaded by its deviation."""
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    by_task, by_all = figure.subplots(1, 2, sharey=True)
    stage1_steps = comparison.config.stage1.steps
    for arm in ARMS:
        phases = [run.task for run in comparison.of(arm)]
        _curve(by_task, arm, phases, "accuracy", scale=100)
        shift = stage1_steps if ARMS[arm].distilled else 0
        _curve(by_all, arm, phases, "accuracy", scale=100, shift=shift)
    for axes in (by_task, by_all):
        axes.axhline(
            100 * comparison.teacher.accuracy, color=_TEACHER_COLOUR, ls=":", label="teacher"
        )
        axes.grid(alpha=0.3)
    by_all.axvspan(0, stage1_steps, color=_COLOURS["distilled"], alpha=0.08, lw=0)
    by_all.text(
        stage1_steps / 2,
        0.5,
        "distilled student\nin stage 1",
        transform=by_all.get_xaxis_transform(),
        ha="center",
        color=_COLOURS["distilled"],
    )
    by_task.set(
        xlabel="steps on the task loss",
        ylabel=f"{comparison.config.evaluation.split} accuracy, %",
        title="By steps of stage 2",
    )
    by_all.set(xlabel="all optimiser steps", title="By all steps, stage 1 counted")
    by_task.set_ylim(*_accuracy_range(comparison))
    by_task.legend(loc="lower right")
    figure.savefig(path, dpi=_DPI)


def draw_losses(comparison: Comparison, path: Path) -> None:
    """The FSP loss of stage 1 and the cross-entropy after it, on the evaluation split."""
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    fsp, task = figure.subplots(1, 2)
    stage1 = [run.stage1 for run in comparison.of("distilled") if run.stage1]
    _curve(fsp, "distilled", stage1, "fsp_loss")
    for arm in ARMS:
        _curve(task, arm, [run.task for run in comparison.of(arm)], "loss")
    split = comparison.config.evaluation.split
    fsp.set(xlabel="steps of stage 1", ylabel=f"{split} FSP loss", title="Stage 1: FSP loss")
    task.set(xlabel="steps on the task loss", ylabel=f"{split} cross-entropy", title="Task loss")
    for axes in (fsp, task):
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.grid(alpha=0.3, which="both")
    task.legend()
    figure.savefig(path, dpi=_DPI)


def draw_matrices(comparison: Comparison, path: Path) -> None:
    """FSP matrices: teacher, student before and after stage 1, and what is left of the difference.

    A row is a pair of layers and has one colour scale.
    """
    rows = len(comparison.config.pairs)
    figure = Figure(figsize=(11, 2.7 * rows), layout="constrained")
    grid = figure.subplots(rows, 4, squeeze=False)
    for index, pair in enumerate(comparison.config.pairs):
        teacher, before, after = (
            comparison.matrices[name][index].numpy() for name in ("teacher", "before", "after")
        )
        panels = {
            "teacher": teacher,
            "student before stage 1": before,
            "student after stage 1": after,
            "after − teacher": after - teacher,
        }
        limit = float(max(np.abs(matrix).max() for matrix in panels.values()))
        for axes, (title, matrix) in zip(grid[index], panels.items(), strict=True):
            image = axes.imshow(matrix, cmap="RdBu_r", vmin=-limit, vmax=limit)
            axes.set(xticks=[], yticks=[])
            if index == 0:
                axes.set_title(title)
        m, n = teacher.shape
        grid[index][0].set_ylabel(f"{pair.student[0]}\nto {pair.student[1]}\n({m} x {n})")
        figure.colorbar(image, ax=grid[index], shrink=0.9)
    figure.savefig(path, dpi=_DPI)


def _curve(
    axes: Axes,
    arm: str,
    phases: Sequence[Phase],
    figure: str,
    scale: float = 1.0,
    shift: int = 0,
) -> None:
    """The mean of ``figure`` over ``phases`` (one per seed), and a band of one deviation."""
    steps = shift + np.array([row["step"] for row in phases[0].history])
    values = scale * np.array([[row[figure] for row in phase.history] for phase in phases])
    mean, deviation = values.mean(0), values.std(0, ddof=1 if len(phases) > 1 else 0)
    dashes = "--" if arm == "baseline-long" else "-"
    axes.plot(steps, mean, dashes, color=_COLOURS[arm], label=ARMS[arm].title)
    axes.fill_between(steps, mean - deviation, mean + deviation, color=_COLOURS[arm], alpha=0.2)


def _accuracy_range(comparison: Comparison) -> tuple[float, float]:
    """From just under the first figures worth comparing to just over the best."""
    last = [run.accuracy for run in [comparison.teacher, *comparison.runs]]
    best, worst = 100 * max(last), 100 * min(last)
    return max(0.0, worst - 4 * (best - worst) - 5), min(100.0, best + 2)
