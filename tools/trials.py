"""One row of the Triton backend's table on trial: where it is used, its candidates, their times.

``tune.py`` decides what is tried; this module says what a trial is. A row is timed in *situations*:
all pairs of a workload in one call, since a launch takes the most warps and shared memory that any
of its pairs wants; where no workload uses the row, one pair of maps that does.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.checks import relative_error
from benchmarks.gpu_timing import L2_MULTIPLE, l2_bytes
from benchmarks.measure import Rounds
from benchmarks.workloads import BY_NAME, WORKLOADS
from fsp_kernels.backends.triton.configurations import Configuration, Row, replaced, using
from tools.calls import (
    DTYPES,
    Case,
    call_on,
    instead_of_launches,
    launches_of,
    maps_of,
    precision_of,
    workload_maps,
)
from tools.compile_triton import compile_case, compiled, faults
from tools.workers import Send, describe

BATCHES = (32, 64, 256)
SMALL_BATCH = 8  # where a pair made for a row leads to it in no other: many samples are not split
LARGEST = 4 << 30  # bytes of a situation's maps: two copies, gradients and results fit 80 GB
# A candidate multiplies and sums the same numbers in another order. A wrong one errs by far more.
TOLERANCES = {"half": 1e-2, "tf32": 1e-3, "tf32x3": 1e-4}
ROUNDS = Rounds(most=9, least=3, seconds=0.2)  # of each candidate in each situation
HOPELESS = 1.5  # times as slow in one situation: the others are not tried
STEPS = 2  # how far a candidate may be from the configuration in force
MOST = 32  # candidates of a row: two for each core of a machine with 16
WARPS = (1, 2, 4, 8, 16)
STAGES = range(1, 7)
BLOCKS = range(4, 9)  # 2^4 is the smallest that a tensor core takes


# --- candidates -----------------------------------------------------------------------------------


def candidates(row: Row) -> list[Configuration]:
    """What to try for a row: the configuration in force first, then those most like it.

    The configuration in force was chosen for this kernel and chip, so what is near it fits the chip
    and is likely to be fast; the further away, the less likely. A step doubles or halves one block
    or the warps, or adds or removes a stage. Of equally near ones those with more in flight come
    first: larger blocks, then more stages.
    """

    def order(c: Configuration) -> tuple[int, ...]:
        return _steps(row.configuration, c), -c.block_m * c.block_n * c.block_k, -c.stages, c.warps

    near = [c for c in _grid(row) if 0 < _steps(row.configuration, c) <= STEPS]
    return [row.configuration, *sorted(near, key=order)][:MOST]


def _grid(row: Row) -> Iterator[Configuration]:
    """All configurations that the kernel of a row can take."""
    blocks = [2**power for power in BLOCKS]
    now = row.configuration
    for block_m, block_n, block_k, warps, stages in product(blocks, blocks, blocks, WARPS, STAGES):
        if row.kernel == "one_pass" and (block_m, block_n) != now[:2]:
            continue  # its blocks are the shape's channels
        if row.kernel == "gram" and (block_m != block_n or block_k != now.block_k):
            continue  # one block of channels for both maps; the positions are the shape's
        yield Configuration(block_m, block_n, block_k, warps, stages)


def _steps(a: Configuration, b: Configuration) -> int:
    doublings = [abs(math.log2(x) - math.log2(y)) for x, y in zip(a[:4], b[:4], strict=True)]
    if a.block_m == a.block_n and b.block_m == b.block_n:
        doublings[1] = 0  # both blocks of channels together are one step
    return round(sum(doublings)) + abs(a.stages - b.stages)


# --- situations -----------------------------------------------------------------------------------


class Situation(NamedTuple):
    """Maps that a row is timed on: of a workload, or of the row's own case where that is None."""

    case: Case
    workload: str | None
    batch: int

    def __str__(self) -> str:
        return f"{self.workload or 'a pair of its own'}, batch {self.batch}"

    def maps(self, device: str) -> list[Tensor]:
        """Maps with new numbers."""
        if self.workload is None:
            return maps_of(self.case, self.batch, device)
        return workload_maps(BY_NAME[self.workload], self.batch, self.case.dtype, device)


def situations(row: Row, table: Sequence[Row]) -> list[Situation]:
    """Every workload that launches something else if the row changes, in each batch; needs no GPU.

    Where there is none, a pair that leads to the row, in each batch in which it does.
    """
    case = Case(row, DTYPES[row.kind][0])
    changed = row.configuration._replace(stages=row.configuration.stages + 1)
    trial = replaced(table, row, row._replace(configuration=changed))

    def differs(s: Situation) -> bool:
        return _launches(s, table) != _launches(s, trial)

    # The first of each. Symmetric ones have other gradients than the calls of calls.py.
    shapes = {(w.layers, w.tokens): w.name for w in reversed(WORKLOADS) if not w.symmetric}
    found = [
        Situation(case, name, batch) for name in reversed(shapes.values()) for batch in BATCHES
    ]
    own = [Situation(case, None, batch) for batch in (SMALL_BATCH, *BATCHES)]
    used = [s for s in found if differs(s)] or [s for s in own if differs(s)]
    fitting = [s for s in used if sum(x.nbytes for x in s.maps("meta")) <= LARGEST]
    return fitting or used[:1]


