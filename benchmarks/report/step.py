"""A whole training step, with every way to compute its FSP loss."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.report.cells import (
    RATIO,
    Line,
    batch,
    clock,
    fact,
    lines_of,
    mebibytes,
    milliseconds,
    of_result,
    ratio,
    time_or_reason,
)
from benchmarks.report.layout import Column, Section, Table, not_measured, tabulate
from benchmarks.report.names import DTYPES, in_order
from benchmarks.report.runs import Contest, Part
from benchmarks.tables import digits

LEGEND = (
    "A training step of whole networks: teacher and student forward, losses, backward, optimiser. "
    "All contenders take the same batch, turn by turn; only the FSP loss differs, so the ratio is "
    "what an FSP loss does to the time of training."
)
SPLIT = "Medians in ms of the pieces of a step, timed apart from the steps above."


def time_with_spread(line: Line) -> str:
    return milliseconds(line.result.time) if line.result else time_or_reason(line)


STEP: list[Column[Line]] = [
    Column("networks", lambda line: line.contest.key["networks"]),
    Column("B", lambda line: batch(line.contest)),
    Column("FSP loss", lambda line: line.name),
    Column("step ms", time_with_spread, "median ± half the interquartile range"),
    Column("ratio", ratio, RATIO),
    Column("eager ms", clock("eager"), "the host's time of a step, launches included"),
    Column("replay ms", clock("replay"), "the same steps replayed as a CUDA graph"),
    Column("launches", fact("kernel_launches", str), "kernels of a step"),
    Column("peak MiB", of_result(lambda result: mebibytes(result.peak)), "peak extra memory"),
    Column(
        "FSP share",
        fact("fsp_share", lambda share: f"{100 * share:.1f}%"),
        "of the step, for the loss and its gradients by the maps",
    ),
]


def by_dtype(part: Part) -> dict[str, list[Contest]]:
    """The contests of each dtype."""
    dtypes = in_order((contest.key["dtype"] for contest in part.contests), DTYPES)
    return {name: [c for c in part.contests if c.key["dtype"] == name] for name in dtypes}


def split(title: str, contests: Sequence[Contest]) -> Table:
    """A line for each contender, a column for each piece of its step."""
    lines = [line for line in lines_of(contests) if line.result]
    results = [result for contest in contests for result in contest.results.values()]
    pieces = dict.fromkeys(piece for result in results for piece in result.info["seconds_of"])

    def piece_column(piece: str) -> Column[Line]:
        return Column(
            piece,
            fact("seconds_of", lambda of: digits(of[piece] * 1e3) if piece in of else ""),
        )

    return tabulate(title, [*STEP[:3], *map(piece_column, pieces)], lines)


def sections(part: Part) -> list[Section]:
    """Steps for a terminal, and what they are made of for a file."""
    groups = by_dtype(part)
    notes = not_measured(part.contests, lambda contest: contest.key["networks"])
    return [
        Section(
            f"A training step on {part.device_name}",
            LEGEND,
            [tabulate(name, STEP, lines_of(contests)) for name, contests in groups.items()],
            notes,
        ),
        Section(
            "Where a training step's time goes",
            SPLIT,
            [split(name, contests) for name, contests in groups.items()],
            in_terminal=False,
        ),
    ]
