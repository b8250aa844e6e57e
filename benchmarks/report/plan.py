"""Whether the plan picks the fastest way to evaluate the loss."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.report.cells import milliseconds
from benchmarks.report.layout import Column, Section, Table, not_measured, tabulate
from benchmarks.report.names import DTYPES, contenders_in_order, in_order
from benchmarks.report.runs import Contest, Part, Result

LOSS = 1.1  # how many times slower than the fastest the planned one may be
LEGEND = (
    "Every way in which the library can evaluate the same loss, in ms: median ± half the "
    "interquartile range, turn by turn on the same tensors. The plan chooses one from the shapes "
    f"alone; * marks it. PLAN LOSES where it takes {100 * (LOSS - 1):.0f} % longer than the "
    "fastest or more and their interquartile ranges do not overlap."
)


def planned(contest: Contest) -> Result | None:
    """The evaluation the plan chooses, where it was measured."""
    return next((r for r in contest.results.values() if r.info["planned"]), None)


def fastest(contest: Contest) -> Result | None:
    return min(contest.results.values(), key=lambda result: result.time.median, default=None)


def excess(contest: Contest) -> float | None:
    """The planned evaluation's time over the fastest one's."""
    chosen, best = planned(contest), fastest(contest)
    return chosen.time.median / best.time.median if chosen and best else None


def loses(contest: Contest) -> bool:
    """Whether another evaluation is faster by more than chance."""
    chosen, best, ratio = planned(contest), fastest(contest), excess(contest)
    if chosen is None or best is None or ratio is None:
        return False
    return ratio > LOSS and chosen.time.q1 > best.time.q3


def evaluations(contests: Sequence[Contest]) -> list[str]:
    """All that ran."""
    return contenders_in_order(name for contest in contests for name in contest.results)


def verdict(contest: Contest) -> str:
    ratio = excess(contest)
    if ratio is None:
        return "not measured"
    return "" if ratio == 1 else f"{100 * (ratio - 1):.0f}% slower"


def table(title: str, contests: Sequence[Contest]) -> Table:
    """A line for each shape, a column for each evaluation."""

    def column(name: str) -> Column[Contest]:
        def cell(contest: Contest) -> str:
            result = contest.results.get(name)
            if result is None:
                return "-"
            return milliseconds(result.time) + ("*" if result.info["planned"] else "")

        return Column(name, cell)

    columns: list[Column[Contest]] = [
        Column("shape", lambda contest: contest.key["workload"]),
        *map(column, evaluations(contests)),
        Column("planned is", verdict),
        Column("", lambda contest: "PLAN LOSES" if loses(contest) else ""),
    ]
    return tabulate(title, columns, contests)


def grouped(contests: Sequence[Contest]) -> dict[str, list[Contest]]:
    """The shapes of each table by its title."""
    dtypes = in_order((contest.key["dtype"] for contest in contests), DTYPES)
    found: dict[str, list[Contest]] = {}
    for contest in sorted(contests, key=lambda contest: dtypes.index(contest.key["dtype"])):
        key = contest.key
        words = [key[name] for name in ("backend", "dtype", "layout", "direction") if key[name]]
        found.setdefault(", ".join(words).replace("+", " + "), []).append(contest)
    return found


def score(contests: Sequence[Contest]) -> str:
    """How often the plan was right."""
    lost = [contest for contest in contests if loses(contest)]
    measured = [contest for contest in contests if planned(contest)]
    text = f"The plan loses {len(lost)} of {len(measured)} races"
    return f"{text}: {', '.join(contest.key['workload'] for contest in lost)}" if lost else text


def sections(part: Part) -> list[Section]:
    """All shapes, and in a sentence how many of them the plan has right."""
    tables = [table(*group) for group in grouped(part.contests).items()]
    notes = not_measured(part.contests, lambda contest: contest.key["workload"])
    title = f"The plan against its alternatives on {part.device_name}"
    return [Section(title, LEGEND, tables, [score(part.contests), *notes])]
