"""The tables of the report, and comparisons."""

import re

import made_up_results
import pytest

from benchmarks import report, results
from benchmarks.report import compare, draw, render
from benchmarks.tables import markdown_table

MIB = made_up_results.MIB
LOSS = [
    made_up_results.loss("wide-late-512", "ours (torch)", 1, spread=0.05),
    made_up_results.loss("wide-late-512", "einsum", 3),
    made_up_results.loss("wide-late-512", "bmm", 2),
    made_up_results.loss("segmentation", "ours (torch)", 100),
    made_up_results.loss("segmentation", "einsum", 400, peak_bytes=8 * MIB),
]
NO_BROADCAST = made_up_results.absent(
    made_up_results.loss("segmentation", "broadcast", 1), "not run: holds 9.0 GiB"
)


@pytest.fixture
def rows_of(tmp_path):
    """Rows as they are read, with ratios."""

    def written(rows, machine=made_up_results.CPU):
        return results.with_ratios(made_up_results.write(tmp_path, "loss", rows, machine).rows)

    return written


def titles(tables):
    return [title for title, _ in tables]


def lines(table):
    """The lines of a Markdown table without its rule, and without the padding of its cells."""
    text = table if isinstance(table, str) else markdown_table(table)
    found = [re.sub(" +", " ", line)[2:-2] for line in text.splitlines()]
    return [found[0], *found[2:]]


# -- loss -----------------------------------------------------------------------------------------


def test_the_summary_shows_ours_and_ratios_of_the_peers_with_means_last(rows_of):
    header = "workload | B | ours ms | of floor | bound by | einsum | bmm | fastest | ours MiB"
    assert lines(report.loss_summary(rows_of(LOSS))) == [
        f"{header} | einsum MiB",
        "wide-late-512 | 32 | 1.00 ±0.05 | 50% | bytes | 3.00x | 2.00x | 2.00x | 3.00 | 3.00",
        "segmentation | 32 | 100 ±2 | 0% | bytes | 4.00x | - | 4.00x | 3.00 | 8.00",
        "geometric mean | | | | | 3.46x | 2.00x | 2.83x | |",  # sqrt(3 * 4), sqrt(2 * 4)
    ]


def test_tables_are_apart_by_dtype_layout_and_pass_and_tokens_stand_with_nchw(rows_of):
    kinds = [{"pass": "forward"}, {"dtype": "bf16"}, {"layout": "channels_last"}, {}]
    kinds.append({"workload": "tokens-vit-b", "layout": "tokens"})
    rows = rows_of(
        [made_up_results.loss("segmentation", "ours (torch)", 1) | kind for kind in kinds]
    )
    tables = report.loss_tables(rows)["summary"]
    assert titles(tables) == [
        "fp32, nchw, forward + backward",
        "fp32, nchw, forward",
        "fp32, channels_last, forward + backward",
        "bf16, nchw, forward + backward",
    ]
    assert "tokens-vit-b" in tables[0][1]


def test_the_summary_names_ours_where_it_is_not_the_default(rows_of):
    ours = {"wide-late-512": "ours (triton)", "segmentation": "ours (cuda)"}
    rows = rows_of([made_up_results.loss(*item, 1) for item in ours.items()])
    found = [line.get("ours") for line in report.loss_summary(rows)]
    assert found == ["", "ours (cuda)", None]


@pytest.mark.parametrize(("fault", "start"), [(False, ""), (True, "FAULT: ")])
def test_a_sentence_tells_who_was_not_measured_and_why(rows_of, fault, start):
    rows = rows_of([*LOSS, NO_BROADCAST | {"fault": fault}])
    assert report.loss_tables(rows)["notes"] == [
        f"{start}No result of broadcast: segmentation (not run: holds 9.0 GiB)"
    ]


def test_the_details_have_all_there_is_on_a_cpu_or_why_there_is_nothing(rows_of):
    long = made_up_results.absent(LOSS[0], "a | b\n" * 100)
    rows = rows_of([*LOSS, NO_BROADCAST, long])
    header, _, einsum, *_, missing, cut = lines(report.loss_details(rows))
    assert header == (
        "workload | B | gradients MiB | contender | ms | spread | of floor | bound by | extra MiB"
        " | ratio | loss error | gradient error"
    )
    assert einsum == (
        "wide-late-512 | 32 | 2.00 | einsum | 3.00 | ±2.0% | 17% | bytes | 3.00"
        " | 3.00x | 1.0e-07 | 2.0e-07"
    )
    assert missing == "segmentation | 32 | | broadcast | not run: holds 9.0 GiB | | | | | | |"
    assert len(cut.split(" | ")[4]) <= 70


