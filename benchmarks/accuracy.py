"""``python -m benchmarks.accuracy``: errors in fp32 as the student nears its teacher.

Distillation drives the two networks' maps together. The naive op subtracts two nearly equal FSP
matrices, so its gradient drowns in rounding just there. Ours subtracts the maps first.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

import fsp_kernels as fsp
from benchmarks import peers
from benchmarks.environment import commit, device_slug, machine
from benchmarks.measure import evaluate, in_float64, relative_error
from benchmarks.report import provenance
from benchmarks.tables import markdown_table, plain_table
from benchmarks.workloads import Pairs
from fsp_kernels import reference
from fsp_kernels.functional import run_loss

SHAPE = (32, 512, 7, 7)  # the last stage of a ResNet-18
NOISES = (1e-1, 1e-3, 1e-5)
TITLE = "Error near convergence, fp32"
LEGEND = (
    f"Both maps of the pair are {' x '.join(map(str, SHAPE))}; student = teacher + noise * normal. "
    "Relative error to float64 in the 2-norm: the worse of the two gradients, then the loss."
)

Evaluate = Callable[[Pairs, Pairs], tuple[Tensor, list[Tensor]]]


@dataclass(frozen=True)
class Error:
    """Relative errors to float64 of one way to compute, at one noise."""

    way: str
    noise: float
    gradient: float
    loss: float


def by_form(form: Literal["matrix", "gram"]) -> Evaluate:
    """Ours made to take one form, whichever the plan would choose for the shape."""

    def run(student: Pairs, teacher: Pairs) -> tuple[Tensor, list[Tensor]]:
        plan = fsp.explain(student, teacher)
        pairs = tuple(replace(p, form=form, residual="difference") for p in plan.pairs)
        maps = [x for s, t in zip(student, teacher, strict=True) for x in (*s, *t)]
        return run_loss(maps, replace(plan, pairs=pairs), [1.0] * len(pairs))

    return run


def by_autograd(loss: peers.Loss) -> Evaluate:
    """As a training loop does it."""
    return lambda student, teacher: evaluate(loss, student, teacher)


WAYS: dict[str, Evaluate] = {
    "einsum": by_autograd(peers.loss_over(peers.einsum_matrix)),
    "fsp_kernels, matrix form": by_form("matrix"),
    "fsp_kernels, gram form": by_form("gram"),
    "fsp_kernels, as planned": by_autograd(fsp.fsp_loss),
}


def nearby_maps(noise: float, shape: Sequence[int], seed: int = 0) -> tuple[Pairs, Pairs]:
    """``(student, teacher)``, one pair each; the student off by ``noise`` times normal noise."""
    generator = torch.Generator().manual_seed(seed)

    def noisy(x: Tensor) -> Tensor:
        return (x + noise * torch.randn(shape, generator=generator)).requires_grad_()

    first, second = (torch.randn(shape, generator=generator).relu_() for _ in range(2))
    return [(noisy(first), noisy(second))], [(first, second)]


def measure(noises: Sequence[float] = NOISES, shape: Sequence[int] = SHAPE) -> list[Error]:
    """Every way at every noise, on the same fp32 maps as the float64 oracle."""
    errors = []
    for noise in noises:
        student, teacher = nearby_maps(noise, shape)
        true_loss, true_gradients = evaluate(
            reference.fsp_loss, in_float64(student), in_float64(teacher)
        )
        for way, run in WAYS.items():
            loss, gradients = run(student, teacher)
            gradient_error = relative_error(gradients, true_gradients)
            errors.append(Error(way, noise, gradient_error, relative_error([loss], [true_loss])))
    return errors


def table_cells(errors: Sequence[Error]) -> tuple[list[str], list[list[str]]]:
    """Header and body: a line for each way, a column for each noise."""
    noises = list(dict.fromkeys(error.noise for error in errors))
    header = ["", *(f"gradient, noise {noise:g}" for noise in noises)]
    header += [f"loss, noise {noise:g}" for noise in noises]
    body = []
    for way in dict.fromkeys(error.way for error in errors):
        found = [error for error in errors if error.way == way]
        values = [error.gradient for error in found] + [error.loss for error in found]
        body.append([way, *(f"{value:.1e}" for value in values)])
    return header, body


def write(errors: Sequence[Error], folder: Path, command: str) -> None:
    """``accuracy.json`` and ``accuracy.md``, with what made them."""
    folder.mkdir(parents=True, exist_ok=True)
    content = {
        "machine_info": machine(),
        "commit_info": commit(),
        "command": command,
        "shape": SHAPE,
        "errors": [vars(error) for error in errors],
    }
    (folder / "accuracy.json").write_text(json.dumps(content, indent=2) + "\n")
    parts = [
        f"# {TITLE}",
        provenance(machine(), commit(), command),
        LEGEND,
        markdown_table(*table_cells(errors)),
    ]
    (folder / "accuracy.md").write_text("\n\n".join(parts) + "\n")


def main(arguments: Sequence[str]) -> None:
    """Measure, keep where asked, print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.accuracy", description=__doc__)
    parser.add_argument(
        "--output",
        type=Path,
        metavar="DIR",
        help="write accuracy.json and accuracy.md into DIR/<device>",
    )
    options = parser.parse_args(arguments)
    errors = measure()
    if options.output:
        command = shlex.join(["python", "-m", "benchmarks.accuracy", *arguments])
        write(errors, options.output / device_slug(), command)
    print(f"{TITLE}\n\n{textwrap.fill(LEGEND, 100)}\n\n{plain_table(*table_cells(errors))}")


if __name__ == "__main__":
    main(sys.argv[1:])
