"""Write the results of a device, ``results.csv``, and how they were measured.

Times are in seconds, sizes in bytes. A row without a number has a ``reason``. Only the standard
library is needed, so that a machine can measure what another one draws.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks.checks import Row
from benchmarks.parts import PARTS

# What tells the rows of a part apart; the parts use some of it each.
CASE = ("backend", "axis", "value", "workload", "dtype", "layout", "pass", "noise")
COLUMNS = (
    *("part", *CASE, "contender"),
    *("ours", "planned", "batch", "rounds", "median", "iqr"),
    *("eager_median", "eager_iqr", "replay_median", "replay_iqr", "no_replay"),
    *("launches", "steps_per_round", "full_queue", "peak_bytes", "gradient_bytes"),
    *("floor_bytes", "floor_flops", "copy_bytes_per_second", "matrix_flops_per_second"),
    *("teacher_forward", "student_forward", "fsp_loss", "student_backward", "optimiser"),
    *("loss_error", "gradient_error", "reason", "fault"),
)


def write_part(folder: Path, part: str, rows: Iterable[Row], environment: Row) -> None:
    """Write the rows of one part in place of its former ones."""
    folder.mkdir(parents=True, exist_ok=True)
    table, about = folder / "results.csv", folder / "environment.json"
    kept: list[dict[str, Any]] = []
    environments = {part: environment}
    if table.exists() and about.exists():
        environments = json.loads(about.read_text()) | environments
        with table.open(newline="") as file:
            kept = [row for row in csv.DictReader(file) if row["part"] != part]
    kept += [{name: _text(value) for name, value in row.items()} | {"part": part} for row in rows]
    kept = [row for row in kept if row["part"] in environments]
    kept.sort(key=lambda row: list(PARTS).index(row["part"]))
    with table.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(kept)
    ordered = {name: environments[name] for name in PARTS if name in environments}
    about.write_text(json.dumps(ordered, indent=2) + "\n")


def _text(value: Any) -> str:
    if value is None or value != value:  # NaN
        return ""
    return f"{value:.8g}" if isinstance(value, float) else str(value)
