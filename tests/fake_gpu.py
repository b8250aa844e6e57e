"""A fake GPU: the CPU answers what ``benchmarks`` and ``tools`` ask of torch.cuda.

So their code runs on a machine without a GPU; the numbers mean nothing.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch

from benchmarks import contenders, floor, gpu_timing, workloads
from benchmarks.measure import Rounds

MIB = 1 << 20
KERNELS = 7
ROUNDS = Rounds(most=4, least=4, seconds=0.0)
EXTRA = 3 * MIB
PROPERTIES = SimpleNamespace(
    name="NVIDIA Fake 1",
    major=9,
    minor=0,
    multi_processor_count=132,
    total_memory=80 * MIB,
    L2_cache_size=MIB // 16,
)


class Clock:
    """The GPU's time: the host's, and what ``work`` has added to it."""

    worked: ClassVar[float] = 0.0  # seconds

    @classmethod
    def now(cls) -> float:
        return time.perf_counter() + cls.worked


def work(seconds: float) -> None:
    """Keep the GPU busy, as far as its events and graphs tell."""
    Clock.worked += seconds


class Event:
    """Records the GPU's time; ``finished`` is what the next queries answer."""

    finished: ClassVar[list[bool]] = []

    def __init__(self, enable_timing: bool):
        assert enable_timing

    def record(self) -> None:
        self.time = Clock.now()

    def query(self) -> bool:
        return self.finished.pop(0) if self.finished else False

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, end: Event) -> float:
        return (end.time - self.time) * 1e3 + 1e-3


class Profile:
    """A trace of a few kernels, between other events."""

    def __init__(self, activities: Any):
        self.activities = activities

    def __enter__(self) -> Profile:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def export_chrome_trace(self, path: str) -> None:
        kernels = [
            {"cat": "kernel", "name": f"fsp_{i}", "ts": 10.0 * i, "dur": 1.0 + i}
            for i in range(KERNELS)
        ]
        others = [{"cat": "gpu_memset"}, {"name": "process_name"}]
        Path(path).write_text(json.dumps({"traceEvents": [*others, *kernels]}))


class Stream:
    """A stream, and the context in which it is the current one."""

    entered: ClassVar[list[Stream]] = []

    def __init__(self, *_: object):
        pass

    def wait_stream(self, _: object) -> None:
        pass

    def __enter__(self) -> None:
        self.entered.append(self)

    def __exit__(self, *_: object) -> None:
        self.entered.pop()


class Graph:
    """A CUDA graph that counts its replays; ``reason`` keeps one from being captured.

    A replay takes as long as the work while it was captured.
    """

    reason: ClassVar[Exception | None] = None
    replays: ClassVar[int] = 0
    seconds = 0.0

    def replay(self) -> None:
        type(self).replays += 1
        work(self.seconds)


class Capture(Stream):
    """The context in which a graph is captured."""

    def __init__(self, graph: Graph, pool: object = "pool", stream: Stream | None = None):
        assert isinstance(graph, Graph)
        assert pool == "pool"
        assert stream is None or isinstance(stream, Stream)
        self._graph = graph

    def __enter__(self) -> None:
        super().__enter__()
        if Graph.reason is not None:
            raise Graph.reason
        self._start = Clock.worked

    def __exit__(self, *_: object) -> None:
        super().__exit__()
        self._graph.seconds = Clock.worked - self._start
        Clock.worked = self._start


def on_cpu(make: Callable[..., Any]) -> Callable[..., Any]:
    """The same, whatever device it is asked for."""
    return lambda *arguments, **options: make(*arguments, **options | {"device": "cpu"})


def install(patch: pytest.MonkeyPatch) -> None:
    """Put the fake in place of torch.cuda and of whatever would allocate on a GPU."""
    held = {"memory_allocated": MIB, "max_memory_allocated": MIB + EXTRA}
    answers = held | {
        "is_available": True,
        "synchronize": None,
        "empty_cache": None,
        "reset_peak_memory_stats": None,
        "get_device_properties": PROPERTIES,
        "get_device_name": PROPERTIES.name,
        "get_device_capability": (PROPERTIES.major, PROPERTIES.minor),
        "graph_pool_handle": "pool",
    }
    for name, answer in answers.items():
        patch.setattr(torch.cuda, name, lambda *_, answer=answer: answer)
    patch.setattr(Stream, "entered", [Stream()])  # the default stream
    patch.setattr(torch.cuda, "current_stream", lambda: Stream.entered[-1])
    patch.setattr(torch.cuda, "Event", Event)
    patch.setattr(torch.cuda, "_sleep", lambda _: None)
    patch.setattr(torch.cuda, "Stream", Stream)
    patch.setattr(torch.cuda, "stream", lambda stream: stream)
    patch.setattr(torch.cuda, "CUDAGraph", Graph)
    patch.setattr(torch.cuda, "graph", Capture)
    patch.setattr(Graph, "reason", None)
    patch.setattr(Graph, "replays", 0)
    patch.setattr(gpu_timing, "profile", Profile)
    patch.setattr(gpu_timing, "ROUND_SECONDS", 1e-9)  # one step a round
    patch.setattr(workloads, "feature_maps", on_cpu(workloads.feature_maps))
    for make in ("ones", "randn"):
        patch.setattr(torch, make, on_cpu(getattr(torch, make)))
    patch.setattr(floor, "MATRIX_SIZE", {"cpu": 8, "cuda": 8})
    patch.setattr(contenders, "serves", lambda name, *_: name == "torch")
    patch.setattr(floor, "_fastest", {})
    gpu_timing.sleep_cycles_per_second.cache_clear()
