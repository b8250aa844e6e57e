"""The options that ``python -m benchmarks`` and ``pytest benchmarks/`` share."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Collection, Iterable
from typing import Any

import torch

from benchmarks import contenders, workloads
from benchmarks.contenders import Contender
from benchmarks.measure import Rounds

# The seconds are for all contenders of a case together.
ROUNDS = {"cpu": Rounds(30, 12, 8.0), "cuda": Rounds(15, 3, 2.0)}
QUICK_ROUNDS = {"cpu": Rounds(5, 3, 1.0), "cuda": Rounds(5, 3, 0.5)}
DEFAULT_DTYPES = {"cpu": ["fp32"], "cuda": ["fp32", "bf16"]}


def add_options(add: Callable[..., Any]) -> None:
    """Add the options by argparse's ``add_argument`` or by pytest's ``addoption``."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    add("--device", choices=list(ROUNDS), default=device, help=f"default here: {device}")
    dtypes = "; ".join(f"{' and '.join(names)} on {x}" for x, names in DEFAULT_DTYPES.items())
    for option, table, words in (
        ("--dtype", workloads.DTYPES, f"default: {dtypes}"),
        ("--layout", workloads.LAYOUTS, "memory format of the maps"),
        ("--pass", workloads.PASSES, "the loss alone, or with its gradients"),
        ("--workload", workloads.BY_NAME, "of the part loss"),
        ("--contender", contenders.BY_NAME, "default: all of the device"),
    ):
        dest = option.strip("-").replace("pass", "direction")
        words += "; can be repeated"
        add(option, action="append", choices=list(table), default=[], dest=dest, help=words)
    add("--quick", action="store_true", help="fewer cases and rounds, for a first impression")


def why_impossible(options: Namespace, timed: bool = True) -> str | None:
    """The reason why this machine cannot do what is asked for; ``None`` if it can."""
    if options.device == "cuda" and not torch.cuda.is_available():
        return "--device cuda: torch sees no GPU here"
    present = [contender.name for contender in contenders.on(options.device, timed)]
    if not set(options.contender) <= set(present):
        return f"--contender: on {options.device} there are {', '.join(present)}"
    return None


def in_order(asked: Collection[str], table: Iterable[str]) -> list[str]:
    """The names that are asked for, in the order of their table."""
    return [name for name in table if name in asked]


def chosen_contenders(
    options: Namespace, usual: Callable[[Contender], bool] = lambda _: True
) -> list[Contender]:
    """The contenders that are asked for, or else the usual ones of a part."""
    asked = options.contender
    return [
        contender
        for contender in contenders.on(options.device, timed=not asked)
        if (contender.name in asked if asked else usual(contender))
    ]


def chosen_dtypes(options: Namespace) -> list[str]:
    """The dtypes that are asked for, or else those of the device."""
    return in_order(options.dtype or DEFAULT_DTYPES[options.device], workloads.DTYPES)


def chosen_rounds(options: Namespace) -> Rounds:
    """The rounds that are asked for, or else as many as there is time for."""
    if options.rounds:
        return Rounds(options.rounds, options.rounds, 0.0)
    return (QUICK_ROUNDS if options.quick else ROUNDS)[options.device]
