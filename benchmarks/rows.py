"""What a run measured, one row for each workload and dtype, read from pytest-benchmark's JSON."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from benchmarks import contenders, workloads


@dataclass(frozen=True)
class Result:
    """One contender on one workload: seconds and bytes, and on a GPU what else was recorded."""

    median: float
    iqr: float
    peak: int
    info: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Row:
    """One workload in one dtype."""

    workload: str
    batch: int
    gradients: int  # bytes
    results: dict[str, Result]
    dtype: str = "fp32"
    missing: dict[str, str] = field(default_factory=dict)  # why a contender has no result

    @property
    def ours(self) -> str | None:
        """Ours as users get it by default: the first of ours that ran."""
        names = (name for name, c in contenders.BY_NAME.items() if c.ours)
        return next((name for name in names if name in self.results), None)

    def ratio(self, name: str) -> float | None:
        """How many times faster ours is than ``name``; None where either was not run."""
        if self.ours in (None, name) or name not in self.results:
            return None
        return self.results[name].median / self.results[self.ours].median

    def ratio_to_fastest(self) -> float | None:
        """The ratio to the peer that was fastest on this workload."""
        ratios = (self.ratio(peer.name) for peer in contenders.PEERS)
        return min((ratio for ratio in ratios if ratio is not None), default=None)


def result_of(entry: dict[str, Any]) -> Result:
    """A result from its entry of the JSON."""
    info, stats = entry["extra_info"], entry["stats"]
    return Result(stats["median"], stats["iqr"], info["peak_extra_bytes"], info)


def rows_of(report: dict[str, Any]) -> list[Row]:
    """The rows in the order of the dtype and workload tables, whatever the order of the run."""
    missing: dict[tuple[str, str], dict[str, str]] = {}
    for entry in report["not_measured"]:
        key = entry["dtype"], entry["workload"]
        missing.setdefault(key, {})[entry["contender"]] = entry["reason"]
    measured: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for entry in report["benchmarks"]:
        key = entry["extra_info"]["dtype"], entry["extra_info"]["workload"]
        measured.setdefault(key, []).append(entry)
    rows = []
    for key in ((d, w) for d in workloads.DTYPES for w in workloads.BY_NAME):
        if key not in measured:
            continue
        info = measured[key][0]["extra_info"]
        results = {e["extra_info"]["contender"]: result_of(e) for e in measured[key]}
        dtype, name = key
        gradients = info["gradient_bytes"]
        rows.append(Row(name, info["batch"], gradients, results, dtype, missing.get(key, {})))
    return rows
