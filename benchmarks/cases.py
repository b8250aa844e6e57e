"""A case of ``workloads.py`` as it is raced: contenders, checked, with the floor beside them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from benchmarks import contenders, memory
from benchmarks.contenders import Contender
from benchmarks.floor import floor_facts
from benchmarks.measure import Check, maps_of, step_of
from benchmarks.race import Entrant, NotRun, Outcome, Prepared, Race, Rounds, Step
from benchmarks.workloads import Case, Pairs

L2_MULTIPLE = 3  # what the copies of a case's maps take together on a GPU, in sizes of its L2
UNKNOWN_L2 = 128 << 20  # as large as any so far

Sets = Sequence[tuple[Pairs, Pairs]]


def l2_bytes() -> int:
    """The size of the GPU's last-level cache."""
    return getattr(torch.cuda.get_device_properties(), "L2_cache_size", 0) or UNKNOWN_L2


def rotating(student: Pairs, teacher: Pairs) -> Sets:
    """Copies of the maps, strides included, the first being the maps themselves.

    Together they don't fit in L2. Otherwise a small workload would be read from cache, where no
    training loop leaves it.
    """
    size = sum(x.nbytes for x in maps_of(student) + maps_of(teacher))
    count = max(2, math.ceil(L2_MULTIPLE * l2_bytes() / size))

    def copy(pairs: Pairs) -> Pairs:
        return [
            (
                first.detach().clone().requires_grad_(first.requires_grad),
                second.detach().clone().requires_grad_(second.requires_grad),
            )
            for first, second in pairs
        ]

    return [(student, teacher), *((copy(student), copy(teacher)) for _ in range(count - 1))]


class CaseRace:
    """A case on a device: maps that all contenders share, the definition's answer, the floor."""

    def __init__(self, case: Case, device: str):
        self.case, self._device = case, device
        student, teacher = case.maps(device)
        self._check = Check(case, student, teacher)
        self._sets = [(student, teacher)] if device == "cpu" else rotating(student, teacher)
        self._facts = floor_facts(case, student, teacher, device) | {
            "device": device,
            "batch": case.batch,
            "gradient_bytes": sum(x.nbytes for x in maps_of(student)) if case.training else 0,
        }

    def entrants(self, chosen: Sequence[Contender]) -> list[Entrant]:
        """The contenders, ready to be raced."""
        return [Entrant(c.name, lambda c=c: self._prepare(c), c.max_rounds) for c in chosen]

    def _prepare(self, contender: Contender) -> Prepared:
        reason = contenders.why_not(contender, self.case, self._device)
        if reason is not None:
            raise NotRun(reason)
        loss = contender.build()
        facts = self._facts | self._check(contender, loss) | {"ours": contender.ours}
        return Prepared([step_of(loss, *maps, self.case.training) for maps in self._sets], facts)


def lone_step(case: Case, contender_name: str) -> Step:
    """One contender's step on a CPU, unchecked: for its peak memory."""
    return step_of(contenders.BY_NAME[contender_name].build(), *case.maps("cpu"), case.training)


def peaks(cases: Sequence[Case], chosen: Sequence[Contender]) -> dict[tuple[Case, str], int | None]:
    """Peak memory of every contender in every case on a CPU, by a fresh process for all of them.

    Compiled code is found there in torch's cache, if it has been timed here before.
    """
    keys = [(c, x.name) for c in cases for x in chosen if contenders.why_not(x, c, "cpu") is None]
    found = memory.peaks_in_fresh_process([partial(lone_step, *key) for key in keys])
    return dict(zip(keys, found, strict=True))


def measure(
    case: Case, chosen: Sequence[Contender], device: str, race: Race, rounds: Rounds
) -> dict[str, Outcome]:
    """Race a case."""
    return race(CaseRace(case, device).entrants(chosen), rounds)


def with_peak(outcome: Outcome, peak: int | None) -> Outcome:
    """The same with its peak memory, on a CPU measured apart."""
    facts = {"peak_extra_bytes": peak, "peak_extra_method": memory.method()}
    return replace(outcome, facts=outcome.facts | facts)


def identity(case: Case, contender_name: str) -> dict[str, Any]:
    """What tells a result from others."""
    return {
        "workload": case.workload.name,
        "dtype": case.dtype,
        "layout": case.layout,
        "direction": case.direction,
        "contender": contender_name,
    }
