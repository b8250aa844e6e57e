"""Columns make a table, tables make a section; both for a terminal and for a file."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from benchmarks.report.runs import Contest
from benchmarks.tables import markdown_table, plain_table

TERMINAL = 120  # columns of running text
REASON = 70  # characters of a reason, which may be a compiler's whole error

Line = TypeVar("Line")


@dataclass(frozen=True)
class Column(Generic[Line]):
    """A heading, what it says of a line, and for the legend what it means."""

    heading: str
    value: Callable[[Line], str]
    meaning: str = ""


@dataclass(frozen=True)
class Table:
    """Cells as printed."""

    title: str
    header: list[str]
    body: list[list[str]]
    meanings: dict[str, str]  # of the headings that need one


@dataclass(frozen=True)
class Section:
    """What one part of the benchmarks found, or one view of it."""

    title: str
    legend: str
    tables: Sequence[Table]
    notes: Sequence[str] = ()
    in_terminal: bool = True

    @property
    def filled(self) -> list[Table]:
        """The tables that have lines."""
        return [table for table in self.tables if table.body]

    @property
    def meanings(self) -> dict[str, str]:
        """Of all tables' headings, each once."""
        return {name: text for table in self.tables for name, text in table.meanings.items()}

    def markdown(self) -> str:
        """For a file."""
        blocks = [f"## {self.title}", self.legend]
        if self.meanings:
            blocks.append("\n".join(f"- *{name}*: {text}" for name, text in self.meanings.items()))
        for table in self.filled:
            blocks += [f"### {table.title}", markdown_table(table.header, table.body)]
        if self.notes:
            blocks.append("\n".join(f"- {note}" for note in self.notes))
        return "\n\n".join(blocks)

    def plain(self) -> str:
        """For a terminal: the legend first, so that the tables are last on the screen."""
        width = max(map(len, self.meanings), default=0)
        meanings = [
            textwrap.fill(f"{name:{width}}  {text}", TERMINAL, subsequent_indent=" " * (width + 2))
            for name, text in self.meanings.items()
        ]
        blocks = [f"{self.title}\n{'=' * len(self.title)}", textwrap.fill(self.legend, TERMINAL)]
        blocks += ["\n".join(meanings)] * bool(meanings)
        for table in self.filled:
            blocks += [table.title, plain_table(table.header, table.body)]
        if self.notes:
            blocks.append("\n".join(textwrap.fill(note, TERMINAL) for note in self.notes))
        return "\n\n".join(blocks)


def tabulate(title: str, columns: Sequence[Column[Line]], lines: Sequence[Line]) -> Table:
    """A table without the columns that have nothing to say of any line."""
    cells = [[column.value(line) for line in lines] for column in columns]
    present = [(column, found) for column, found in zip(columns, cells, strict=True) if any(found)]
    return Table(
        title,
        [column.heading for column, _ in present],
        [list(row) for row in zip(*(found for _, found in present), strict=True)],
        {column.heading: column.meaning for column, _ in present if column.meaning},
    )


def short(reason: str) -> str:
    """A reason on one line, as a cell of any table can hold it."""
    return textwrap.shorten(reason.replace("|", "/"), REASON, placeholder=" ...")


def not_measured(contests: Sequence[Contest], name: Callable[[Contest], str]) -> list[str]:
    """Who has no result where and why; what is a defect says so.

    A line for each contender, or for several that miss the same for the same reasons.
    """
    places: dict[tuple[str, bool], list[str]] = {}
    for contest in contests:
        for contender, missing in contest.missing.items():
            where = f"{name(contest)} ({short(missing.reason)})"
            places.setdefault((contender, missing.fault), []).append(where)
    alike: dict[tuple[str, bool], list[str]] = {}
    for (contender, fault), where in places.items():
        alike.setdefault((", ".join(dict.fromkeys(where)), fault), []).append(contender)
    return [
        f"{'FAULT: ' * fault}No result of {', '.join(who)}: {where}"
        for (where, fault), who in alike.items()
    ]