def test_on_a_gpu_there_are_more_clocks_and_launches(rows_of):
    row = made_up_results.loss("segmentation", "ours (triton)", 1)
    late = made_up_results.on_gpu(row, replay=None, full_queue=False) | {"workload": "tokens-vit-b"}
    rows = rows_of([made_up_results.on_gpu(row, replay=0.9), late], made_up_results.GPU)
    first, second = report.loss_details(rows)
    assert (first["device ms"], first["launches"]) == ("1.00", "4")
    assert (first["eager ms"], first["replay ms"]) == ("4.00 ±0.05", "0.900 ±0.010")
    assert second["device ms"] == "1.00 (with gaps)"
    assert second["replay ms"] == "not captured: it synchronises"


def test_means_are_by_every_clock(rows_of):
    rows = [
        made_up_results.on_gpu(made_up_results.loss("segmentation", "ours (triton)", 1), eager=4),
        made_up_results.on_gpu(
            made_up_results.loss("segmentation", "einsum", 3), eager=2, replay=None
        ),
    ]
    header, _, einsum = lines(report.loss_means(rows_of(rows, made_up_results.GPU)))
    assert header == "geometric means | time | eager time | memory"
    assert einsum == "einsum | 3.00x | 1.50x | 1.00x"


def test_the_rates_of_the_floor_are_told(rows_of):
    rows = [*LOSS, made_up_results.loss("segmentation", "bmm", 1, copy_bytes_per_second=4e9)]
    assert report.device_rates(rows_of(rows)) == [
        "fp32: copy 2 to 4 GB/s, by size; matrix product 100 Gflop/s"
    ]


# -- the other parts ------------------------------------------------------------------------------

STEPS = [
    made_up_results.step("cifar-resnet26-8", "ours (torch)", 100),
    made_up_results.step("cifar-resnet26-8", "einsum", 120),
]


def test_a_step_shows_its_time_ratio_memory_and_pieces_or_why_not(rows_of):
    bmm = made_up_results.absent(
        made_up_results.step("cifar-resnet26-8", "bmm", 1), "out of memory"
    )
    found = report.step_tables(rows_of([*STEPS, bmm]))
    ((_, table),), ((_, pieces),) = found["steps"], found["pieces"]
    header, _, *others = lines(table)
    assert header == "networks | B | FSP loss | step ms | ratio | peak MiB | FSP share"
    assert others == [
        "cifar-resnet26-8 | 32 | einsum | 120 ±2 | 1.20x | 3.00 | 25.0%",
        "cifar-resnet26-8 | 32 | bmm | out of memory | | |",
    ]
    assert lines(pieces)[1] == "cifar-resnet26-8 | 32 | ours (torch) | 0 | 3.00 | 1.00 | 0 | 0"


def test_scaling_has_times_and_memory_for_each_axis_with_growth_last(rows_of):
    rows = [
        made_up_results.scaled("size", 14, "ours (torch)", 4.0),
        made_up_results.scaled("channels", 64, "ours (torch)", 9.0),
        made_up_results.scaled("channels", 16, "ours (torch)", 1.0, peak_bytes=MIB),
        made_up_results.scaled("channels", 32, "ours (torch)", 3.0, peak_bytes=None),
        made_up_results.scaled("channels", 64, "einsum", 27.0, peak_bytes=None),
    ]
    tables = report.scaling_tables(rows_of(rows))["tables"]
    assert titles(tables) == [
        f"{what} over {axis}, fp32, nchw, forward + backward"
        for axis in ("channels", "size")
        for what in ("time in ms", "peak extra memory in MiB")
    ]
    assert lines(tables[0][1]) == [
        "channels | 16 | 32 | 64 | growth",
        "ours (torch) | 1.00 | 3.00 | 9.00 | 1.58",
        "einsum | - | - | 27.0 | -",
    ]
    assert lines(tables[1][1])[1] == "ours (torch) | 1.00 | - | 3.00 | 0.79"


@pytest.mark.parametrize(
    ("planned", "other", "spread", "loses"),
    [
        (1.2, 1.0, 0.01, True),
        (1.09, 1.0, 0.01, False),  # less than a tenth
        (1.2, 1.0, 0.15, False),  # within the spread
        (1.0, 2.0, 0.01, False),
    ],
)
def test_the_plan_loses_to_what_is_clearly_faster(planned, other, spread, loses):
    rows = [
        made_up_results.evaluated("8-8@7", "matrix form", planned, planned=True, spread=spread),
        made_up_results.evaluated("8-8@7", "gram form", other, spread=spread),
    ]
    excess, found = report.verdict(rows)
    assert (excess, found) == (pytest.approx(max(1, planned / other)), loses)
    assert report.verdict(rows[1:]) == (None, False)  # without the planned evaluation


