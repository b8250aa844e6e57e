"""From pytest-benchmark's JSON to one table, for the terminal and for a file."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.table import Table

from benchmarks import contenders, workloads
from benchmarks.contenders import OURS

MIB = 1 << 20
WIDTH = 160  # columns that hold all contenders
LEGEND = (
    "Loss forward + backward, fp32, same tensors, turn by turn. Each cell: median ± half the "
    "interquartile range, the ratio of that median to ours (above 1x ours is faster), and the peak "
    "extra memory of a step, gradients included; the gradients alone take what column 3 says. Last "
    "column: the ratio of the fastest peer's median to ours."
)


@dataclass(frozen=True)
class Result:
    """One contender on one workload: seconds and bytes."""

    median: float
    iqr: float
    peak: int


@dataclass(frozen=True)
class Row:
    """One workload."""

    workload: str
    batch: int
    gradients: int  # bytes
    results: dict[str, Result]

    def ratio(self, peer: str) -> float | None:
        """How many times faster ours is than ``peer``; None where either was not run."""
        if peer == OURS or not {peer, OURS} <= self.results.keys():
            return None
        return self.results[peer].median / self.results[OURS].median

    def ratio_to_fastest(self) -> float | None:
        """The ratio to the peer that was fastest on this workload."""
        ratios = [ratio for peer in self.results if (ratio := self.ratio(peer)) is not None]
        return min(ratios, default=None)


def rows_of(report: dict[str, Any]) -> list[Row]:
    """The rows in the order of the workload table, whatever the order of the run."""
    by_workload: dict[str, list[dict[str, Any]]] = {}
    for entry in report["benchmarks"]:
        by_workload.setdefault(entry["extra_info"]["workload"], []).append(entry)
    rows = []
    for name in workloads.BY_NAME:
        entries = by_workload.get(name)
        if not entries:
            continue
        info = entries[0]["extra_info"]
        results = {
            e["extra_info"]["contender"]: Result(
                e["stats"]["median"], e["stats"]["iqr"], e["extra_info"]["peak_extra_bytes"]
            )
            for e in entries
        }
        rows.append(Row(name, info["batch"], info["gradient_bytes"], results))
    return rows


def geometric_mean(values: Sequence[float | None]) -> float | None:
    """Over the values there are; None where there are none."""
    present = [value for value in values if value is not None]
    return math.exp(sum(map(math.log, present)) / len(present)) if present else None


def digits(value: float) -> str:
    """About three digits, never an exponent."""
    return f"{value:.{0 if value >= 100 else 1 if value >= 10 else 2}f}"


def times(ratio: float | None) -> str:
    """A ratio as printed."""
    return "-" if ratio is None else f"{ratio:.2f}x"


def cell(row: Row, name: str) -> list[str]:
    """Time, ratio and memory of one contender, one string each."""
    result = row.results.get(name)
    if result is None:
        workload = workloads.BY_NAME[row.workload]
        fits = contenders.BY_NAME[name].fits(workload, row.batch)
        return ["not run"] if fits else ["does not fit"]
    ratio = row.ratio(name)
    return [
        f"{digits(result.median * 1e3)} ±{digits(result.iqr * 5e2)} ms",
        *([] if ratio is None else [times(ratio)]),
        f"{digits(result.peak / MIB)} MiB",
    ]


def columns(rows: Sequence[Row]) -> list[str]:
    """The contenders that ran anywhere, in the order of their table."""
    return [name for name in contenders.BY_NAME if any(name in row.results for row in rows)]


def table_cells(rows: Sequence[Row], join: str) -> tuple[list[str], list[list[str]]]:
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


def rich_table(rows: Sequence[Row]) -> Table:
    """The table for a terminal."""
    header, body = table_cells(rows, "\n")
    table = Table(title="FSP loss, forward + backward", caption=LEGEND, show_lines=True)
    for name in header:
        table.add_column(name, justify="left" if name == "workload" else "right")
    for line in body:
        table.add_row(*line)
    return table


def markdown_table(header: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """A GitHub table."""
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *body]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def provenance(machine: dict[str, Any], commit: dict[str, Any], command: str) -> str:
    """What made the numbers, as a list for the top of a results file."""
    state = " with uncommitted changes" if commit["dirty"] else ""
    facts = {"command": f"`{command}`", "commit": commit["id"] + state} | machine
    return "\n".join(f"- {name.replace('_', ' ')}: {value}" for name, value in facts.items())


def markdown(report: dict[str, Any], command: str) -> str:
    """The results file."""
    parts = [
        "# FSP loss, forward + backward",
        provenance(report["machine_info"], report["commit_info"], command),
        LEGEND,
        markdown_table(*table_cells(rows_of(report), ", ")),
    ]
    return "\n\n".join(parts) + "\n"
