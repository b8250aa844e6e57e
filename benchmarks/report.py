"""From pytest-benchmark's JSON to one table for each dtype, for the terminal and for a file."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import Any

from benchmarks import contenders, gpu_table, workloads
from benchmarks.rows import Row, rows_of
from benchmarks.tables import MIB, digits, geometric_mean, markdown_table, plain_table, times

TITLE = "FSP loss, forward + backward"
LEGEND = (
    "Loss forward + backward, {dtypes}, same tensors, turn by turn. Each cell: median ± half the "
    "interquartile range, the ratio of that median to ours (above 1x ours is faster), and the peak "
    "extra memory of a step, gradients included; the gradients alone take what column 3 says. Last "
    "column: the ratio of the fastest peer's median to ours."
)

Cells = tuple[list[str], list[list[str]]]


def cell(row: Row, name: str) -> list[str]:
    """Time, ratio and memory of one contender, one string each."""
    result = row.results.get(name)
    if result is None:
        return [row.missing.get(name, "not run")]
    ratio = row.ratio(name)
    return [
        f"{digits(result.median * 1e3)} ±{digits(result.iqr * 5e2)} ms",
        *([] if ratio is None else [times(ratio)]),
        f"{digits(result.peak / MIB)} MiB",
    ]


def columns(rows: Sequence[Row]) -> list[str]:
    """The contenders that ran anywhere, in the order of their table."""
    return [name for name in contenders.BY_NAME if any(name in row.results for row in rows)]


def table_cells(rows: Sequence[Row], join: str) -> Cells:
    """Header and body, the last line holding geometric means; ``join`` glues a cell's parts."""
    names = columns(rows)
    header = ["workload", "B", "gradients", *names, "to fastest"]
    body = [
        [
            row.workload,
            str(row.batch),
            f"{digits(row.gradients / MIB)} MiB",
            *(join.join(cell(row, name)) for name in names),
            times(row.ratio_to_fastest()),
        ]
        for row in rows
    ]
    means = [geometric_mean([row.ratio(name) for row in rows]) for name in names]
    fastest = geometric_mean([row.ratio_to_fastest() for row in rows])
    body.append(["geometric mean", "", "", *map(times, means), times(fastest)])
    return header, body


def tables(report: dict[str, Any], join: str) -> dict[str, Cells]:
    """Header and body of each dtype's table."""
    rows = rows_of(report)
    by_dtype = {name: [row for row in rows if row.dtype == name] for name in workloads.DTYPES}
    layout = gpu_table.table_cells if on_gpu(report) else lambda rows: table_cells(rows, join)
    return {dtype: layout(rows) for dtype, rows in by_dtype.items() if rows}


def on_gpu(report: dict[str, Any]) -> bool:
    """Whether a run was on a GPU."""
    return "gpu" in report["machine_info"]


def legend(report: dict[str, Any], dtypes: Sequence[str]) -> str:
    """How to read the tables."""
    text = gpu_table.LEGEND if on_gpu(report) else LEGEND
    return text.format(dtypes=" and ".join(dtypes))


def provenance(machine: dict[str, Any], commit: dict[str, Any], command: str) -> str:
    """What made the numbers, as a list for the top of a results file."""
    state = " with uncommitted changes" if commit["dirty"] else ""
    facts = {"command": f"`{command}`", "commit": commit["id"] + state} | machine
    return "\n".join(f"- {name.replace('_', ' ')}: {value}" for name, value in facts.items())


def markdown(report: dict[str, Any], command: str) -> str:
    """The results file."""
    cells = tables(report, ", ")
    parts = [
        f"# {TITLE}",
        provenance(report["machine_info"], report["commit_info"], command),
        legend(report, list(cells)),
    ]
    for dtype, (header, body) in cells.items():
        parts += [f"## {dtype}"] * (len(cells) > 1)
        parts.append(markdown_table(header, body))
    return "\n\n".join(parts) + "\n"


def plain(report: dict[str, Any]) -> str:
    """The same for a terminal, the tables last."""
    cells = tables(report, "\n")
    parts = [textwrap.fill(legend(report, list(cells)), 100)]
    for dtype, (header, body) in cells.items():
        parts += [f"{TITLE}, {dtype}", plain_table(header, body)]
    return "\n\n".join(parts)
