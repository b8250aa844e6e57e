"""Numbers and tables as printed."""

import pytest

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
def test_numbers_have_about_three_digits(value, text):
    assert digits(value) == text


def test_a_spread_has_the_digits_of_its_value():
    assert with_spread(123.4, 7.77) == "123 ±8"
    assert with_spread(0.0123, 0.0004) == "0.0123 ±0.0004"


def test_a_geometric_mean_leaves_out_missing_values():
    assert geometric_mean([2.0, None, 8.0]) == pytest.approx(4)
    assert geometric_mean([None]) is None


def test_a_markdown_table_is_aligned_and_has_no_empty_columns():
    lines = [{"name": "a", "empty": "", "size": "1"}, {"name": "long", "size": "100"}]
    assert markdown_table(lines).splitlines() == [
        "| name | size |",
        "| ---- | ---: |",
        "| a    |    1 |",
        "| long |  100 |",
    ]


def test_a_plain_table_is_aligned():
    table = plain_table(["", "one"], [["first", "1 ms\n2.00x"], ["second", "-"]])
    assert table.splitlines() == [
        "          one",
        "------  -----",
        "first    1 ms",
        "        2.00x",
        "------  -----",
        "second      -",
    ]
