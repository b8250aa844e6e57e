"""Run functions in processes of their own, so that a failure only costs their own result.

A compiler may crash, a kernel may never end, and after a CUDA error a process can do nothing more
on the GPU. Each becomes a sentence that says why there is no result.
"""

from __future__ import annotations

import gc
import math
import multiprocessing
import signal
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple

# Forked from a server that has done the slow imports and never used a GPU.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tools.trials"])

MOST_WORDS = 300  # letters of an error: a compiler's can be pages
Send = Callable[[Any], None]


class Result(NamedTuple):
    """What a function returned, or why it returned nothing."""

    value: Any = None
    reason: str | None = None


def describe(error: BaseException) -> str:
    """An error and its place, in one line."""
    frames = traceback.extract_tb(error.__traceback__)
    place = f" at {Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else ""
    words = " ".join(str(error).split())
    return f"{type(error).__name__}{place}: {words[:MOST_WORDS]}"


class Workers:
    """Runs functions in processes of their own, up to ``jobs`` of them side by side.

    Leaving the ``with`` block ends all that still run.
    """

    def __init__(self, jobs: int):
        self._jobs = jobs
        self._running: set[BaseProcess] = set()
        self._lock = threading.Lock()
        self._closed = False

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._closed = True
            for process in self._running:
                process.kill()

    def run(
        self,
        function: Callable[..., Any],
        *arguments: Any,
        seconds: float,
        quiet: float = math.inf,
        on_message: Send | None = None,
    ) -> Result:
        """Call ``function(send, *arguments)``; ``on_message`` gets each message as it is sent.

        The process is ended after ``seconds``, or ``quiet`` seconds after its last message.
        """
        receiver, sender = CONTEXT.Pipe(duplex=False)
        process = CONTEXT.Process(target=_call, args=(sender, function, arguments), daemon=True)
        with self._lock:
            if self._closed:
                return Result(reason="stopped")
            process.start()
            self._running.add(process)
        sender.close()
        try:
            return _listen(receiver, process, seconds, quiet, on_message)
        finally:
            process.kill()
            process.join()
            receiver.close()
            with self._lock:
                self._running.discard(process)

    def run_all(
        self,
        function: Callable[..., Any],
        calls: Sequence[tuple[Any, ...]],
        seconds: float,
        together: float,
    ) -> list[Result | None]:
        """The same for many calls side by side, which have ``seconds`` each.

        ``None`` for those that were not done when the time for all of them ``together`` ended.
        """
        deadline = time.monotonic() + together

        def one(arguments: tuple[Any, ...]) -> Result | None:
            left = deadline - time.monotonic()
            if left <= 0:
                return None
            result = self.run(function, *arguments, seconds=min(seconds, left))
            return None if result.reason and time.monotonic() >= deadline else result

        pool = ThreadPoolExecutor(self._jobs)
        try:
            return list(pool.map(one, calls))
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _listen(
    receiver: Connection,
    process: BaseProcess,
    seconds: float,
    quiet: float,
    on_message: Send | None,
) -> Result:
    deadline = time.monotonic() + seconds
    while receiver.poll(max(0.0, min(quiet, deadline - time.monotonic()))):
        try:
            kind, value = receiver.recv()
        except EOFError:
            process.join()
            return Result(reason=f"its process ended with status {process.exitcode}")
        if kind == "returned":
            return Result(value)
        if kind == "raised":
            return Result(reason=value)
        if on_message is not None:
            on_message(value)
    return Result(reason=f"not done after {min(quiet, seconds):.3g} s")


def _call(sender: Connection, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    gc.freeze()  # PyTorch collects garbage before it records a graph; imports are none
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that started this one
    try:
        value = function(lambda message: sender.send(("message", message)), *arguments)
    except BaseException as error:
        sender.send(("raised", describe(error)))
    else:
        sender.send(("returned", value))
