"""Figures, by what is in them before they become pixels."""

import made_up_results
import pytest

from benchmarks import contenders, figures, results
from benchmarks.accuracy import FORMS

LOSS = [
    made_up_results.loss("wide-late-512", "ours (torch)", 1.0),
    made_up_results.loss("wide-late-512", "einsum", 3.0),
    made_up_results.loss("segmentation", "ours (torch)", 2.0),
    made_up_results.loss("segmentation", "einsum", 1.0),
    made_up_results.loss("segmentation", "bmm", 8.0),
    made_up_results.loss("segmentation", "ours (torch)", 1.0, dtype="bf16"),
    made_up_results.loss("segmentation", "einsum", 5.0, dtype="bf16"),
    made_up_results.loss("segmentation", "ours (torch)", 1.0, layout="channels_last"),
    made_up_results.loss("segmentation", "einsum", 77.0, layout="channels_last"),
]


@pytest.fixture
def panels(tmp_path):
    """The panels of a figure that is drawn from rows of a part."""

    def drawn(name, part, rows):
        found = results.with_ratios(made_up_results.write(tmp_path, part, rows).rows)
        return figures.FIGURES[name](found, "some cpu").axes

    return drawn


def lines(axes):
    """The named lines of a panel: their x and y."""
    return {
        line.get_label(): (list(line.get_xdata()), list(line.get_ydata()))
        for line in axes.get_lines()
        if not line.get_label().startswith("_")
    }


def test_speed_up_has_a_panel_for_each_dtype_with_a_bar_from_1_to_each_ratio(panels):
    fp32, bf16 = panels("speedup.png", "loss", LOSS)
    assert (fp32.get_title(), bf16.get_title()) == ("fp32", "bf16")
    ends = {
        bars.get_label(): [bar.get_x() + bar.get_width() for bar in bars]
        for bars in fp32.containers
    }
    assert ends["einsum"] == pytest.approx([3, 0.5])
    assert ends["bmm"] == pytest.approx([4])
    workloads = [tick.get_text() for tick in fp32.get_yticklabels()]
    assert workloads == ["wide-late-512", "segmentation"]


def test_every_contender_has_a_colour_and_a_marker_of_its_own():
    forms = {f"ours (torch), {form} form" for form in FORMS}
    assert set(figures.COLOURS) == {*contenders.BY_NAME} | forms
    for table in (figures.COLOURS, figures.MARKERS):
        assert len(set(table.values())) == len(table)


def test_scaling_has_times_above_memory_for_each_axis(panels):
    rows = [
        made_up_results.scaled(
            axis, value, "einsum", value, peak_bytes=value**2 * made_up_results.MIB
        )
        for axis in ("size", "batch")
        for value in (1, 2, 4)
    ]
    batch, size, batch_memory, _ = panels("scaling.png", "scaling", rows)
    assert (batch.get_xlabel(), size.get_xlabel()) == ("batch", "side of the map")
    assert lines(batch)["einsum: 1.00"] == ([1, 2, 4], pytest.approx([1, 2, 4]))
    assert lines(batch_memory)["einsum: 2.00"] == ([1, 2, 4], pytest.approx([1, 4, 16]))
    assert batch_memory.get_ylabel() == "peak extra memory in MiB"


def test_a_panel_where_no_memory_was_measured_has_no_points(panels):
    rows = [made_up_results.scaled("size", 1, "einsum", 1.0, peak_bytes=0)]
    _, memory = panels("scaling.png", "scaling", rows)
    assert lines(memory)["einsum: -"] == ([], [])


def test_accuracy_has_a_line_over_noise_for_each_contender(panels):
    rows = [made_up_results.erring(noise, "einsum", 1e-7 / noise) for noise in (1e-3, 1e-1)]
    (panel,) = panels("accuracy.png", "accuracy", rows)
    assert lines(panel)["einsum"] == ([1e-1, 1e-3], pytest.approx([1e-6, 1e-4]))
    assert (panel.get_xscale(), panel.get_yscale()) == ("log", "log")


def test_only_figures_with_something_to_show_are_written(tmp_path):
    made_up_results.write(tmp_path, "accuracy", [])
    found = results.with_ratios(made_up_results.write(tmp_path, "loss", LOSS).rows)
    (path,) = figures.draw(found, "some cpu", tmp_path)
    assert path.name == "speedup.png"
    assert path.read_bytes().startswith(b"\x89PNG")
