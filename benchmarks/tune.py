"""Find the fastest configuration of each Triton kernel on this GPU and write it into the table.

    python -m benchmarks.tune [--kernel one_pass] [--kind half] [--seconds 300] [--dry-run]

For every row of this chip's family the candidates of a small grid are compiled, those that do not
fit the chip are dropped, the others timed in turn: medians of interleaved rounds. A row changes
where another candidate is faster by more than 3 %. Either way it then says on which chip it was
measured. Run ``python -m benchmarks.kernels`` and the tests afterwards.
"""

from __future__ import annotations

import argparse
import datetime
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import product
from typing import NamedTuple

import torch
import triton

from benchmarks.kernels import DTYPES, Case, call_of, precision_of
from fsp_kernels.backends.triton import configurations
from fsp_kernels.backends.triton.configurations import Configuration, Row, using
from fsp_kernels.backends.triton.launch import device_family

ROUNDS = 11
CALLS = 20  # a round, one after another on the stream
BATCH = 256  # enough samples to fill any chip
GAIN = 1.03  # what a change must bring, above the noise of a round

# Blocks to try, of one_pass (block_k alone: its channels are the row's limit) and of the others.
POSITIONS = (16, 32, 64, 128)
BLOCKS = {
    "gram": tuple((c, c, 0) for c in (16, 32, 64, 128)),
    "residual": ((128, 128, 64), (128, 128, 32), (128, 64, 32), (64, 64, 64), (64, 64, 32)),
    "gradients": ((128, 64, 128), (128, 64, 64), (128, 32, 64), (64, 64, 64), (64, 32, 64)),
    "recompute": ((64, 64, 64), (64, 32, 64), (32, 64, 64), (32, 32, 64), (32, 32, 32)),
    "product": ((128, 128, 64), (128, 128, 32), (128, 64, 32), (64, 64, 64), (64, 64, 32)),
}
WARPS = (2, 4, 8)
STAGES = (1, 2, 3, 4)


class Timing(NamedTuple):
    """A candidate that works, and its median time of a call."""

    configuration: Configuration
    milliseconds: float


def candidates(row: Row) -> Iterator[Configuration]:
    """The grid for a row, the configuration in force first."""
    yield row.configuration
    if row.kernel == "one_pass":
        blocks = [(row.limit, row.limit, k) for k in POSITIONS]
    elif row.kernel == "gram":
        blocks = [(c, c, row.limit) for c, _, _ in BLOCKS["gram"]]
    else:
        blocks = list(BLOCKS[row.kernel])
    for block, warps, stages in product(blocks, WARPS, STAGES):
        candidate = Configuration(*block, warps, stages)
        if candidate != row.configuration:
            yield candidate


def tuned(row: Row, timings: Sequence[Timing], chip: str) -> Row:
    """The row after its candidates were timed; ``timings`` has the one in force first."""
    best = min(timings, key=lambda t: t.milliseconds)
    if best.milliseconds * GAIN < timings[0].milliseconds:
        return row._replace(configuration=best.configuration, measured=chip)
    return row._replace(configuration=timings[0].configuration, measured=chip)


def measure(row: Row, table: Sequence[Row], deadline: float) -> list[Timing]:
    """Time the candidates of a row, the one in force first, until there is no time for more."""
    calls = []
    for candidate in candidates(row):
        if calls and time.monotonic() > deadline:
            break
        trial = row._replace(configuration=candidate)
        with using([r for r in table if r != row] + [trial]), precision_of(row.kind):
            call = call_of(Case(trial, DTYPES[row.kind][0]), BATCH, "cuda")
        if _works(call):
            calls.append((candidate, call))
    times: list[list[float]] = [[] for _ in calls]
    for _ in range(ROUNDS):
        for (_, call), found in zip(calls, times, strict=True):
            found.append(_milliseconds(call))
    return [
        Timing(candidate, statistics.median(found))
        for (candidate, _), found in zip(calls, times, strict=True)
    ]


def _works(call: Callable[[], object]) -> bool:
    """Compile and run it once."""
    try:
        call()
        torch.cuda.synchronize()
    except triton.runtime.errors.OutOfResources:
        return False
    return True


def _milliseconds(call: Callable[[], object]) -> float:
    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    call()
    start.record()
    for _ in range(CALLS):
        call()
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop) / CALLS


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.tune",
        description="Time every kernel's configurations on this GPU and rewrite the table.",
    )
    parser.add_argument("--kernel", choices=configurations.KERNELS, help="one kernel only")
    parser.add_argument("--kind", choices=configurations.KINDS, help="one kind of product only")
    parser.add_argument(
        "--seconds", type=float, default=20, help="for compiling each row's candidates"
    )
    parser.add_argument("--dry-run", action="store_true", help="print, but leave the table")
    chosen = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("benchmarks.tune times kernels on an NVIDIA GPU, and PyTorch sees none here")
        return 1
    family = device_family()
    today = datetime.date.today().isoformat()
    versions = f"torch {torch.__version__}, triton {triton.__version__}"
    chip = f"{torch.cuda.get_device_name()}, {versions}, {today}"
    table = list(configurations.rows())
    for index, row in enumerate(table):
        wanted = chosen.kernel in (None, row.kernel) and chosen.kind in (None, row.kind)
        if row.family != family or not wanted:
            continue
        timings = measure(row, table, time.monotonic() + chosen.seconds)
        table[index] = tuned(row, timings, chip)
        before, after = timings[0], min(timings, key=lambda t: t.milliseconds)
        print(
            f"{row.kernel} {row.kind} {row.access}, limit {row.limit}: "
            f"{before.milliseconds:.4f} ms in force, best {after.milliseconds:.4f} ms with "
            f"{tuple(after.configuration)}, of {len(timings)}",
            flush=True,
        )
        if not chosen.dry_run:
            configurations.write(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
