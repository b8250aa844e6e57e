"""From pytest-benchmark's JSON to the table."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest

from benchmarks import report
from benchmarks.rows import Result, Row, rows_of
from benchmarks.tables import plain_table

MIB = 1 << 20


def entry(workload: str, contender: str, median: float, peak: int) -> dict[str, Any]:
    return {
        "extra_info": {
            "workload": workload,
            "dtype": "fp32",
            "contender": contender,
            "batch": 4,
            "gradient_bytes": 2 * MIB,
            "peak_extra_bytes": peak,
        },
        "stats": {"median": median, "iqr": median / 10},
    }


REPORT: dict[str, Any] = {
    "machine_info": {"cpu": "some cpu", "torch": "2.13"},
    "commit_info": {"id": "abc", "dirty": True},
    "not_measured": [
        {
            "workload": "segmentation",
            "dtype": "fp32",
            "contender": "broadcast",
            "reason": "does not fit",
        }
    ],
    "benchmarks": [
        entry("segmentation", "einsum", 0.400, 8 * MIB),
        entry("segmentation", "fsp_kernels", 0.100, 3 * MIB),
        entry("wide-late-512", "bmm", 0.002, 8 * MIB),
        entry("wide-late-512", "broadcast", 0.100, 900 * MIB),
        entry("wide-late-512", "einsum", 0.003, 8 * MIB),
        entry("wide-late-512", "fsp_kernels", 0.001, 3 * MIB),
    ],
}


def test_rows_follow_the_workload_table() -> None:
    assert [row.workload for row in rows_of(REPORT)] == ["wide-late-512", "segmentation"]


def test_ratios_say_how_much_faster_ours_is() -> None:
    wide, segmentation = rows_of(REPORT)
    assert wide.ratio("einsum") == pytest.approx(3)
    assert wide.ratio_to_fastest() == pytest.approx(2)
    assert segmentation.ratio("bmm") is None
    assert segmentation.ratio_to_fastest() == pytest.approx(4)


def test_without_ours_there_is_no_ratio() -> None:
    row = Row("segmentation", 4, 0, {"einsum": Result(1.0, 0.0, 0)})
    assert row.ratio("einsum") is None
    assert row.ratio_to_fastest() is None


def test_the_last_line_holds_geometric_means() -> None:
    header, body = report.table_cells(rows_of(REPORT), ", ")
    last = dict(zip(header, body[-1], strict=True))
    assert last["einsum"] == "3.46x"  # sqrt(3 * 4)
    assert last["broadcast"] == "100.00x"
    assert last["to fastest"] == "2.83x"  # sqrt(2 * 4)


def test_a_cell_shows_time_spread_ratio_and_memory() -> None:
    wide, segmentation = rows_of(REPORT)
    assert report.cell(wide, "einsum") == ["3.00 ±0.15 ms", "3.00x", "8.00 MiB"]
    assert report.cell(wide, "fsp_kernels") == ["1.00 ±0.05 ms", "3.00 MiB"]
    assert report.cell(segmentation, "broadcast") == ["does not fit"]
    assert report.cell(segmentation, "bmm") == ["not run"]


def test_markdown_names_the_command_and_the_environment() -> None:
    text = report.markdown(REPORT, "python -m benchmarks")
    assert "- command: `python -m benchmarks`" in text
    assert "- commit: abc with uncommitted changes" in text
    assert "- cpu: some cpu" in text
    assert "| wide-late-512 | 4 | 2.00 MiB | 1.00 ±0.05 ms, 3.00 MiB |" in text


def test_each_dtype_has_a_table_of_its_own() -> None:
    both = deepcopy(REPORT)
    for one in deepcopy(REPORT["benchmarks"]):
        one["extra_info"]["dtype"] = "bf16"
        both["benchmarks"].append(one)
    text = report.markdown(both, "python -m benchmarks")
    assert "Loss forward + backward, fp32 and bf16, same" in text
    first, second = text.split("## fp32")[1].split("## bf16")
    assert first.count("geometric mean") == second.count("geometric mean") == 1
    assert "##" not in report.markdown(REPORT, "python -m benchmarks")


def test_a_terminal_gets_the_table_last() -> None:
    lines = report.plain(REPORT).splitlines()
    assert "FSP loss, forward + backward, fp32" in lines
    last = [i for i, line in enumerate(lines) if line.startswith("geometric mean")]
    assert last == [len(lines) - 1]


def test_a_plain_table_is_aligned() -> None:
    table = plain_table(["", "one"], [["first", "1 ms\n2.00x"], ["second", "-"]])
    assert table.splitlines() == [
        "          one",
        "------  -----",
        "first    1 ms",
        "        2.00x",
        "------  -----",
        "second      -",
    ]
