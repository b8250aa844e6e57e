"""The report's pictures. Only matplotlib's ``Figure`` is used: no pyplot, no global state."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

from fsp_kernels.distill.records import Phase
from fsp_kernels.distill.report.comparison import Comparison, Group, Matrices
from fsp_kernels.distill.report.metrics import curve

# Okabe and Ito's colours, which people of any colour vision tell apart.
_COLOURS = {
    "baseline": "#0072B2",
    "baseline-long": "#56B4E9",
    "two-stage": "#D55E00",
    "one-stage": "#009E73",
    "kd": "#CC79A7",
    "two-stage-kd": "#E69F00",
    "one-stage-kd": "#000000",
}
_TEACHER_COLOUR = "#555555"
_DASHES = ("-", "--", "-.", ":")  # of several studies
_DPI = 130
_WIDTH, _HEIGHT, _ROW = 10.0, 4.2, 0.2  # inches, of two axes and of a legend's row
_CHARACTERS, _SYMBOL = 140, 8  # in a legend's row, and taken by each line's symbol


def draw_accuracy(comparison: Comparison, path: Path) -> None:
    """Accuracy by task steps and by all steps: mean over seeds, shaded by its deviation."""
    figure = Figure(figsize=(_WIDTH, _HEIGHT), layout="constrained")
    by_task, by_all = figure.subplots(1, 2, sharey=True)
    for group in comparison.students:
        phases = [run.task for run in group.runs]
        before = statistics.median_low(run.steps - run.task.steps for run in group.runs)
        _curve(by_task, comparison, group, phases, "accuracy", scale=100)
        _curve(by_all, comparison, group, phases, "accuracy", scale=100, shift=before)
    for group in _drawn_teachers(comparison):
        accuracy = 100 * statistics.fmean(run.accuracy for run in group.runs)
        colour = _colour(comparison, group)
        for axes in (by_task, by_all):
            axes.axhline(accuracy, color=colour, ls=(0, (1, 2)), label=group.title)
    by_task.set(
        xlabel="steps on the task loss",
        ylabel=f"{_splits(comparison)} accuracy, %",
        title="By steps on the task loss",
    )
    by_all.set(xlabel="all optimiser steps", title="By all steps, stage 1 counted")
    by_task.set_ylim(*_accuracy_range(comparison))
    _finish(figure, by_task, by_all)
    figure.savefig(path, dpi=_DPI, format="png")


def draw_losses(comparison: Comparison, path: Path) -> None:
    """The FSP loss where it was minimised, and the cross-entropy, on the evaluation split."""
    figure = Figure(figsize=(_WIDTH, _HEIGHT), layout="constrained")
    task, fsp = figure.subplots(1, 2)
    for group in comparison.students:
        distilled = [phase for run in group.runs for phase in run.phases if phase.has_fsp]
        if distilled:
            _curve(fsp, comparison, group, distilled, "fsp_loss")
        _curve(task, comparison, group, [run.task for run in group.runs], "loss")
    if not fsp.lines:
        fsp.text(0.5, 0.5, "no run has an FSP loss", transform=fsp.transAxes, ha="center")
    splits = _splits(comparison)
    task.set(xlabel="steps on the task loss", title=f"Cross-entropy, {splits}")
    fsp.set(xlabel="steps of the stage that has it", title=f"FSP loss, {splits}")
    for axes in (task, fsp):
        _logarithmic(axes)
    _finish(figure, task, fsp)
    figure.savefig(path, dpi=_DPI, format="png")


def draw_matrices(comparison: Comparison, path: Path) -> None:
    """FSP matrices: teacher, student before and after, and what is left of the difference.

    A row is a pair of layers and has one colour scale.
    """
    found = drawn_matrices(comparison)
    assert found is not None
    matrices = found[1]
    rows = sum(name.startswith("teacher/") for name in matrices.tensors)
    figure = Figure(figsize=(11, 2.7 * rows), layout="constrained")
    grid = figure.subplots(rows, 4, squeeze=False)
    for index, line in enumerate(grid):
        teacher, before, after = (
            matrices.tensors[f"{name}/{index}"].numpy() for name in ("teacher", "before", "after")
        )
        panels = {
            "teacher": teacher,
            "student before": before,
            "student after": after,
            "after − teacher": after - teacher,
        }
        limit = float(max(np.abs(matrix).max() for matrix in panels.values()))
        for axes, (title, matrix) in zip(line, panels.items(), strict=True):
            image = axes.imshow(matrix, cmap="RdBu_r", vmin=-limit, vmax=limit, aspect="auto")
            axes.set(xticks=[], yticks=[])
            if index == 0:
                axes.set_title(title)
        m, n = teacher.shape
        paths = "\nto ".join(matrices.pairs[index].student) if matrices.pairs else f"pair {index}"
        line[0].set_ylabel(f"{paths}\n({m} x {n})")
        figure.colorbar(image, ax=line, shrink=0.9)
    figure.savefig(path, dpi=_DPI, format="png")


def drawn_matrices(comparison: Comparison) -> tuple[Group, Matrices] | None:
    """Those that are drawn: of the first group that has any."""
    found = ((group, group.matrices) for group in comparison.students)
    return next(((group, matrices) for group, matrices in found if matrices is not None), None)


def _curve(
    axes: Axes,
    comparison: Comparison,
    group: Group,
    phases: Sequence[Phase],
    figure: str,
    scale: float = 1.0,
    shift: float = 0,
) -> None:
    """The mean of ``figure`` over ``phases`` (one per seed), and a band of one deviation."""
    at, each = curve(phases, figure)
    steps, values = shift + np.array(at), scale * np.array(each)
    mean, deviation = values.mean(0), values.std(0, ddof=1 if len(phases) > 1 else 0)
    colour, dashes = _colour(comparison, group), _dashes(comparison, group)
    axes.plot(steps, mean, ls=dashes, color=colour, label=group.title)
    axes.fill_between(steps, mean - deviation, mean + deviation, color=colour, alpha=0.2, lw=0)


def _finish(figure: Figure, *both: Axes) -> None:
    """Grids, and below the axes one legend for both."""
    named: dict[str, Artist] = {}
    for axes in both:
        axes.grid(alpha=0.3)
        for line, label in zip(*axes.get_legend_handles_labels(), strict=True):
            named.setdefault(str(label), line)
    columns = min(len(named), max(1, _CHARACTERS // (_SYMBOL + max(map(len, named)))))
    rows = -(-len(named) // columns)
    figure.set_figheight(_HEIGHT + _ROW * rows)
    figure.legend(
        named.values(), named.keys(), loc="outside lower center", ncols=columns, fontsize="small"
    )


def _logarithmic(axes: Axes) -> None:
    """A logarithmic scale with plain numbers, where there is more than a few ticks' range."""
    values = [y for line in axes.lines for y in np.asarray(line.get_ydata(), float) if y > 0]
    if not values or max(values) < 3 * min(values):
        return
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _colour(comparison: Comparison, group: Group) -> str:
    """By the arm; of several studies each group has its own."""
    if len(comparison.configs) > 1:
        drawn = [*comparison.students, *_drawn_teachers(comparison)]
        few = colormaps["tab10" if len(drawn) <= 10 else "tab20"]
        return to_hex(few(drawn.index(group) % few.N))
    return _COLOURS.get(group.arm, _TEACHER_COLOUR)


def _dashes(comparison: Comparison, group: Group) -> str:
    """By the study; of one, the longer baseline lets the shorter shine through where they agree."""
    if len(comparison.configs) == 1:
        return "--" if group.arm == "baseline-long" else "-"
    return _DASHES[list(comparison.configs).index(group.study) % len(_DASHES)]


def _drawn_teachers(comparison: Comparison) -> list[Group]:
    """Not what they were on other data."""
    return [group for group in comparison.teachers if group.arm == "teacher"]


def _splits(comparison: Comparison) -> str:
    found = {config.evaluation.split for config in comparison.configs.values()}
    return " and ".join(sorted(found))


def _accuracy_range(comparison: Comparison) -> tuple[float, float]:
    """From just under the first figures worth comparing to just over the best."""
    drawn = [*comparison.students, *_drawn_teachers(comparison)]
    last = [run.accuracy for group in drawn for run in group.runs]
    best, worst = 100 * max(last), 100 * min(last)
    return max(0.0, worst - 2 * (best - worst) - 5), min(100.0, best + 2)
