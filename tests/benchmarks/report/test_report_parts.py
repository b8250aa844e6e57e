"""The tables of the parts ``step``, ``scaling``, ``plan`` and ``accuracy``."""

from __future__ import annotations

import made_up
import pytest

from benchmarks.report import accuracy, plan, scaling, step
from benchmarks.report.layout import Table
from benchmarks.report.runs import Contest, part_of


def part(name: str, results: list[made_up.Facts], **content: object):
    return part_of(made_up.part(name, results, **content))


def lines(table: Table) -> list[dict[str, str]]:
    return [dict(zip(table.header, line, strict=True)) for line in table.body]


# -- step -----------------------------------------------------------------------------------------

STEPS = [
    made_up.step("cifar-resnet26-8", "ours (torch)", 100),
    made_up.step("cifar-resnet26-8", "einsum", 120),
]


def test_a_step_shows_its_time_ratio_memory_and_share() -> None:
    table = step.sections(part("step", STEPS))[0].tables[0]
    assert lines(table)[1] == {
        "networks": "cifar-resnet26-8",
        "B": "32",
        "FSP loss": "einsum",
        "step ms": "120 ±2",
        "ratio": "1.20x",
        "peak MiB": "3.00",
        "FSP share": "25.0%",
    }


def test_a_step_without_a_time_says_why() -> None:
    missing = [made_up.absent(STEPS[1], "out of memory")]
    table = step.sections(part("step", STEPS[:1], not_measured=missing))[0].tables[0]
    assert lines(table)[1]["step ms"] == "out of memory"


def test_the_pieces_of_a_step_have_a_column_each() -> None:
    table = step.sections(part("step", STEPS))[1].tables[0]
    assert lines(table)[0]["student forward"] == "3.00"


# -- scaling --------------------------------------------------------------------------------------


def test_growth_is_the_slope_of_the_upper_half() -> None:
    curve = {1: 5.0, 2: 5.0, 4: 16.0, 8: 64.0}
    assert scaling.growth(curve) == pytest.approx(2)
    assert scaling.growth({2: 3.0, 4: 6.0}) == pytest.approx(1)
    assert scaling.growth({1: 7.0, 10: 2.0, 100: 20.0, 1000: 2000.0, 10000: 20000.0}) == (
        pytest.approx(1.5)
    )


@pytest.mark.parametrize("curve", [{}, {4: 1.0}])
def test_one_value_has_no_growth(curve: dict[int, float]) -> None:
    assert scaling.growth(curve) is None


SCALED = [
    made_up.scaled("size", 14, "ours (torch)", 4.0),
    made_up.scaled("channels", 64, "ours (torch)", 9.0),
    made_up.scaled("channels", 16, "ours (torch)", 1.0, peak_extra_bytes=made_up.MIB),
    made_up.scaled("channels", 32, "ours (torch)", 3.0, peak_extra_bytes=None),
    made_up.scaled("channels", 64, "einsum", 27.0, peak_extra_bytes=None),
]


def test_each_axis_has_a_table_of_times_and_one_of_memory() -> None:
    titles = [table.title for table in scaling.sections(part("scaling", SCALED))[0].tables]
    assert titles == [
        "time in ms over channels, fp32, nchw, forward + backward",
        "peak extra memory in MiB over channels, fp32, nchw, forward + backward",
        "time in ms over size, fp32, nchw, forward + backward",
        "peak extra memory in MiB over size, fp32, nchw, forward + backward",
    ]


def test_scaling_shows_a_value_in_each_column_and_the_growth_last() -> None:
    times, memory, *_ = scaling.sections(part("scaling", SCALED))[0].tables
    assert times.header == ["channels", "16", "32", "64", "growth"]
    assert times.body == [
        ["ours (torch)", "1.00", "3.00", "9.00", "1.58"],
        ["einsum", "-", "-", "27.0", "-"],
    ]
    assert memory.body[0] == ["ours (torch)", "1.00", "-", "3.00", "0.79"]


# -- plan -----------------------------------------------------------------------------------------


def contest(*results: made_up.Facts) -> Contest:
    return part("plan", list(results)).contests[0]


