"""The floor: the least time a step can take on a device.

It is the longer of two times: to move the bytes at the rate of a copy, and to compute the flops at
the rate of a matrix product. A step must read every map once and write every gradient once, and no
known way needs fewer flops than the cheaper of the two forms of ``plan.py``. Both rates are
measured in the same run, and the fastest repetition counts, since the floor is a bound.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from benchmarks.checks import Row, float32_products, maps_of
from benchmarks.workloads import DTYPES, Case, Pairs
from fsp_kernels.loss_plan import MapSpec
from fsp_kernels.plan import fewest_flops

COPY_BYTES = 1 << 30  # on a GPU: twenty times the largest L2, so caches hardly help
COPIES = 20
# Long enough that all copies are queued before the first one starts.
SLEEP_CYCLES = 20_000_000
MATRIX_SIZE = {"cpu": 512, "cuda": 8192}  # a CPU is fastest where all of it fits in the cache
PRODUCTS = 10
TF32_TERMS = 3  # products of TF32 that make one of fp32


def floor_bytes(
    student: Pairs, teacher: Pairs, training: bool = True, mask: Tensor | None = None
) -> int:
    """Every map read once, and in training every gradient of the student's maps written once.

    Of maps with a mask, the positions that count are read, and whole gradients written.
    """
    maps = maps_of(student) + maps_of(teacher)
    wanted = [x for x in maps if training and x.requires_grad]
    share = 1.0 if mask is None else mask.double().mean().item()
    return round(share * sum(x.nbytes for x in maps)) + sum(x.nbytes for x in wanted)


def floor_flops(
    student: Pairs, teacher: Pairs, training: bool = True, mask: Tensor | None = None
) -> int:
    """The flops of the cheaper form of each pair; with a mask, of each sample of a pair."""

    def specs(pair: tuple[Tensor, Tensor], count: int | None) -> tuple[MapSpec, MapSpec]:
        first, second = (
            MapSpec.of(x)._replace(requires_grad=training and x.requires_grad) for x in pair
        )
        if count is not None:
            first, second = (x._replace(shape=(1, x.shape[1], count)) for x in (first, second))
        return first, second

    counts = [None] if mask is None else mask.sum(1).tolist()
    return sum(
        fewest_flops(specs(s, count), specs(t, count), symmetric=s[0] is s[1] and t[0] is t[1])
        for s, t in zip(student, teacher, strict=True)
        for count in counts
    )


def _seconds_of_each(work: Callable[[], object], repetitions: int, device: str) -> list[float]:
    """Seconds of each call, after one that warms up."""
    work()
    if device == "cpu":
        times = [time.perf_counter()]
        for _ in range(repetitions):
            work()
            times.append(time.perf_counter())
        return [end - start for start, end in pairwise(times)]
    events = [torch.cuda.Event(enable_timing=True) for _ in range(repetitions + 1)]
    torch.cuda._sleep(SLEEP_CYCLES)
    events[0].record()
    for event in events[1:]:
        work()
        event.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) / 1e3 for start, end in pairwise(events)]


_fastest: dict[tuple[str, Any], float] = {}  # by device and by bytes copied or dtype


def _fastest_rate(device: str, work: Any, rate: Callable[[], float]) -> float:
    """The fastest rate measured in this run, so that a busy moment of a CPU does not raise a floor.

    A GPU is not shared with other programs, and is measured once.
    """
    key = device, work
    if device == "cpu" or key not in _fastest:
        _fastest[key] = max(rate(), _fastest.get(key, 0.0))
    return _fastest[key]


def copy_rate(device: str, moved: int) -> float:
    """Bytes per second, reads and writes together, of a ``copy_``: the fastest so far.

    On a CPU the copy moves ``moved`` bytes, as many as the step: what fits in a cache is copied
    within it, as contenders find it there. On a GPU the copy is larger than the caches.
    """
    if device == "cuda":
        moved = min(2 * COPY_BYTES, torch.cuda.get_device_properties().total_memory // 4)

    def rate() -> float:
        source = torch.ones(moved // 2, dtype=torch.uint8, device=device)
        target = torch.empty_like(source)
        seconds = _seconds_of_each(lambda: target.copy_(source), COPIES, device)
        return 2 * source.nbytes / min(seconds)

    return _fastest_rate(device, moved if device == "cpu" else "copy", rate)


def matrix_rate(device: str, dtype_name: str) -> float:
    """Flops per second of a large matrix product in a dtype: the fastest so far.

    A CPU may widen half precision first. A GPU may compute an exact fp32 product as three of TF32.
    """
    return _fastest_rate(device, dtype_name, lambda: _matrix_rate(device, dtype_name))


def _matrix_rate(device: str, dtype_name: str) -> float:
    rates = [_product_rate(device, DTYPES[dtype_name])]
    if device == "cpu" and dtype_name != "fp32":
        rates.append(_product_rate(device, torch.float32))
    exact = dtype_name == "fp32" and torch.get_float32_matmul_precision() == "highest"
    if device == "cuda" and exact:
        with float32_products("high"):
            rates.append(_product_rate(device, torch.float32) / TF32_TERMS)
    return max(rates)


def _product_rate(device: str, dtype: torch.dtype) -> float:
    size = MATRIX_SIZE[device]
    # Random: a GPU multiplies ones faster, since it needs less power for them.
    x, y = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(x)
    seconds = _seconds_of_each(lambda: torch.mm(x, y, out=out), PRODUCTS, device)
    return 2 * size**3 / min(seconds)


def floor_facts(case: Case, student: Pairs, teacher: Pairs, device: str) -> Row:
    """The columns of a row that tell the floor of a case."""
    mask = case.workload.mask(case.batch, device)
    moved = floor_bytes(student, teacher, case.training, mask)
    return {
        "floor_bytes": moved,
        "floor_flops": floor_flops(student, teacher, case.training, mask),
        "copy_bytes_per_second": copy_rate(device, moved),
        "matrix_flops_per_second": matrix_rate(device, case.dtype),
    }


def with_final_rates(row: Row, device: str) -> Row:
    """The same row with the rates of the whole run, which are the fastest measured in it."""
    if "floor_bytes" not in row:
        return row
    copied = row["floor_bytes"] if device == "cpu" else "copy"
    return row | {
        "copy_bytes_per_second": _fastest[device, copied],
        "matrix_flops_per_second": _fastest[device, row["dtype"]],
    }
