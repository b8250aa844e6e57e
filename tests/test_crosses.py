"""Which cases of a test run."""

import itertools

import pytest
from crosses import kept

CASES = [
    {"dtype": d, "layout": y, "norm": n, "pool": p}
    for d, y, n, p in itertools.product(range(4), range(5), range(3), range(2))
]


def test_all_cases_are_kept_where_all_are_asked_for():
    assert kept(CASES, "all") == list(range(120))


@pytest.mark.parametrize(("crosses", "size", "most"), [("each", 1, 5), ("pairs", 2, 24)])
def test_every_combination_is_in_a_kept_case(crosses, size, most):
    def combinations(cases):
        return {c for x in cases for c in itertools.combinations(sorted(x.items()), size)}

    chosen = kept(CASES, crosses)
    assert combinations(CASES[i] for i in chosen) == combinations(CASES)
    assert len(chosen) <= most
    assert chosen == sorted(set(chosen)) == kept(CASES, crosses)


def test_two_parameters_are_crossed_in_full():
    cases = [{"dtype": d, "layout": y} for d, y in itertools.product(range(4), range(5))]
    assert kept(cases, "pairs") == list(range(20))


def test_a_test_without_parameters_is_kept():
    assert kept([{}], "pairs") == [0]
    assert kept([{}], "each") == [0]
