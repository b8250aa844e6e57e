"""Figures, by what is in them before they become pixels."""

from __future__ import annotations

import builtins
from itertools import pairwise
from pathlib import Path
from typing import Any

import made_up
import pytest

from benchmarks.report import figures
from benchmarks.report.compare import compare
from benchmarks.report.figures import accuracy, comparison, plan, roofline, scaling, speedup
from benchmarks.report.figures.canvas import require_matplotlib
from benchmarks.report.names import COLOURS, colours
from benchmarks.report.runs import load, part_of

LOSS = [
    made_up.loss("wide-late-512", "ours (torch)", 1.0),
    made_up.loss("wide-late-512", "einsum", 3.0),
    made_up.loss("segmentation", "ours (torch)", 2.0),
    made_up.loss("segmentation", "einsum", 1.0),
    made_up.loss("segmentation", "bmm", 8.0),
    made_up.loss("segmentation", "ours (torch)", 1.0, dtype="bf16"),
    made_up.loss("segmentation", "einsum", 5.0, dtype="bf16"),
    made_up.loss("segmentation", "ours (torch)", 1.0, layout="channels_last"),
    made_up.loss("segmentation", "einsum", 77.0, layout="channels_last"),
]


def part(name: str, results: list[made_up.Facts]):
    return part_of(made_up.part(name, results))


def lines(axes: Any) -> dict[str, tuple[list[float], list[float]]]:
    """The named lines of a panel: their x and y."""
    return {
        line.get_label(): (list(line.get_xdata()), list(line.get_ydata()))
        for line in axes.get_lines()
        if not line.get_label().startswith("_")
    }


def test_speed_up_has_a_panel_for_each_dtype() -> None:
    panels = speedup.figure(part("loss", LOSS)).axes
    assert [panel.get_title() for panel in panels] == ["fp32", "bf16"]


def test_speed_up_has_a_bar_from_1_to_each_ratio() -> None:
    panel = speedup.figure(part("loss", LOSS)).axes[0]
    ends = {
        bars.get_label(): [bar.get_x() + bar.get_width() for bar in bars]
        for bars in panel.containers
    }
    assert ends["einsum"] == pytest.approx([3, 0.5])
    assert ends["bmm"] == pytest.approx([4])
    assert [tick.get_text() for tick in panel.get_yticklabels()] == [
        "wide-late-512",
        "segmentation",
    ]


def test_a_contender_has_one_colour_in_every_figure() -> None:
    panel = speedup.figure(part("loss", LOSS)).axes[0]
    (bars,) = (bars for bars in panel.containers if bars.get_label() == "bmm")
    sweep = [made_up.scaled("batch", value, "bmm", value) for value in (1, 2)]
    (line,) = scaling.figure(part("scaling", sweep)).axes[0].get_lines()
    assert line.get_color() == COLOURS["bmm"]
    assert bars[0].get_facecolor() == pytest.approx(rgba(COLOURS["bmm"]))


def rgba(colour: str) -> tuple[float, ...]:
    return (*(int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)), 1.0)


def test_no_two_contenders_share_a_colour() -> None:
    names = [*COLOURS, "matrix form", "gram form"]
    assert len(set(colours(names).values())) == len(names)


def test_the_roofline_shows_needed_flops_over_needed_bytes() -> None:
    panel = roofline.figure(part("loss", LOSS)).axes[0]
    x, y = lines(panel)["bmm"]
    assert x == pytest.approx([4], rel=0.05)  # 4 Mflop for 1 MB; moved aside a little
    assert y == pytest.approx([4e6 / 8e-3])
    assert panel.get_xlabel() == "needed flops / needed bytes"


def test_the_roof_bends_where_both_rates_meet() -> None:
    wide = [made_up.loss("segmentation", "einsum", 1.0, floor_flops=f) for f in (1e6, 1e9)]
    wide[1]["extra_info"]["workload"] = "wide-late-512"
    panel = roofline.figure(part("loss", wide)).axes[0]
    (roof,) = (line for line in panel.get_lines() if len(line.get_xdata()) == 3)
    assert roof.get_xdata()[1] == pytest.approx(50)  # 100 Gflop/s over 2 GB/s
    assert list(roof.get_ydata()[1:]) == pytest.approx([1e11, 1e11])


