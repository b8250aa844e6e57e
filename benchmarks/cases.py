"""Measures a case of ``workloads.py``: contenders on the same maps, all checked first.

A case also has a floor and, on a CPU, jobs that measure peak memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

from benchmarks import contenders
from benchmarks.checks import Prepared, Row, Step, Truth, maps_of, require_small, step_of
from benchmarks.contenders import Contender
from benchmarks.floor import floor_facts
from benchmarks.gpu_timing import copies_beyond_cache
from benchmarks.measure import NotRun, Rounds, measure
from benchmarks.memory import Job, add_peaks
from benchmarks.tables import digits
from benchmarks.workloads import Case
from fsp_kernels import reference


class Problem:
    """A case on a device: the maps that all contenders share, the truth in float64, the floor."""

    def __init__(self, case: Case, device: str):
        self.case, self._device = case, device
        student, teacher = case.maps(device)
        definition = case.masked(reference.fsp_loss, device)
        self._truth = Truth(student, teacher, case.training, definition)
        on_gpu = device == "cuda"
        self.maps = copies_beyond_cache(student, teacher) if on_gpu else [(student, teacher)]
        self._facts = floor_facts(case, student, teacher, device) | {
            "batch": case.batch,
            "gradient_bytes": sum(x.nbytes for x in maps_of(student)) if case.training else 0,
        }

    def prepare(self, contender: Contender) -> Prepared:
        """Build a contender and check what it computes.

        Raises NotRun where it is too large for the device, AssertionError where it is wrong.
        """
        reason = contenders.why_not_run(contender, self.case, self._device)
        if reason is not None:
            raise NotRun(reason)
        loss = self.case.masked(contender.build(), self._device)
        errors = self._truth.errors(loss)
        require_small(contender, errors, self.maps[0][0][0][0].dtype, self.case.workload.name)
        steps = [step_of(loss, *maps, self.case.training) for maps in self.maps]
        return Prepared(steps, self._facts | errors)


def measure_case(
    case: Case, chosen: Sequence[Contender], device: str, rounds: Rounds, **identity: Any
) -> list[Row]:
    """Measure contenders on a case and print their times; ``identity`` joins each row."""
    found = measure(chosen, Problem(case, device).prepare, device, rounds)
    show(f"{case}", found)
    return [identity | case.identity | row for row in found]


def measure_cases(
    cases: Iterable[tuple[Case, Mapping[str, Any]]],
    chosen: Sequence[Contender],
    device: str,
    rounds: Rounds,
) -> list[Row]:
    """Measure contenders on cases, each with what joins its rows; on a CPU also peak memory."""
    rows, jobs = [], []
    for case, identity in cases:
        found = measure_case(case, chosen, device, rounds, **identity)
        rows += found
        jobs += memory_jobs(case, found)
    if device == "cpu":
        add_peaks(jobs)
    return rows


def show(what: str, rows: Sequence[Row]) -> None:
    """Print a line with the times of rows."""
    times = [
        f"{row['contender']} {row.get('reason') or digits(1e3 * row['median']) + ' ms'}"
        for row in rows
    ]
    print(f"  {what}: {', '.join(times)}", flush=True)


def lone_step(case: Case, contender_name: str) -> Step:
    """A contender's step on a CPU, unchecked, to measure its peak memory."""
    loss = case.masked(contenders.BY_NAME[contender_name].build(), "cpu")
    return step_of(loss, *case.maps("cpu"), case.training)


def memory_jobs(case: Case, rows: Sequence[Row]) -> list[tuple[Row, Job]]:
    """The rows of a case that have times, each with the job that measures its peak memory."""
    timed = [row for row in rows if "reason" not in row]
    return [(row, partial(lone_step, case, row["contender"])) for row in timed]
