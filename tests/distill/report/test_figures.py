"""What the pictures show, read off matplotlib's own objects."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.image import imread
from matplotlib.lines import Line2D

from distill.report.made_up import (
    comparison_of,
    fsp_phase,
    keep,
    keep_matrices,
    recipe,
    run_of,
    task_phase,
)
from fsp_kernels.distill.report import figures
from fsp_kernels.distill.report.comparison import Comparison, gather

Draw = Callable[[Comparison, Path], None]


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> Callable[[Draw, Comparison], Figure]:
    """The figure that would have been written."""
    kept: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: kept.append(figure))

    def draw(which: Draw, comparison: Comparison) -> Figure:
        which(comparison, Path("nowhere"))
        return kept.pop()

    return draw


Drawn = Callable[[Draw, Comparison], Figure]


def line(axes: Axes, title: str) -> Line2D:
    [found] = [line for line in axes.lines if line.get_label() == title]
    return found


def band(axes: Axes) -> tuple[float, float]:
    """The lowest and the highest of the only band."""
    [collection] = axes.collections
    heights = collection.get_paths()[0].vertices[:, 1]
    return heights.min(), heights.max()


@pytest.fixture
def two_stages(tmp_path: Path) -> Comparison:
    for seed, last in enumerate((0.6, 0.8)):
        phases = [fsp_phase(8.0, 2.0, every=200), task_phase(0.5, last)]
        keep(run_of("two-stage", seed, phases=phases), tmp_path)
    return gather([tmp_path])


def test_accuracy_is_drawn_in_percent_with_its_deviation(
    drawn: Drawn, two_stages: Comparison
) -> None:
    by_task, _ = drawn(figures.draw_accuracy, two_stages).axes
    curve = line(by_task, "FSP in two stages")
    np.testing.assert_allclose(curve.get_xdata(), [0, 10])
    np.testing.assert_allclose(curve.get_ydata(), [50, 70])
    np.testing.assert_allclose(band(by_task), [50, 70 + 200**0.5])


def test_the_second_axes_count_stage_1(drawn: Drawn, two_stages: Comparison) -> None:
    _, by_all = drawn(figures.draw_accuracy, two_stages).axes
    np.testing.assert_allclose(line(by_all, "FSP in two stages").get_xdata(), [200, 210])


def test_one_seed_has_a_band_of_no_width(drawn: Drawn, tmp_path: Path) -> None:
    keep(run_of(phases=[task_phase(0.5, 0.5)]), tmp_path)
    by_task, _ = drawn(figures.draw_accuracy, gather([tmp_path])).axes
    assert band(by_task) == (50, 50)


def test_the_teacher_is_a_level_and_its_source_is_not(drawn: Drawn, tmp_path: Path) -> None:
    arms = {"baseline": [0.9], "teacher": [0.97], "source": [0.1]}
    by_task, by_all = drawn(figures.draw_accuracy, comparison_of(tmp_path, arms)).axes
    for axes in (by_task, by_all):
        assert [x.get_label() for x in axes.lines] == ["baseline, stage 2's steps", "teacher"]
        assert list(line(axes, "teacher").get_ydata()) == [97, 97]
    assert by_task.get_ylim() == (pytest.approx(90 - 2 * 7 - 5), pytest.approx(99))


def test_losses_are_those_of_the_stages_that_have_them(
    drawn: Drawn, two_stages: Comparison
) -> None:
    task, fsp = drawn(figures.draw_losses, two_stages).axes
    assert list(line(fsp, "FSP in two stages").get_ydata()) == [8, 2]
    np.testing.assert_allclose(line(task, "FSP in two stages").get_ydata(), [0.5, 0.3])


@pytest.mark.parametrize(("last", "scale"), [(0.9, "linear"), (0.2, "log")])
def test_losses_are_logarithmic_where_they_span_something(
    drawn: Drawn, tmp_path: Path, last: float, scale: str
) -> None:
    keep(run_of("two-stage", phases=[fsp_phase(1.0, last), task_phase(0.0, 0.5)]), tmp_path)
    _, fsp = drawn(figures.draw_losses, gather([tmp_path])).axes
    assert fsp.get_yscale() == scale


def test_that_no_run_has_an_fsp_loss_is_written(drawn: Drawn, tmp_path: Path) -> None:
    _, fsp = drawn(figures.draw_losses, comparison_of(tmp_path, {"kd": [0.9]})).axes
    assert [said.get_text() for said in fsp.texts] == ["no run has an FSP loss"]


@pytest.mark.parametrize("draw", [figures.draw_accuracy, figures.draw_losses])
def test_the_split_is_named(drawn: Drawn, tmp_path: Path, draw: Draw) -> None:
    keep(run_of(), tmp_path / "a")
    keep(run_of(recipe=recipe(evaluation={"split": "validation"})), tmp_path / "b")
    axes = drawn(draw, gather([tmp_path])).axes[0]
    assert "test and validation" in axes.get_ylabel() + axes.get_title()


def test_one_legend_names_each_line_once(drawn: Drawn, tmp_path: Path) -> None:
    found = comparison_of(tmp_path, {"baseline": [0.9], "two-stage": [0.9], "teacher": [0.9]})
    figure = drawn(figures.draw_accuracy, found)
    [legend] = figure.legends
    assert [said.get_text() for said in legend.get_texts()] == [
        "baseline, stage 2's steps",
        "FSP in two stages",
        "teacher",
    ]
    assert all(axes.get_legend() is None for axes in figure.axes)


def test_a_long_legend_takes_no_room_from_the_axes(tmp_path: Path) -> None:
    for study in "abcdefgh":
        comparison_of(tmp_path / study, {"two-stage-kd": [0.9], "one-stage-kd": [0.9]})
    figures.draw_accuracy(gather([tmp_path / "a"]), tmp_path / "few.png")
    figures.draw_accuracy(gather([tmp_path]), tmp_path / "many.png")
    few, many = (imread(tmp_path / f"{name}.png").shape for name in ("few", "many"))
    assert many[1] == few[1]
    assert many[0] - few[0] == pytest.approx(7 * 0.2 * 130, abs=2)  # rows, inches, pixels an inch


def test_groups_of_several_studies_look_different(drawn: Drawn, tmp_path: Path) -> None:
    for study in "abcdef":
        comparison_of(tmp_path / study, {"baseline": [0.9], "two-stage": [0.9], "teacher": [0.9]})
    by_task, _ = drawn(figures.draw_accuracy, gather([tmp_path])).axes
    colours = [to_hex(line.get_color()) for line in by_task.lines]
    assert len(set(colours)) == len(colours) == 18
    students = [line for line in by_task.lines if "teacher" not in str(line.get_label())]
    assert [line.get_linestyle() for line in students[:8:2]] == ["-", "--", "-.", ":"]


def test_an_arm_of_one_study_has_its_colour_whatever_else_there_is(
    drawn: Drawn, tmp_path: Path
) -> None:
    alone = comparison_of(tmp_path / "a", {"two-stage": [0.9]})
    beside = comparison_of(tmp_path / "b", {"two-stage": [0.9], "baseline": [0.9]})
    colours = {
        line(drawn(figures.draw_accuracy, found).axes[0], "FSP in two stages").get_color()
        for found in (alone, beside)
    }
    assert len(colours) == 1


@pytest.fixture
def with_matrices(tmp_path: Path) -> Comparison:
    folder = keep(run_of("two-stage"), tmp_path)
    keep_matrices(folder, teacher=3.0, before=-1.0, after=1.0)
    return gather([tmp_path])


def test_matrices_are_teacher_before_after_and_what_is_left(
    drawn: Drawn, with_matrices: Comparison
) -> None:
    panels = drawn(figures.draw_matrices, with_matrices).axes[:4]
    shown = [axes.images[0].get_array() for axes in panels]
    assert [float(matrix[0, 0]) for matrix in shown] == [3, -1, 1, -2]
    assert all(matrix.shape == (2, 3) for matrix in shown)
    assert all(axes.images[0].get_clim() == (-3, 3) for axes in panels)


def test_matrices_are_named_by_the_students_layers(drawn: Drawn, with_matrices: Comparison) -> None:
    panel = drawn(figures.draw_matrices, with_matrices).axes[0]
    assert panel.get_ylabel() == "one\nto two\n(2 x 3)"
