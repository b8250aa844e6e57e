"""The table of a GPU run: a line for each contender, since there is more to say of each."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks import contenders
from benchmarks.rows import Result, Row
from benchmarks.tables import MIB, digits, geometric_mean, times

LEGEND = (
    "Loss forward + backward, {dtypes}, same tensors, turn by turn. Device ms: median of the GPU's "
    "own time for a step, launches not waited for. Eager ms: median of the host's time for a step, "
    "launches included. Spread: half the interquartile range of device ms. % of floor: the time in "
    "which a copy moves the bytes a step must move (all maps read once, the student's gradients "
    "written once) over device ms. Launches: kernels of a step. Extra MiB: peak memory of a step "
    "beyond its inputs, gradients included, which alone take what column 3 says. Ratio: device ms "
    "over that of the first contender (above 1x ours is faster). The last lines hold geometric "
    "means, that of eager times under eager ms."
)
HEADER = [
    "workload",
    "B",
    "gradients MiB",
    "contender",
    "device ms",
    "eager ms",
    "spread",
    "% of floor",
    "launches",
    "extra MiB",
    "ratio",
]


def floor_share(result: Result) -> float:
    """The floor's time over the measured one: 1 is as fast as a copy of the same bytes."""
    floor = result.info["floor_bytes"] / result.info["copy_bytes_per_second"]
    return floor / result.median


def eager_ratio(row: Row, name: str) -> float | None:
    """As ``Row.ratio``, of eager times."""
    if row.ours is None or row.ratio(name) is None:
        return None
    return row.results[name].info["eager_median"] / row.results[row.ours].info["eager_median"]


def milliseconds(result: Result) -> str:
    """The device time, marked where it may include waits for launches."""
    return digits(result.median * 1e3) + ("" if result.info["full_queue"] else " (with gaps)")


def line(row: Row, name: str) -> list[str]:
    """One contender on one workload."""
    head = [row.workload, str(row.batch), digits(row.gradients / MIB), name]
    result = row.results.get(name)
    if result is None:
        return [*head, row.missing[name], *[""] * (len(HEADER) - len(head) - 1)]
    return [
        *head,
        milliseconds(result),
        digits(result.info["eager_median"] * 1e3),
        f"±{50 * result.iqr / result.median:.1f}%",
        f"{100 * floor_share(result):.0f}%",
        str(result.info["kernel_launches"] or "-"),
        digits(result.peak / MIB),
        times(row.ratio(name)),
    ]


Ratios = Sequence[float | None]


def mean_line(name: str, ratios: Ratios, eager: Ratios) -> list[str]:
    """Geometric means over the workloads a contender ran on."""
    return [
        *("geometric mean", "", "", name, "", times(geometric_mean(eager)), "", "", "", ""),
        times(geometric_mean(ratios)),
    ]


def table_cells(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Header and body; the last lines hold geometric means."""
    known = list(contenders.BY_NAME)
    body = [
        line(row, name)
        for row in rows
        for name in known
        if name in row.results or name in row.missing
    ]
    for name in known:
        ratios = [row.ratio(name) for row in rows]
        if any(ratios):
            body.append(mean_line(name, ratios, [eager_ratio(row, name) for row in rows]))
    fastest = [row.ratio_to_fastest() for row in rows]
    body.append(mean_line("fastest peer", fastest, []))
    return HEADER, body
