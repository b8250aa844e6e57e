"""Numbers and tables as printed."""

from __future__ import annotations

import pytest

from benchmarks.report.layout import Column, Section, tabulate
from benchmarks.tables import digits, geometric_mean, markdown_table, plain_table, with_spread


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (0.01234, "0.0123"),
        (0.1234, "0.123"),
        (1.234, "1.23"),
        (12.34, "12.3"),
        (123.4, "123"),
    ],
)
def test_numbers_have_about_three_digits(value: float, text: str) -> None:
    assert digits(value) == text


def test_a_spread_has_the_digits_of_its_value() -> None:
    assert with_spread(123.4, 7.77) == "123 ±8"
    assert with_spread(0.0123, 0.0004) == "0.0123 ±0.0004"


def test_a_geometric_mean_is_over_what_there_is() -> None:
    assert geometric_mean([2.0, None, 8.0]) == pytest.approx(4)
    assert geometric_mean([None]) is None


def test_a_plain_table_is_aligned() -> None:
    table = plain_table(["", "one"], [["first", "1 ms\n2.00x"], ["second", "-"]])
    assert table.splitlines() == [
        "          one",
        "------  -----",
        "first    1 ms",
        "        2.00x",
        "------  -----",
        "second      -",
    ]


def test_a_markdown_table_is_ruled() -> None:
    assert markdown_table(["a", "b"], [["1", "2"]]) == "| a | b |\n| --- | ---: |\n| 1 | 2 |"


COLUMNS = [
    Column("name", lambda line: line),
    Column("nothing", lambda _: "", "said of none"),
    Column("length", lambda line: str(len(line)), "of the name"),
]


def test_columns_without_a_value_are_left_out_with_their_meaning() -> None:
    table = tabulate("lengths", COLUMNS, ["a", "bc"])
    assert table.header == ["name", "length"]
    assert table.body == [["a", "1"], ["bc", "2"]]
    assert table.meanings == {"length": "of the name"}


def test_a_section_says_the_same_to_a_file_and_to_a_terminal() -> None:
    section = Section("Names", "How long.", [tabulate("lengths", COLUMNS, ["a"])], ["a note"])
    for text in (section.markdown(), section.plain()):
        for words in ("Names", "How long.", "of the name", "lengths", "a note"):
            assert words in text


def test_a_table_without_lines_is_not_shown() -> None:
    section = Section("Names", "How long.", [tabulate("lengths", COLUMNS, [])])
    assert "lengths" not in section.markdown() + section.plain()
