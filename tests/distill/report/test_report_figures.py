"""What the figures show, read off matplotlib's own objects."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from made_up_runs import (
    fsp_phase,
    keep,
    keep_matrices,
    recipe,
    results_of,
    run_of,
    task_phase,
)
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.lines import Line2D

from fsp_kernels.distill.report.figures import draw_curves, draw_matrices
from fsp_kernels.distill.report.results import Results, gather


def line(axes: Axes, title: str) -> Line2D:
    [found] = [line for line in axes.lines if str(line.get_label()).strip() == title]
    return found


@pytest.fixture
def two_stages(tmp_path: Path) -> Results:
    for seed, last in enumerate((0.6, 0.8)):
        phases = [fsp_phase(8.0, 2.0, every=200), task_phase(0.5, last)]
        keep(run_of("two-stage", seed, phases=phases), tmp_path)
    return gather([tmp_path])


def test_curves_are_means_over_seeds_by_the_steps_of_their_stage(two_stages: Results) -> None:
    expected = [([0, 10], [0.5, 0.7]), ([200, 210], [0.5, 0.7])]  # all steps count stage 1
    expected += [([0, 10], [0.5, 0.3]), ([0, 200], [8, 2])]
    for axes, (steps, values) in zip(draw_curves(two_stages).axes, expected, strict=True):
        found = line(axes, "FSP in two stages")
        np.testing.assert_allclose(found.get_xdata(), steps)
        np.testing.assert_allclose(found.get_ydata(), values)


@pytest.mark.parametrize(("seeds", "deviation"), [(2, 0.02**0.5), (1, 0.0)])
def test_a_band_is_the_sample_deviation(tmp_path: Path, seeds: int, deviation: float) -> None:
    found = results_of(tmp_path, {"baseline": [0.6, 0.8][:seeds]})
    [band] = draw_curves(found).axes[0].collections
    heights = band.get_paths()[0].vertices[:, 1]
    assert heights.max() == pytest.approx(np.mean([0.6, 0.8][:seeds]) + deviation)


def test_the_teacher_is_a_level_and_its_source_is_not(tmp_path: Path) -> None:
    arms = {"baseline": [0.9], "teacher": [0.97], "source": [0.1]}
    for axes in draw_curves(results_of(tmp_path, arms)).axes[:2]:
        assert len(axes.lines) == 2
        assert list(line(axes, "teacher").get_ydata()) == [0.97, 0.97]
        assert axes.get_ylim() == (pytest.approx(0.9 - 2 * 0.07 - 0.05), pytest.approx(0.99))


def test_the_splits_are_named(tmp_path: Path) -> None:
    keep(run_of(), tmp_path / "a")
    keep(run_of(recipe=recipe(evaluation={"split": "validation"})), tmp_path / "b")
    figure = draw_curves(gather([tmp_path]))
    assert all("test / validation" in axes.get_title() for axes in figure.axes)


def test_one_legend_names_each_group_once_whatever_its_study_is_called(tmp_path: Path) -> None:
    for study in ("_a", r"$\frac$"):
        results_of(tmp_path / study, {"baseline": [0.9], "teacher": [0.9]})
    figure = draw_curves(gather([tmp_path / "_a", tmp_path / r"$\frac$"]))
    figure.canvas.draw()
    [legend] = figure.legends
    assert [text.get_text().strip() for text in legend.get_texts()] == [
        "_a: teacher",
        "_a: baseline, stage 2's steps",
        r"\$\frac\$: teacher",
        r"\$\frac\$: baseline, stage 2's steps",
    ]


def test_a_long_legend_takes_no_room_from_the_axes(tmp_path: Path) -> None:
    heights = []
    for studies in ("a", "bcdefgh"):
        for study in studies:
            arms = {"two-stage-kd": [0.9], "one-stage-kd": [0.9]}
            results_of(tmp_path / studies / study, arms)
        figure = draw_curves(gather([tmp_path / studies]))
        figure.canvas.draw()
        heights.append(figure.axes[0].get_window_extent().height)
    assert heights[1] >= heights[0]


def test_an_arm_has_one_colour_and_a_study_its_own_dashes(tmp_path: Path) -> None:
    for study in "abcdef":
        results_of(tmp_path / study, {"baseline": [0.9], "two-stage": [0.9], "teacher": [0.9]})
    lines = draw_curves(gather([tmp_path])).axes[0].lines
    styles = {(to_hex(one.get_color()), str(one._dash_pattern)) for one in lines}
    assert len(styles) == len(lines) == 18
    assert len({to_hex(one.get_color()) for one in lines}) == 3


def test_matrices_are_teacher_before_after_and_the_difference_that_is_left(tmp_path: Path) -> None:
    folder = keep(run_of("two-stage"), tmp_path)
    keep_matrices(folder, teacher=3.0, before=-1.0, after=1.0)
    matrices = gather([tmp_path]).groups[0].matrices
    assert matrices is not None
    panels = draw_matrices(matrices).axes[:4]
    shown = [axes.images[0].get_array() for axes in panels]
    assert [float(matrix[0, 0]) for matrix in shown] == [3, -1, 1, -2]
    assert all(matrix.shape == (2, 3) for matrix in shown)
    assert all(axes.images[0].get_clim() == (-3, 3) for axes in panels)
    assert panels[0].get_ylabel() == "one\nto two\n(2 x 3)"
