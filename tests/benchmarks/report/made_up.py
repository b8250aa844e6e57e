"""Results that nobody measured: parts of a run as ``python -m benchmarks`` would write them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

MIB = 1 << 20
CPU = {"cpu": "some cpu", "cores": 2, "torch": "2.13"}
GPU = {"gpu": "NVIDIA Some 1", "driver": "1.2", "cpu": "some cpu", "cores": 2, "torch": "2.13"}
Facts = dict[str, Any]


def stats(median: float, half_iqr: float) -> Facts:
    """As pytest-benchmark's, in seconds."""
    return {
        "median": median,
        "iqr": 2 * half_iqr,
        "q1": median - half_iqr,
        "q3": median + half_iqr,
        "data": [median],
    }


def timed(contender: str, milliseconds: float, spread: float = 0.02, **info: Any) -> Facts:
    """One result; its floor is 0.5 ms of copying, and ``spread`` a share of its time."""
    facts = {
        "contender": contender,
        "ours": contender.startswith("ours"),
        "device": "cpu",
        "batch": 32,
        "gradient_bytes": 2 * MIB,
        "floor_bytes": 1_000_000,
        "floor_flops": 4_000_000,
        "copy_bytes_per_second": 2e9,
        "matrix_flops_per_second": 1e11,
        "peak_extra_bytes": 3 * MIB,
        "loss_error": 1e-7,
        "gradient_error": 2e-7,
    }
    seconds = milliseconds / 1e3
    return {"extra_info": facts | info, "stats": stats(seconds, spread * seconds)}


def on_gpu(entry: Facts, eager: float = 4.0, replay: float | None = 1.0, **info: Any) -> Facts:
    """The same result with a GPU's facts; eager and replay in times of the device's own."""
    median = entry["stats"]["median"]
    clocks = {"eager_median": eager * median, "eager_iqr": 0.1 * median}
    if replay is None:
        clocks |= {"replay_median": None, "replay_iqr": None, "replay_reason": "it synchronises"}
    else:
        clocks |= {"replay_median": replay * median, "replay_iqr": 0.02 * median}
    facts = {"device": "cuda", "kernel_launches": 4, "full_queue": True}
    return entry | {"extra_info": entry["extra_info"] | facts | clocks | info}


def loss(workload: str, contender: str, milliseconds: float, **info: Any) -> Facts:
    """A result of the part ``loss``: fp32, NCHW, forward + backward, unless it says otherwise."""
    identity = {"part": "loss", "workload": workload, "dtype": "fp32", "layout": "nchw"}
    direction = {"direction": "forward+backward"}
    return timed(contender, milliseconds, **identity | direction | info)


def step(networks: str, contender: str, milliseconds: float, **info: Any) -> Facts:
    """A result of the part ``step``, a quarter of which is FSP."""
    seconds = {"student forward": 0.003, "FSP loss and its gradients by the maps": 0.001}
    facts = {"part": "step", "networks": networks, "dtype": "fp32"}
    return timed(
        contender, milliseconds, **facts | {"seconds_of": seconds, "fsp_share": 0.25} | info
    )


def scaled(axis: str, value: int, contender: str, milliseconds: float, **info: Any) -> Facts:
    """A result of the part ``scaling``."""
    return loss(f"{axis} {value}", contender, milliseconds, axis=axis, value=value, **info)


def evaluated(
    shape: str, way: str, milliseconds: float, planned: bool = False, backend: str = "torch"
) -> Facts:
    """A result of the part ``plan``."""
    return loss(shape, way, milliseconds, planned=planned, ours=True, backend=backend)


def erring(noise: float, contender: str, gradient: float, dtype: str = "fp32") -> Facts:
    """An entry of the part ``accuracy``."""
    facts = {"maps": "8 @ 7 x 7", "dtype": dtype, "noise": noise, "contender": contender}
    return facts | {"loss_error": gradient / 10, "gradient_error": gradient}


def absent(entry: Facts, reason: str, fault: bool = False) -> Facts:
    """What stands in ``not_measured`` in place of a result."""
    names = ("part", "workload", "networks", "axis", "value", "dtype", "layout", "direction")
    identity = {name: entry["extra_info"][name] for name in names if name in entry["extra_info"]}
    contender = entry["extra_info"]["contender"]
    return identity | {"contender": contender, "reason": reason, "fault": fault}


def part(name: str, results: list[Facts], machine: Facts = CPU, **content: Any) -> Facts:
    """The content of a part's file."""
    return {
        "part": name,
        "device": "cuda" if "gpu" in machine else "cpu",
        "command": "python -m benchmarks",
        "datetime": "2030-01-02T03:04:05",
        "commit_info": {"id": "abc", "dirty": False},
        "machine_info": machine,
        "not_measured": [],
        "benchmarks": [] if name == "accuracy" else results,
        "errors": results if name == "accuracy" else [],
    } | content


def write(folder: Path, *parts: Facts) -> Path:
    """A run, as a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for content in parts:
        (folder / f"{content['part']}.json").write_text(json.dumps(content))
    return folder