def test_the_roofline_names_each_workload() -> None:
    panel = roofline.figure(part("loss", LOSS)).axes[0]
    assert {"wide-late-512", "segmentation"} <= {text.get_text() for text in panel.texts}


@pytest.mark.parametrize("places", [[0.1, 0.1, 0.1], [0.9, 1.0, 1.0], [0.0, 0.5, 1.0]])
def test_labels_are_spread_out_within_the_panel(places: list[float]) -> None:
    found = roofline.spread_out(places, 0.1)
    assert found[0] >= 0
    assert found[-1] <= 1
    assert all(after - before >= 0.1 - 1e-9 for before, after in pairwise(found))


def test_scaling_has_times_above_memory_for_each_axis() -> None:
    results = [
        made_up.scaled(axis, value, "einsum", value, peak_extra_bytes=value**2 * made_up.MIB)
        for axis in ("size", "batch")
        for value in (1, 2, 4)
    ]
    batch, size, batch_memory, _ = scaling.figure(part("scaling", results)).axes
    assert (batch.get_xlabel(), size.get_xlabel()) == ("batch", "side of the map")
    assert lines(batch)["einsum: 1.00"] == ([1, 2, 4], pytest.approx([1, 2, 4]))
    assert lines(batch_memory)["einsum: 2.00"] == ([1, 2, 4], pytest.approx([1, 4, 16]))
    assert batch_memory.get_ylabel() == "peak extra memory in MiB"


def test_accuracy_has_a_line_over_noise_for_each_contender() -> None:
    errors = [made_up.erring(noise, "einsum", 1e-7 / noise) for noise in (1e-3, 1e-1)]
    panel = accuracy.figure(part("accuracy", errors)).axes[0]
    assert lines(panel)["einsum"] == ([1e-1, 1e-3], pytest.approx([1e-6, 1e-4]))
    assert (panel.get_xscale(), panel.get_yscale()) == ("log", "log")


PLANS = [
    made_up.evaluated("4 x 8-8 @ 7", "matrix form", 3.0, planned=True),
    made_up.evaluated("4 x 8-8 @ 7", "gram form", 2.0),
    made_up.evaluated("4 x 9-9 @ 7", "gram form", 2.0, planned=True),
]


def test_plan_shows_every_time_over_the_fastest_and_rings_the_planned() -> None:
    panel = plan.figure(part("plan", PLANS)).axes[0]
    assert lines(panel)["matrix form"] == (pytest.approx([1.5]), [0])
    assert lines(panel)["gram form"] == ([1, 1], [0, 1])
    assert lines(panel)["planned"] == (pytest.approx([1.5, 1]), [0, 1])


def test_plan_marks_the_shapes_that_the_plan_loses() -> None:
    labels = plan.figure(part("plan", PLANS)).axes[0].get_yticklabels()
    assert [label.get_fontweight() for label in labels] == ["bold", "normal"]


def test_comparison_has_a_bar_for_each_change_of_ours(tmp_path: Path) -> None:
    runs = [
        load(made_up.write(tmp_path / str(i), made_up.part("loss", results)))
        for i, results in enumerate(
            [LOSS[:2], [*LOSS[1:2], made_up.loss("wide-late-512", "ours (torch)", 1.5)]]
        )
    ]
    (panel,) = comparison.figure([compare(*runs)]).axes
    (bar,) = panel.patches
    assert bar.get_x() + bar.get_width() == pytest.approx(1.5)
    assert bar.get_facecolor() == pytest.approx(rgba(comparison.SLOWER))


def test_figures_are_written_for_the_parts_there_are(tmp_path: Path) -> None:
    run = load(made_up.write(tmp_path, made_up.part("loss", LOSS), made_up.part("plan", [])))
    paths = figures.draw(run, tmp_path)
    assert [path.name for path in paths] == ["speedup.png", "roofline.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths)


def test_without_matplotlib_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def no_matplotlib(name: str, *rest: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ModuleNotFoundError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", no_matplotlib)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'fsp-kernels\[bench\]'"):
        require_matplotlib()
