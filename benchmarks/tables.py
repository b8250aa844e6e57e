"""Numbers as printed, and tables of them in Markdown and for a terminal."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

MIB = 1 << 20


def geometric_mean(values: Iterable[float | None]) -> float | None:
    """The geometric mean of the values that are not None; None where there are none."""
    present = [value for value in values if value is not None]
    return math.exp(sum(map(math.log, present)) / len(present)) if present else None


def decimals(value: float) -> int:
    """The number of decimals that gives about three digits."""
    return next((i for i, least in enumerate((100, 10, 1, 0.1)) if value >= least), 4)


def digits(value: float) -> str:
    """About three digits, never an exponent."""
    return f"{value:.{decimals(value)}f}" if value else "0"


def with_spread(value: float, spread: float) -> str:
    """Both numbers with the decimals of the value."""
    return f"{digits(value)} ±{spread:.{decimals(value)}f}"


def times(ratio: float | None) -> str:
    """A ratio as printed."""
    return "-" if ratio is None else f"{ratio:.2f}x"


def markdown_table(lines: Sequence[Mapping[str, str]]) -> str:
    """An aligned table with a column for each key; columns without any text are left out."""
    names = dict.fromkeys(name for line in lines for name in line)
    columns = [[name, *(line.get(name, "") for line in lines)] for name in names]
    columns = [column for column in columns if any(column[1:])]
    widths = [max(3, *map(len, column)) for column in columns]
    rows = list(zip(*columns, strict=True))
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]

    def aligned(row: Sequence[str]) -> str:
        first, *rest = row
        cells = [x.rjust(width) for x, width in zip(rest, widths[1:], strict=True)]
        return "| " + " | ".join([first.ljust(widths[0]), *cells]) + " |"

    return "\n".join([aligned(rows[0]), aligned(rule), *map(aligned, rows[1:])])


def plain_table(header: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """Columns aligned for a terminal; a row of several lines is ruled off from the next."""
    rows = [[cell.split("\n") for cell in row] for row in (header, *body)]
    columns = zip(*rows, strict=True)
    widths = [max(len(line) for cell in column for line in cell) for column in columns]
    rule = "  ".join("-" * width for width in widths)
    lines = []
    for row in rows:
        height = max(map(len, row))
        for i in range(height):
            first, *rest = (cell[i] if i < len(cell) else "" for cell in row)
            aligned = (x.rjust(w) for x, w in zip(rest, widths[1:], strict=True))
            lines.append("  ".join([first.ljust(widths[0]), *aligned]).rstrip())
        if row is rows[0] or height > 1:
            lines.append(rule)
    return "\n".join(lines)