def choice(planned: float, other: float, spread: float = 0.01) -> Contest:
    matrix = made_up.evaluated("4 x 8-8 @ 7", "matrix form", planned, planned=True)
    gram = made_up.evaluated("4 x 8-8 @ 7", "gram form", other)
    for entry in (matrix, gram):
        median = entry["stats"]["median"]
        entry["stats"] = made_up.stats(median, spread * median)
    return contest(matrix, gram)


def test_the_plan_loses_to_a_way_that_is_clearly_faster() -> None:
    assert plan.loses(choice(planned=1.2, other=1.0))
    assert plan.excess(choice(planned=1.2, other=1.0)) == pytest.approx(1.2)


def test_the_plan_does_not_lose_by_less_than_a_tenth() -> None:
    assert not plan.loses(choice(planned=1.09, other=1.0))


def test_the_plan_does_not_lose_within_the_spread() -> None:
    assert not plan.loses(choice(planned=1.2, other=1.0, spread=0.15))


def test_the_plan_that_picks_the_fastest_wins() -> None:
    assert not plan.loses(choice(planned=1.0, other=2.0))


def test_without_the_planned_way_there_is_no_verdict() -> None:
    alone = contest(made_up.evaluated("4 x 8-8 @ 7", "gram form", 1.0))
    assert not plan.loses(alone)
    assert plan.verdict(alone) == "not measured"


def test_the_table_of_plans_marks_the_planned_and_flags_the_loss() -> None:
    results = [
        made_up.evaluated("4 x 8-8 @ 7", "matrix form", 1.5, planned=True),
        made_up.evaluated("4 x 8-8 @ 7", "gram form", 1.0),
        made_up.evaluated("4 x 9-9 @ 7", "gram form", 1.0, planned=True),
    ]
    (section,) = plan.sections(part("plan", results))
    assert lines(section.tables[0]) == [
        {
            "shape": "4 x 8-8 @ 7",
            "matrix form": "1.50 ±0.03*",
            "gram form": "1.00 ±0.02",
            "planned is": "50% slower",
            "": "PLAN LOSES",
        },
        {
            "shape": "4 x 9-9 @ 7",
            "matrix form": "-",
            "gram form": "1.00 ±0.02*",
            "planned is": "",
            "": "",
        },
    ]
    assert section.notes == ["The plan loses 1 of 2 races: 4 x 8-8 @ 7"]


def test_each_backend_has_a_plan_of_its_own() -> None:
    results = [
        made_up.evaluated("4 x 8-8 @ 7", way, time, way == "matrix form", backend)
        for backend, time in (("triton", 1.0), ("torch", 9.0))
        for way, time in (("matrix form", time), ("gram form", 2 * time))
    ]
    (section,) = plan.sections(part("plan", results))
    assert [table.title for table in section.tables] == [
        "triton, fp32, nchw, forward + backward",
        "torch, fp32, nchw, forward + backward",
    ]
    assert lines(section.tables[1])[0]["matrix form"] == "9.00 ±0.18*"
    assert section.notes == ["The plan loses 0 of 2 races"]


# -- accuracy -------------------------------------------------------------------------------------


def test_accuracy_has_a_table_for_each_dtype_of_gradients_and_one_of_losses() -> None:
    errors = [
        made_up.erring(1e-3, "einsum", 2e-4),
        made_up.erring(1e-1, "einsum", 2e-6),
        made_up.erring(1e-1, "ours, gram form", 3e-7),
        made_up.erring(1e-1, "ours (torch)", 2e-7),
        made_up.erring(1e-1, "einsum", 2e-2, "bf16"),
    ]
    tables = accuracy.sections(part("accuracy", errors))[0].tables
    assert [table.title for table in tables] == [
        "fp32, 8 @ 7 x 7, error of the gradient",
        "fp32, 8 @ 7 x 7, error of the loss",
        "bf16, 8 @ 7 x 7, error of the gradient",
        "bf16, 8 @ 7 x 7, error of the loss",
    ]
    assert tables[0].header == ["gradient", "noise 0.1", "noise 0.001"]
    assert tables[0].body == [
        ["ours (torch)", "2.0e-07", "-"],
        ["ours, gram form", "3.0e-07", "-"],
        ["einsum", "2.0e-06", "2.0e-04"],
    ]
    assert tables[1].body[2] == ["einsum", "2.0e-07", "2.0e-05"]
