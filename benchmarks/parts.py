"""Runs each part of ``python -m benchmarks`` in a process of its own."""

from __future__ import annotations

import importlib
import multiprocessing
from argparse import Namespace
from concurrent.futures import ProcessPoolExecutor

from benchmarks import environment, floor
from benchmarks.checks import Row

# The module of each part, imported only in the part's own process.
PARTS = {
    "loss": "benchmarks.bench_loss",
    "step": "benchmarks.bench_step",
    "scaling": "benchmarks.bench_scaling",
    "plan": "benchmarks.bench_plan",
    "accuracy": "benchmarks.accuracy",
}


def measure_part(part: str, options: Namespace) -> tuple[list[Row], Row]:
    """The rows of a part, and the machine they were measured on."""
    rows = importlib.import_module(PARTS[part]).measure_part(options)
    rates = [floor.with_final_rates(row, options.device) for row in rows]
    return rates, environment.machine(options.device)


def in_fresh_process(part: str, options: Namespace) -> tuple[list[Row], Row]:
    """``measure_part`` in a process of its own, so that a crash does not take other parts down."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(measure_part, part, options).result()
