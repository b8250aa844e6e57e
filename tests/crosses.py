"""Which cases of a test run, where its parameters are crossed.

A test of three parameters with ten values each has a thousand cases. Nearly every bug shows with
one value, or with two values of different parameters together. So ``pytest --crosses pairs``, the
default, keeps enough cases to have every such pair. ``each`` keeps enough to have every value, and
``all`` keeps all.
"""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Mapping, Sequence

SIZES = {"each": 1, "pairs": 2}  # of the combinations that the kept cases must have
CROSSES = (*SIZES, "all")


def kept(cases: Sequence[Mapping[str, Hashable]], crosses: str) -> list[int]:
    """Places of the cases to run, in order; the same ones every time.

    A case maps each parameter to what stands for its value.
    """
    if crosses == "all":
        return list(range(len(cases)))
    size = SIZES[crosses]
    found = [set(itertools.combinations(sorted(x.items()), min(size, len(x)))) for x in cases]
    missing = set().union(*found)
    chosen = []
    while missing:
        best = max(range(len(cases)), key=lambda i: len(found[i] & missing))
        chosen.append(best)
        missing -= found[best]
    return sorted(chosen)
