"""Errors as the student nears its teacher."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.report.layout import Column, Section, Table, not_measured, tabulate
from benchmarks.report.names import DTYPES, contenders_in_order, in_order
from benchmarks.report.runs import Contest, Part

LEGEND = (
    "Student = teacher + noise * normal: distillation drives the two networks' maps together. "
    "Relative error to float64 in the 2-norm; of the gradients the worst. "
    "Who subtracts two nearly equal FSP matrices drowns in rounding just there."
)

# Each contender's errors by noise.
Curves = Mapping[str, Mapping[float, Mapping[str, Any]]]


def by_setting(part: Part) -> dict[str, Curves]:
    """Of each dtype and maps each contender's errors by noise, the largest noise first."""
    return {
        f"{dtype}, {maps}": curves([e for e in part.errors if (e["maps"], e["dtype"]) == key])
        for maps in dict.fromkeys(error["maps"] for error in part.errors)
        for dtype in in_order((e["dtype"] for e in part.errors if e["maps"] == maps), DTYPES)
        for key in [(maps, dtype)]
    }


def curves(errors: Sequence[Mapping[str, Any]]) -> Curves:
    """By contender and noise."""
    largest_first = sorted(errors, key=lambda error: -error["noise"])
    return {
        name: {e["noise"]: e for e in largest_first if e["contender"] == name}
        for name in contenders_in_order(error["contender"] for error in errors)
    }


def table(title: str, kind: str, curves: Curves) -> Table:
    """A line for each contender, a column for each noise; ``kind`` is gradient or loss."""
    noises = sorted({noise for curve in curves.values() for noise in curve}, reverse=True)

    def column(noise: float) -> Column[str]:
        def cell(name: str) -> str:
            errors = curves[name].get(noise)
            return "-" if errors is None else f"{errors[f'{kind}_error']:.1e}"

        return Column(f"noise {noise:g}", cell)

    columns: Sequence[Column[str]] = [Column(kind, lambda name: name), *map(column, noises)]
    return tabulate(f"{title}, error of the {kind}", columns, list(curves))


def place(contest: Contest) -> str:
    return f"{contest.key['dtype']}, {contest.key['maps']}"


def sections(part: Part) -> list[Section]:
    """Two tables for each dtype and maps."""
    tables = [
        table(setting, kind, found)
        for setting, found in by_setting(part).items()
        for kind in ("gradient", "loss")
    ]
    notes = not_measured(part.contests, place)
    return [Section(f"Errors near convergence on {part.device_name}", LEGEND, tables, notes)]
