"""Read the results of a device and work out ratios, with pandas."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from benchmarks.checks import Row
from benchmarks.recording import CASE, COLUMNS

TEXT = ("part", "backend", "axis", "workload", "dtype", "layout", "pass", "contender", "reason")
FLAGS = ("ours", "planned", "full_queue", "fault")  # true, false or empty
TYPES = dict.fromkeys((*TEXT, "no_replay"), "str") | dict.fromkeys(FLAGS, "boolean")
# The order of tables, where it is not that of the run.
ORDER = {
    "axis": ("batch", "channels", "size"),
    "dtype": ("fp32", "tf32", "bf16", "fp16"),
    "layout": ("nchw", "channels_last"),
    "pass": ("forward+backward", "forward"),
}
CLOCKS = {"ratio": "median", "eager_ratio": "eager_median", "replay_ratio": "replay_median"}


class Unreadable(ValueError):  # noqa: N818 - its text is a sentence for the user
    """A path that holds no benchmark results, and why not."""


@dataclass(frozen=True)
class Results:
    """All rows of a device, and by part the command, commit, time and machine."""

    rows: pd.DataFrame
    environment: dict[str, dict[str, Any]]

    @property
    def device(self) -> str:
        """The device's name for a title."""
        facts = next(iter(self.environment.values()))
        return facts.get("gpu") or f"{facts['cpu']}, {facts['cores']} cores"


def read(folder: Path) -> Results:
    """The results in a folder; raises Unreadable where there are none."""
    paths = folder / "results.csv", folder / "environment.json"
    for path in paths:
        if not path.is_file():
            raise Unreadable(f"{folder} holds no results: it has no {path.name}")
    try:
        rows = pd.read_csv(paths[0], dtype=TYPES)
        environment = json.loads(paths[1].read_text())
    except (ValueError, pd.errors.ParserError) as error:
        raise Unreadable(f"{folder} holds no results: {error}") from error
    if missing := [name for name in COLUMNS if name not in rows]:
        raise Unreadable(f"{paths[0]} holds no results: it has no column {missing[0]}")
    return Results(rows, environment)


# --- reading the rows -----------------------------------------------------------------------------


def with_ratios(rows: pd.DataFrame) -> pd.DataFrame:
    """Rows with ratios to ``is_base``, the first of ours in the same case, and with their floor."""
    case = rows.groupby(["part", *CASE], dropna=False, sort=False).ngroup()
    timed = rows[rows["ours"] & rows["median"].notna()].assign(case=case)
    base = timed.drop_duplicates("case").set_index("case")
    is_base = rows["contender"] == case.map(base["contender"])
    found = rows.assign(is_base=is_base, batch=rows["batch"].groupby(case).transform("max"))
    for ratio, column in (CLOCKS | {"memory_ratio": "peak_bytes"}).items():
        quotient = rows[column] / case.map(base[column])
        found[ratio] = quotient.where(
            ~is_base & (quotient > 0) & np.isfinite(quotient.astype(float))
        )
    moving = rows["floor_bytes"] / rows["copy_bytes_per_second"]
    multiplying = rows["floor_flops"] / rows["matrix_flops_per_second"]
    found["of_floor"] = np.maximum(moving, multiplying) / rows["median"]
    found["bound_by"] = np.where(moving >= multiplying, "bytes", "flops")
    return found


def records(rows: pd.DataFrame) -> list[Row]:
    """Rows as dicts, with None for what is not known."""
    return rows.astype(object).where(rows.notna(), None).to_dict("records")


def groups(rows: pd.DataFrame, *columns: str) -> Iterator[tuple[str, pd.DataFrame]]:
    """Title and rows of each table: one for each combination of these columns, in ``ORDER``."""

    def rank(key: Sequence[str]) -> list[int]:
        tables = [ORDER.get(column, ()) for column in columns]
        return [
            table.index(name) if name in table else len(table)
            for table, name in zip(tables, key, strict=True)
        ]

    found = dict(list(rows.groupby(list(columns), sort=False)))
    for key in sorted(found, key=rank):
        yield ", ".join(key).replace("+", " + "), found[key]


def names(rows: pd.DataFrame, timed: bool = False) -> list[str]:
    """The contenders, ours first; with ``timed`` those that have a time somewhere."""
    if timed:
        rows = rows[rows["median"].notna()]
    return list(dict.fromkeys([*rows[rows["ours"]]["contender"], *rows["contender"]]))


def curve(sweep: pd.DataFrame, name: str, column: str, unit: float) -> dict[int, float]:
    """A column of a contender by value, where it is known and above zero."""
    found = sweep[(sweep["contender"] == name) & (sweep[column] > 0)].sort_values("value")
    return dict(zip(found["value"], found[column] * unit, strict=True))


def growth(points: Mapping[int, float]) -> float | None:
    """Least-squares slope of log y over log x of the upper half of the values, at least two."""
    upper = sorted(points)[len(points) // 2 :] if len(points) > 2 else sorted(points)
    if len(upper) < 2:
        return None
    x, y = np.log(upper), np.log([points[value] for value in upper])
    return float(np.polyfit(x, y, 1)[0])