def test_the_table_of_plans_marks_the_planned_and_tells_where_it_loses(rows_of):
    rows = [
        made_up_results.evaluated("8-8@7", "matrix form", 1.5, planned=True),
        made_up_results.evaluated("8-8@7", "gram form", 1.0),
        made_up_results.evaluated("9-9@7", "gram form", 1.0, planned=True),
        made_up_results.evaluated("9-9@7", "gram form", 9.0, planned=True, backend="triton"),
    ]
    found = report.plan_tables(rows_of(rows))
    assert titles(found["tables"]) == [
        "torch, fp32, nchw, forward + backward",
        "triton, fp32, nchw, forward + backward",
    ]
    assert lines(found["tables"][0][1]) == [
        "shape | matrix form | gram form | planned is |",
        "8-8@7 | 1.50 ±0.03* | 1.00 ±0.02 | 50% slower | PLAN LOSES",
        "9-9@7 | - | 1.00 ±0.02* | |",
    ]
    assert found["notes"] == ["The plan loses on 1 of 3 shapes: 8-8@7"]


def test_accuracy_has_a_table_of_gradients_and_one_of_losses_for_each_dtype(rows_of):
    rows = [
        made_up_results.erring(1e-3, "einsum", 2e-4),
        made_up_results.erring(1e-1, "einsum", 2e-6),
        made_up_results.erring(1e-1, "ours (torch)", 2e-7),
        made_up_results.erring(1e-1, "ours (torch), gram form", 3e-7),
        made_up_results.erring(1e-1, "einsum", 2e-2, "bf16"),
    ]
    tables = report.accuracy_tables(rows_of(rows))["tables"]
    assert titles(tables) == [
        f"{dtype}, 8 @ 7 x 7, error of the {kind}"
        for dtype in ("fp32", "bf16")
        for kind in ("gradient", "loss")
    ]
    assert lines(tables[0][1]) == [
        "gradient | noise 0.1 | noise 0.001",
        "ours (torch) | 2.0e-07 | -",
        "ours (torch), gram form | 3.0e-07 | -",
        "einsum | 2.0e-06 | 2.0e-04",
    ]
    assert lines(tables[1][1])[3] == "einsum | 2.0e-07 | 2.0e-05"


# -- the report -----------------------------------------------------------------------------------


def test_the_report_and_its_figures_are_written_beside_the_results(tmp_path):
    made_up_results.write(tmp_path, "loss", LOSS)
    assert [path.name for path in draw(tmp_path)] == ["report.md", "speedup.png"]
    text = (tmp_path / "report.md").read_text()
    assert "](speedup.png)" in text
    assert "](scaling.png)" not in text
    assert "\n\n\n" not in text


def test_the_report_tells_shared_facts_once_and_the_others_by_part(tmp_path):
    made_up_results.write(tmp_path, "loss", LOSS)
    errors = [made_up_results.erring(0.1, "einsum", 1e-6)]
    text = render(made_up_results.write(tmp_path, "accuracy", errors, commit="def"))
    assert text.count("- cpu: some cpu") == 1
    assert "Part *loss*:\n\n- commit: abc\n" in text
    assert "Part *accuracy*:\n\n- commit: def\n" in text


def test_only_a_gpu_s_report_explains_launches(tmp_path):
    assert "- *launches*" not in render(made_up_results.write(tmp_path, "loss", LOSS))
    rows = [made_up_results.on_gpu(LOSS[0])]
    assert "- *launches*" in render(
        made_up_results.write(tmp_path, "loss", rows, made_up_results.GPU)
    )


def test_a_brief_report_has_the_main_tables_of_some_parts(tmp_path):
    made_up_results.write(tmp_path, "loss", LOSS)
    found = made_up_results.write(tmp_path, "step", STEPS)
    text = render(found, ["step"], brief=True)
    assert text.startswith("## A training step on some cpu, 2 cores")
    assert "step ms" in text
    assert "student forward |" not in text


def test_a_comparison_sets_times_side_by_side(tmp_path):
    slower = [row | {"median": 2 * row["median"]} for row in LOSS if row["ours"]]
    before = made_up_results.write(tmp_path / "before", "loss", [*LOSS, NO_BROADCAST])
    after = made_up_results.write(tmp_path / "after", "loss", [*slower, LOSS[1], NO_BROADCAST])
    table, means = compare(before, after).split("\n\n")
    header, ours, *others = lines(table)
    assert header == "case | contender | before ms | after ms | after/before"
    case = "loss, wide-late-512, fp32, nchw, forward+backward"
    assert ours == f"{case} | ours (torch) | 1.00 ±0.05 | 2.00 ±0.05 | 2.000"
    assert len(others) == 2
    assert means == "Geometric means of after/before: loss, ours: 2.000; loss, peers: 1.000"

    other = made_up_results.write(tmp_path / "other", "step", STEPS)
    assert compare(before, other) == "The two runs have no time in common."
