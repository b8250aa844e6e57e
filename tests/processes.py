"""Processes for tests that end them, or that need several: they start with all imports done."""

from __future__ import annotations

import gc
import multiprocessing
import os
import socket
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

# Forked from a server that has imported this, and has no threads yet that a fork would lose.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["fsp_kernels.distill.commands"])


def start(function: Callable[..., Any], *arguments: Any) -> BaseProcess:
    process = CONTEXT.Process(target=function, args=arguments)
    process.start()
    return process


def start_cli(
    arguments: Sequence[object], log: Path, environment: Mapping[str, str] | None = None
) -> BaseProcess:
    """``fsp-distill ARGUMENTS``, what it prints added to ``log``."""
    return start(run_cli, [str(argument) for argument in arguments], log, environment or {})


def environments(count: int) -> list[dict[str, str]]:
    """What a launcher tells each of ``count`` processes on the CPU that are one group."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    common = {
        "WORLD_SIZE": count,
        "LOCAL_WORLD_SIZE": count,
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": port,
        "OMP_NUM_THREADS": 1,
    } | without_gpus()
    return [
        {name: str(value) for name, value in (common | {"RANK": rank, "LOCAL_RANK": rank}).items()}
        for rank in range(count)
    ]


def without_gpus() -> dict[str, str]:
    """Variables for a process that is to train on the CPU; none where it would anyway."""
    import torch

    return {"CUDA_VISIBLE_DEVICES": ""} if torch.cuda.is_available() else {}


def run_group(count: int, function: Callable[..., Any], *arguments: Any) -> None:
    """``function(RANK, *arguments)`` in ``count`` processes that are one gloo group."""
    group = [
        start(_member, environment, rank, function, arguments)
        for rank, environment in enumerate(environments(count))
    ]
    finish(group)
    assert [process.exitcode for process in group] == [0] * count


def finish(group: Sequence[BaseProcess], seconds: float = 300) -> None:
    """Wait for all to end; those that don't are killed."""
    deadline = time.monotonic() + seconds
    for process in group:
        process.join(max(0.0, deadline - time.monotonic()))
    for process in group:
        process.kill()
        process.join()


def run_cli(arguments: list[str], log: Path, environment: Mapping[str, str]) -> None:
    os.environ.update(environment)
    gc.freeze()  # collections pass over what was imported
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    from fsp_kernels.distill.cli import main

    sys.argv = ["fsp-distill", *arguments]
    main()


def _member(
    environment: Mapping[str, str],
    rank: int,
    function: Callable[..., Any],
    arguments: Sequence[Any],
) -> None:
    import torch
    import torch.distributed as dist

    os.environ.update(environment)
    gc.freeze()
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    function(rank, *arguments)
    dist.destroy_process_group()
