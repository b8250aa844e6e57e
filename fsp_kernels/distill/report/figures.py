"""The report's figures. Only matplotlib's ``Figure`` is used: no pyplot, no global state."""

from __future__ import annotations

from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, PercentFormatter

from fsp_kernels.distill.arms import ARMS
from fsp_kernels.distill.report.results import Group, Matrices, Results

FIGURES = ("curves", "fsp-matrices")
# Okabe and Ito's colours, which people of any colour vision tell apart; teachers are grey.
_ARMS = ("#0072B2", "#56B4E9", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#000000")
_COLOURS = {"teacher": "#555555"} | dict(zip(ARMS, _ARMS, strict=True))
_NAMES = {"accuracy": "accuracy", "loss": "cross-entropy", "fsp_loss": "FSP loss"}


def draw(results: Results) -> dict[str, Figure]:
    """The figures that there is something for, by name."""
    figures = {"curves": draw_curves(results)} if results.students else {}
    found = [group.matrices for group in results.students if group.matrices is not None]
    return figures | ({"fsp-matrices": draw_matrices(found[0])} if found else {})


def draw_curves(results: Results) -> Figure:
    """Accuracy, cross-entropy and FSP loss on the evaluation split by steps: means over seeds.

    A band is one standard deviation to each side. Teachers are levels of accuracy.
    """
    panels = [  # a curve, its x axis and whether stage 1 counts there
        ("accuracy", "steps on the task loss", False),
        ("accuracy", "all steps, stage 1 counted", True),
        ("loss", "steps on the task loss", False),
        ("fsp_loss", "steps of the stage that has it", False),
    ]
    # What a teacher was on other data has no place here.
    groups = [group for group in results.groups if group.arm != "source"]
    figure = Figure(figsize=(10, 8 + 0.2 * len(groups)), layout="constrained")
    for axes, (name, steps, whole) in zip(figure.subplots(2, 2).flat, panels, strict=True):
        axes.set(title=f"{_NAMES[name]}, {results.split}", xlabel=steps)
        axes.grid(alpha=0.3)
        for group in groups:
            row = results.summaries[group.study, group.arm]
            if group.arm in ARMS:
                _draw_curve(axes, results, group, name, row["stage1_steps"] if whole else 0)
            elif name == "accuracy":
                axes.axhline(row["accuracy"], **_style(results, group))
        if name == "accuracy":
            last = [run.accuracy for group in groups for run in group.runs]
            best, worst = max(last), min(last)
            # From just under the first accuracies worth a look to just over the best.
            axes.set_ylim(max(0, worst - 2 * (best - worst) - 0.05), min(1, best + 0.02))
            axes.yaxis.set_major_formatter(PercentFormatter(1))
        else:
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_formatter("")
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", handlelength=5, fontsize="small")
    return figure


def draw_matrices(matrices: Matrices) -> Figure:
    """FSP matrices: teacher, student before and after, and the difference that is left.

    A row is a pair of layers and has one colour scale.
    """
    rows = sum(name.startswith("teacher/") for name in matrices.tensors)
    figure = Figure(figsize=(11, 2.7 * rows), layout="constrained")
    for index, line in enumerate(figure.subplots(rows, 4, squeeze=False)):
        teacher, before, after = (
            matrices.tensors[f"{name}/{index}"].numpy() for name in ("teacher", "before", "after")
        )
        panels = {
            "teacher": teacher,
            "student before": before,
            "student after": after,
            "after − teacher": after - teacher,
        }
        limit = max(abs(matrix).max() for matrix in panels.values())
        for axes, (title, matrix) in zip(line, panels.items(), strict=True):
            image = axes.imshow(matrix, cmap="RdBu_r", vmin=-limit, vmax=limit, aspect="auto")
            axes.set(xticks=[], yticks=[], title=title if index == 0 else "")
        m, n = teacher.shape
        paths = "\nto ".join(matrices.pairs[index].student) if matrices.pairs else f"pair {index}"
        line[0].set_ylabel(f"{paths}\n({m} x {n})")
        figure.colorbar(image, ax=line, shrink=0.9)
    return figure


def _draw_curve(axes: Axes, results: Results, group: Group, name: str, shift: int) -> None:
    """The mean over seeds, and a band of one deviation; nothing if no run has the curve."""
    table = group.curve(name)
    if not table.empty:
        steps, style = shift + table.index, _style(results, group)
        mean, deviation = table.mean(axis=1), table.std(axis=1).fillna(0)
        axes.plot(steps, mean, alpha=0.8, **style)  # both baselines show where they agree
        axes.fill_between(steps, mean - deviation, mean + deviation, fc=style["color"], alpha=0.2)


def _style(results: Results, group: Group) -> dict[str, Any]:
    """The arm's colour, dashes with longer gaps the later the study, and the title."""
    study = list(results.configs).index(group.study)
    return {
        "color": _COLOURS[group.arm],
        "linestyle": (0, (1, 2 + study) if group.arm == "teacher" else (6, 2 * study)),
        # Matplotlib reads "$" as mathematics and a leading "_" as "no label".
        "label": f" {group.title}".replace("$", r"\$"),
    }