def _launches(situation: Situation, table: Sequence[Row]) -> list[str]:
    row, maps = situation.case.row, situation.maps("meta")
    with using(table):
        return launches_of(lambda: call_on(maps)(), row.family, row.kind)


# --- compiling ------------------------------------------------------------------------------------


def compile_trial(_: Send, table: Sequence[Row], trial: Row, used: Sequence[Situation]) -> str:
    """Compile all that timing a row is going to launch, into Triton's cache; needs no GPU.

    Returns why the row may not be shipped, empty if it may: what ``tools.compile_triton`` refuses.
    """
    with using(table):
        for dtype in DTYPES[trial.kind]:
            case = Case(trial, dtype)
            found = [bad for usage in compile_case(case) for bad in faults(case, usage)]
            if found:
                return "; ".join(found)
        for situation in used:
            maps = situation.maps("meta")
            call = partial(lambda maps: call_on(maps)(), maps)
            instead_of_launches(compiled, call, trial.family, trial.kind)
    return ""


# --- timing ---------------------------------------------------------------------------------------


class Bench:
    """A situation on the GPU, with the configuration in force as what others are held against.

    A trial is recorded in a CUDA graph, so that no time of the host counts. One replay goes once
    over all copies of the maps. Together they are several times as large as the L2, as in training,
    where other layers have passed through it in between.
    """

    def __init__(self, situation: Situation, table: Sequence[Row]):
        self._kind = situation.case.row.kind
        first = situation.maps("cuda")
        count = max(2, math.ceil(L2_MULTIPLE * l2_bytes() / sum(x.nbytes for x in first)))
        self.copies = [first, *(situation.maps("cuda") for _ in range(count - 1))]
        self._expected: list[Tensor] | None = None
        self._base = self._recorded(table)
        self.milliseconds = _milliseconds(self._base) / count

    def ratio(self, table: Sequence[Row]) -> float:
        """Time with another table, in times with the one in force; AssertionError if it is wrong.

        The two take turns, so that both see the same clock.
        """
        trial = self._recorded(table)
        rounds = ROUNDS.affordable(2e-3 * _milliseconds(trial))
        pairs = [(_milliseconds(trial), _milliseconds(self._base)) for _ in range(rounds)]
        new, old = zip(*pairs, strict=True)
        return statistics.median(new) / statistics.median(old)

    def _recorded(self, table: Sequence[Row]) -> torch.cuda.CUDAGraph:
        with using(table), precision_of(self._kind):
            calls = [call_on(maps) for maps in self.copies]
            self._check(calls[0]())
            for call in calls[1:]:  # a graph can only record what has been loaded before
                call()
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                for call in calls:
                    call()
        return graph

    def _check(self, results: list[Tensor]) -> None:
        """Hold results to those of the first call, which was of the configuration in force."""
        torch.cuda.synchronize()
        if self._expected is None:
            self._expected = [x.clone() for x in results]
            return
        error = relative_error(results, [x.double() for x in self._expected])
        if not error <= TOLERANCES[self._kind]:
            raise AssertionError(f"wrong: {error:.1e} from the results of the one in force")


def _milliseconds(graph: torch.cuda.CUDAGraph) -> float:
    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    graph.replay()  # the timed one is queued meanwhile: its launch takes no time
    start.record()
    graph.replay()
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop)


def measure(
    send: Send,
    table: Sequence[Row],
    row: Row,
    used: Sequence[Situation],
    chosen: Sequence[Configuration],
    deadline: float,
) -> None:
    """Time candidates for a row, one after the other, until ``deadline`` by ``time.time()``.

    Sends ``("in force", milliseconds)`` of the situations that are ready so far, and of each
    candidate ``("trying", it)`` and then ``("timed", it, ratio)`` or ``("dropped", it, reason)``.
    Where its process ends, the candidate that it was trying is the cause.
    """
    benches = []
    for situation in used:
        try:
            benches.append(Bench(situation, table))
        except torch.OutOfMemoryError:
            send(("skipped", str(situation), "out of memory"))
            torch.cuda.empty_cache()
        else:
            send(("in force", [bench.milliseconds for bench in benches]))
    if not benches:
        raise RuntimeError("no situation fits this GPU's memory")
    for candidate in chosen:
        if time.time() > deadline:
            return
        send(("trying", candidate))
        trial = replaced(table, row, row._replace(configuration=candidate))
        try:
            send(("timed", candidate, _ratio(benches, trial)))
        except Exception as error:
            send(("dropped", candidate, describe(error)))
            torch.cuda.synchronize()  # fails where the error has made the GPU useless to us


def _ratio(benches: Sequence[Bench], table: Sequence[Row]) -> float:
    """The geometric mean over all situations, or over the first ones if those are hopeless."""
    ratios: list[float] = []
    for bench in benches:
        ratios.append(bench.ratio(table))
        if ratios[-1] > HOPELESS:
            break
    return statistics.geometric_mean(ratios)
