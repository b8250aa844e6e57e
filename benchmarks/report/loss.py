"""The loss beside its peers: a table to see who wins where, and one with all there is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

from benchmarks.report.cells import (
    RATIO,
    Line,
    batch,
    clock,
    error,
    fact,
    lines_of,
    mebibytes,
    milliseconds,
    of_result,
    ratio,
    time_or_reason,
)
from benchmarks.report.layout import Column, Section, Table, not_measured, tabulate
from benchmarks.report.names import DIRECTIONS, DTYPES, contenders_in_order, workloads_in_order
from benchmarks.report.runs import Contest, Part, Result
from benchmarks.tables import MIB, digits, geometric_mean, times

SUMMARY = (
    "Same tensors, turn by turn; the first of ours is what users get by default. Under a peer's "
    "name stands its median over ours: above 1x ours is faster. The last line holds geometric "
    "means over the workloads that both ran on; compare them within one table only. Tokens have "
    "one layout, and stand with nchw."
)
DETAIL = (
    "A line for each contender, medians over the rounds. Half precision costs the peers more than "
    "ours: they round both FSP matrices before they subtract them."
)
# The table of a layout: a workload has either of the first two, and every one belongs in the mean.
LAYOUTS = {"nchw": "nchw", "tokens": "nchw", "channels_last": "channels_last"}


class Floor(NamedTuple):
    """The least time a device can take, and what keeps it from being shorter."""

    seconds: float
    bound: str  # "bytes" or "flops"


def floor(result: Result) -> Floor:
    """The slower of moving the bytes that must move and of multiplying what must be multiplied."""
    info = result.info
    moving = info["floor_bytes"] / info["copy_bytes_per_second"]
    multiplying = info["floor_flops"] / info["matrix_flops_per_second"]
    return Floor(max(moving, multiplying), "bytes" if moving >= multiplying else "flops")


def percent_of_floor(result: Result) -> str:
    return f"{100 * floor(result).seconds / result.time.median:.0f}%"


def group_of(contest: Contest) -> tuple[str, str, str]:
    """Which table a contest belongs in."""
    key = contest.key
    return key["dtype"], LAYOUTS.get(key["layout"], key["layout"]), key["direction"]


def grouped(contests: Sequence[Contest]) -> dict[str, list[Contest]]:
    """The contests of each table by its title, in the order of workloads, both as listed."""
    layouts = list(dict.fromkeys(LAYOUTS.values()))

    def rank(group: tuple[str, str, str]) -> tuple[int, ...]:
        tables = (DTYPES, layouts, DIRECTIONS)
        return tuple(
            list(table).index(name) if name in table else len(table)
            for name, table in zip(group, tables, strict=True)
        )

    order = workloads_in_order(contest.key["workload"] for contest in contests)
    by_group: dict[tuple[str, str, str], list[Contest]] = {}
    for contest in sorted(contests, key=lambda contest: order.index(contest.key["workload"])):
        by_group.setdefault(group_of(contest), []).append(contest)
    return {
        f"{dtype}, {layout}, {direction.replace('+', ' + ')}": by_group[dtype, layout, direction]
        for dtype, layout, direction in sorted(by_group, key=rank)
    }


def headline(part: Part) -> dict[str, list[Contest]]:
    """What a figure has room for: forward + backward of maps as they mostly come, by dtype."""
    chosen = [c for c in part.contests if group_of(c)[1:] == ("nchw", DIRECTIONS[0])]
    return {group_of(found[0])[0]: found for found in grouped(chosen).values()}


# -- the summary ----------------------------------------------------------------------------------


def of_ours(value: Callable[[Result], str]) -> Callable[[Contest], str]:
    """The same of a contest, empty where ours has no result."""
    return lambda contest: value(contest.ours) if contest.ours else ""


def peak_of(name: str) -> Callable[[Contest], str]:
    return lambda contest: mebibytes(contest.results[name].peak) if name in contest.results else ""


def ratio_to(name: str) -> Callable[[Contest], str]:
    return lambda contest: times(contest.ratio(name))


def unusual_ours(default: str | None, contest: Contest) -> str:
    """Whose numbers ours are, where the one that users get by default has none."""
    name = contest.ours.contender if contest.ours else "-"
    return "" if name == default else name


def summary_columns(contests: Sequence[Contest]) -> list[Column[Contest]]:
    """Their number depends on the peers that ran."""
    ours = contenders_in_order(c.ours.contender for c in contests if c.ours)
    peers = contenders_in_order(peer.contender for c in contests for peer in c.peers)
    default = ours[0] if ours else None
    return [
        Column("workload", lambda contest: contest.key["workload"]),
        Column("B", batch),
        Column("ours", partial(unusual_ours, default), "which of ours, where not the default one"),
        Column(
            "ours ms",
            of_ours(lambda ours: milliseconds(ours.time)),
            "median ± half the interquartile range",
        ),
        Column(
            "of floor",
            of_ours(percent_of_floor),
            "the least time in which this device can move the bytes or multiply the matrices, over "
            "ours",
        ),
        Column(
            "bound by", of_ours(lambda ours: floor(ours).bound), "which of the two takes longer"
        ),
        *(Column(name, ratio_to(name)) for name in peers),
        Column(
            "fastest",
            lambda contest: times(contest.ratio_to_fastest()),
            "that of the peer which is fastest there",
        ),
        Column(
            "ours MiB",
            of_ours(lambda ours: mebibytes(ours.peak)),
            "peak memory of a step beyond its inputs, gradients included",
        ),
        Column("einsum MiB", peak_of("einsum")),
    ]


def mean_cells(header: Sequence[str], contests: Sequence[Contest]) -> list[str]:
    """The last line: under each ratio the geometric mean of its column."""
    fastest = [contest.ratio_to_fastest() for contest in contests]

    def cell(heading: str) -> str:
        ratios = [contest.ratio(heading) for contest in contests]
        mean = geometric_mean(fastest if heading == "fastest" else ratios)
        return "" if mean is None else times(mean)

    return ["geometric mean", *map(cell, header[1:])]


def summary(title: str, contests: Sequence[Contest]) -> Table:
    """A line for each workload: ours, and its peers as ratios to it."""
    table = tabulate(title, summary_columns(contests), contests)
    table.body.append(mean_cells(table.header, contests))
    return table


# -- the detail -----------------------------------------------------------------------------------


def detail_columns(device: str) -> list[Column[Line]]:
    """All there is to say; on a CPU there is one clock, and no launches."""
    return [
        Column("workload", lambda line: line.contest.key["workload"]),
        Column("B", lambda line: batch(line.contest)),
        Column(
            "gradients MiB",
            fact("gradient_bytes", lambda size: digits(size / MIB) if size else ""),
            "what the gradients alone take",
        ),
        Column("contender", lambda line: line.name),
        Column(
            "ms" if device == "cpu" else "device ms",
            time_or_reason,
            "median of a step"
            if device == "cpu"
            else "median of the GPU's own time of a step, launches not waited for; with gaps where "
            "the host was too slow for that",
        ),
        Column(
            "spread",
            of_result(lambda result: f"±{100 * result.time.spread / result.time.median:.1f}%"),
            "half the interquartile range of that",
        ),
        Column(
            "eager ms",
            clock("eager"),
            "the host's time of a step, launches included, ± half its interquartile range",
        ),
        Column("replay ms", clock("replay"), "the same steps replayed as a CUDA graph"),
        Column("launches", fact("kernel_launches", str), "kernels of a step"),
        Column(
            "of floor",
            of_result(percent_of_floor),
            "the least time in which this device can move the bytes (all maps read once, the "
            "student's gradients written once, at the rate of a copy) or multiply the matrices, "
            "over the measured one",
        ),
        Column("bound by", of_result(lambda r: floor(r).bound), "which of the two takes longer"),
        Column(
            "extra MiB",
            of_result(lambda result: mebibytes(result.peak)),
            "peak memory of a step beyond its inputs, gradients included",
        ),
        Column(
            "ratio",
            ratio,
            RATIO,
        ),
        Column("loss error", fact("loss_error", error), "relative to the same computed in float64"),
        Column(
            "gradient error", fact("gradient_error", error), "the same in the 2-norm, the worst"
        ),
    ]


def detail(title: str, contests: Sequence[Contest], device: str) -> Table:
    """A line for each contender of each workload."""
    return tabulate(title, detail_columns(device), lines_of(contests))


# -- means of what the summary has no room for ----------------------------------------------------


def clock_ratio(name: str, clock: str, contest: Contest) -> float | None:
    """As ``Contest.ratio``, by another clock."""
    result, ours = contest.results.get(name), contest.ours
    if result is None or ours is None or result is ours:
        return None
    time, base = result.timing(clock), ours.timing(clock)
    return time.median / base.median if time and base else None


def memory_ratio(name: str, contest: Contest) -> float | None:
    """As ``Contest.ratio``, of peak memory."""
    result, ours = contest.results.get(name), contest.ours
    if result is None or ours is None or result is ours or not result.peak or not ours.peak:
        return None
    return result.peak / ours.peak


def means(title: str, contests: Sequence[Contest]) -> Table:
    """Geometric means over the workloads, by every clock."""

    def mean(ratio: Callable[[str, Contest], float | None]) -> Callable[[str], str]:
        def value(name: str) -> str:
            found = geometric_mean([ratio(name, contest) for contest in contests])
            return "" if found is None else times(found)

        return value

    columns: list[Column[str]] = [
        Column("geometric means", lambda name: name),
        Column("time", mean(lambda name, contest: contest.ratio(name))),
        Column("eager time", mean(lambda name, contest: clock_ratio(name, "eager", contest))),
        Column("replay time", mean(lambda name, contest: clock_ratio(name, "replay", contest))),
        Column("memory", mean(memory_ratio)),
    ]
    names = contenders_in_order(name for contest in contests for name in contest.results)
    return tabulate(f"{title}: each over the first of ours", columns, names)


def sections(part: Part) -> list[Section]:
    """The summary for a terminal, and the detail for a file."""
    groups = grouped(part.contests)
    title = f"FSP loss on {part.device_name}"
    notes = not_measured(part.contests, lambda contest: contest.key["workload"])
    every = [
        table
        for name, contests in groups.items()
        for table in (detail(name, contests, part.device), means(name, contests))
    ]
    return [
        Section(title, SUMMARY, [summary(*group) for group in groups.items()], notes),
        Section("FSP loss, every contender", DETAIL, every, in_terminal=False),
    ]
