"""Made-up rows, as ``python -m benchmarks`` would write them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.checks import Row
from benchmarks.recording import CASE, write_part
from benchmarks.results import Results, read

MIB = 1 << 20
CPU = {"cpu": "some cpu", "cores": 2, "torch": "2.13"}
GPU = {"gpu": "NVIDIA Some 1", "driver": "1.2"} | CPU


def timed(contender: str, milliseconds: float, spread: float = 0.02, **facts: Any) -> Row:
    """A row with times; its floor is 0.5 ms of copying, and ``spread`` a share of its time."""
    seconds = milliseconds / 1e3
    return {
        "contender": contender,
        "ours": contender.startswith("ours"),
        "batch": 32,
        "rounds": 5,
        "median": seconds,
        "iqr": 2 * spread * seconds,
        "gradient_bytes": 2 * MIB,
        "floor_bytes": 1_000_000,
        "floor_flops": 4_000_000,
        "copy_bytes_per_second": 2e9,
        "matrix_flops_per_second": 1e11,
        "peak_bytes": 3 * MIB,
        "loss_error": 1e-7,
        "gradient_error": 2e-7,
    } | facts


def on_gpu(row: Row, eager: float = 4.0, replay: float | None = 1.0, **facts: Any) -> Row:
    """The same row with a GPU's facts; ``eager`` and ``replay`` are multiples of its time."""
    median = row["median"]
    clocks = {"eager_median": eager * median, "eager_iqr": 0.1 * median}
    if replay is None:
        clocks["no_replay"] = "not captured: it synchronises"
    else:
        clocks |= {"replay_median": replay * median, "replay_iqr": 0.02 * median}
    return row | {"launches": 4, "full_queue": True} | clocks | facts


def loss(workload: str, contender: str, milliseconds: float, **facts: Any) -> Row:
    """A row of the part ``loss``: fp32, NCHW, forward + backward, unless it says otherwise."""
    case = {"workload": workload, "dtype": "fp32", "layout": "nchw", "pass": "forward+backward"}
    return case | timed(contender, milliseconds, **facts)


def step(networks: str, contender: str, milliseconds: float) -> Row:
    """A row of the part ``step``, a quarter of which is FSP."""
    pieces = {"teacher_forward": 0.0, "student_forward": 0.003, "fsp_loss": 0.001}
    pieces |= {"student_backward": 0.0, "optimiser": 0.0}
    return {"workload": networks, "dtype": "fp32"} | timed(contender, milliseconds, **pieces)


def scaled(axis: str, value: int, contender: str, milliseconds: float, **facts: Any) -> Row:
    """A row of the part ``scaling``."""
    return loss(f"{axis} {value}", contender, milliseconds, axis=axis, value=value, **facts)


def evaluated(
    shape: str, evaluation: str, milliseconds: float, planned: bool = False, **facts: Any
) -> Row:
    """A row of the part ``plan``."""
    facts = {"backend": "torch", "planned": planned, "ours": True} | facts
    return loss(shape, evaluation, milliseconds, **facts)


def erring(noise: float, contender: str, gradient: float, dtype: str = "fp32") -> Row:
    """A row of the part ``accuracy``."""
    case = {"workload": "8 @ 7 x 7", "dtype": dtype, "noise": noise, "contender": contender}
    errors = {"loss_error": gradient / 10, "gradient_error": gradient}
    return case | {"ours": contender.startswith("ours")} | errors


def absent(row: Row, reason: str, fault: bool = False) -> Row:
    """The row of a contender that was not measured."""
    kept = {name: row[name] for name in (*CASE, "contender", "ours") if name in row}
    return kept | {"reason": reason, "fault": fault}


def write(folder: Path, part: str, rows: list[Row], machine: Row = CPU, **facts: Any) -> Results:
    """Write one part into a folder; returns all that the folder then holds."""
    about = {"command": "python -m benchmarks", "commit": "abc", "measured": "2030-01-02"}
    write_part(folder, part, rows, about | machine | facts)
    return read(folder)
