"""Which pairs of a call share launches, and which launches these are.

``plan.py`` chooses each pair's evaluation. From these, this module derives its launch groups.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Iterator, Sequence

from fsp_kernels.loss_plan import LaunchGroup, Limits, PairPlan

# A pair's evaluation, and the backend's limits for this pair.
Chosen = tuple[PairPlan, Limits]


def launch_groups(chosen: Sequence[Chosen]) -> Iterator[LaunchGroup]:
    """The groups of a call: pairs that share kernels, at most as many as a launch takes."""
    groups: dict[Hashable, list[int]] = {}
    for index, (pair, limits) in enumerate(chosen):
        key = (pair.evaluation, pair.form, limits.kernels.get(pair.evaluation))
        groups.setdefault(key, []).append(index)
    for members in groups.values():
        # Pairs with most flops come first: small ones then fill the device while the last large
        # ones end.
        members.sort(key=lambda i: -chosen[i][0].flops)
        most = chosen[members[0]][1].launch_pairs
        for start in range(0, len(members), most):
            yield from _by_chunk(members[start : start + most], chosen)


def _by_chunk(members: Sequence[int], chosen: Sequence[Chosen]) -> Iterator[LaunchGroup]:
    """One group for each chunk of samples of pairs that share their launches."""
    pair, limits = chosen[members[0]]
    stores = pair.evaluation in ("tiles", "blocks")
    scratch = sum(chosen[i][0].scratch_bytes for i in members)
    chunks = max(math.ceil(chosen[i][0].batch / chosen[i][0].samples) for i in members)
    for chunk in range(chunks if stores else 1):
        here = tuple(i for i in members if chunk * chosen[i][0].samples < chosen[i][0].batch)
        launches = _launches([chosen[i][0] for i in here], limits)
        yield LaunchGroup(pair.evaluation, pair.form, here, chunk, launches, scratch)


def _launches(pairs: Sequence[PairPlan], limits: Limits) -> tuple[str, ...]:
    """The kernels of a group, in order."""
    evaluation, form = pairs[0].evaluation, pairs[0].form
    if evaluation in ("chunks", "samples"):
        return ()
    if evaluation == "one pass":
        return ("gram",) if form == "gram" else ("one_pass",)
    if evaluation == "blocks":
        gradients = any(p.wants_gradients for p in pairs)
        return ("gram", "gram_combine", *(("gram_gradients",) if gradients else ()))
    ready = [p for p in pairs if len(p.teacher) == 1 and p.teacher[0].gradient_dtype is not None]
    products = _gradient_count(p for p in pairs if not p.blas_gradients)
    combines = any(not p.finishes for p in pairs)
    return (
        "residual",
        *(("combine",) if combines else ()),
        *("gradients",) * math.ceil(products / limits.launch_products),
        *("bmm",) * _gradient_count(p for p in pairs if p.blas_gradients),
        *("matrix_gradients",) * math.ceil(len(ready) / limits.launch_products),
    )


def _gradient_count(pairs: Iterable[PairPlan]) -> int:
    """How many gradients of maps the pairs want; those of ready matrices do not count."""
    maps = [m for p in pairs for m in (p.maps if len(p.teacher) == 2 else p.student)]
    return sum(m.gradient_dtype is not None for m in maps)
