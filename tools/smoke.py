"""``python -m tools.smoke --backend triton``: every kernel on small maps, for sanitizers.

Maps are made on the CPU and results judged there, so that little but our kernels runs on the GPU,
and what they read was written by a copy, which a sanitizer sees. One line a case; status 1 where a
value is not finite or further from the definition in float64 than rounding explains.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

import fsp_kernels as fsp
from benchmarks.checks import relative_error
from benchmarks.workloads import DTYPES
from fsp_kernels import reference
from fsp_kernels.backends import registered_backends

# Relative, in the 2-norm: rounding stays a tenth of these, a lost tile or term does not. Half
# precision rounds at each step of a double backward.
TOLERANCES = {"fp32": 1e-4, "bf16": 3e-2, "fp16": 1e-2}

Shape = tuple[int, ...]  # channels, then spatial sizes
Pair = tuple[Tensor, Tensor]
Entry = tuple[Tensor, ...]  # two maps, or a ready matrix alone
Op = Callable[..., Tensor]


@dataclass(frozen=True)
class Case:
    """One call of the loss, or of ``fsp_matrix`` with ``matrix``, and its derivatives.

    ``layout`` is ``"contiguous"``, ``"channels_last"``, ``"tokens"`` or ``"unaligned"``;
    ``teacher`` is ``"maps"``, ``"gradients"`` (maps that want some too) or ``"ready"`` (matrices);
    ``student`` is ``False`` where only the loss is wanted.
    """

    name: str
    pairs: tuple[tuple[Shape, Shape], ...]
    dtype: str = "fp32"
    norm: str = "frobenius"
    pool: str = "max"
    layout: str = "contiguous"
    teacher: str = "maps"
    student: bool = True
    matrix: bool = False
    batch: int = 2


def alike(channels: int, *size: int) -> tuple[tuple[Shape, Shape], ...]:
    """One pair of equal shapes."""
    return (((channels, *size), (channels, *size)),)


CASES = (
    # One pass, D in one program: in every dtype and norm.
    Case("one pass", alike(64, 8, 8)),
    Case("one pass bf16", alike(64, 8, 8), "bf16"),
    Case("one pass fp16", alike(64, 8, 8), "fp16"),
    Case("one pass, widest", alike(128, 28, 28), "bf16"),
    Case("ragged sizes", (((13, 7, 5), (37, 7, 5)),)),
    Case("ragged sizes bf16", (((13, 7, 5), (37, 7, 5)),), "bf16"),
    Case("one spatial axis", alike(24, 33), "bf16"),
    Case("three spatial axes", alike(24, 3, 4, 5)),
    Case("mse", alike(32, 8, 8), "bf16", norm="mse"),
    Case("column", alike(32, 8, 8), norm="column"),
    Case("column bf16, many channels", alike(160, 9, 9), "bf16", norm="column"),
    # Pooling, by an integer ratio and by a ragged one.
    Case("max pool 2", (((32, 16, 16), (48, 8, 8)),), "bf16"),
    Case("max pool 7/3", (((16, 7, 7), (24, 3, 3)),)),
    Case("avg pool 2", (((32, 16, 16), (48, 8, 8)),), pool="avg"),
    Case("avg pool 7/3", (((16, 3, 3), (24, 7, 7)),), "bf16", pool="avg"),
    # Who wants gradients.
    Case("ready teacher", alike(64, 8, 8), teacher="ready"),
    Case("ready teacher bf16, stored tiles", alike(256, 14, 14), "bf16", teacher="ready"),
    Case("teacher gradients", alike(64, 8, 8), teacher="gradients"),
    Case("teacher gradients fp16, Gram form", alike(256, 7, 7), "fp16", teacher="gradients"),
    Case("teacher gradients bf16, tiles", alike(256, 14, 14), "bf16", teacher="gradients"),
    Case("loss alone", alike(64, 8, 8), student=False),
    Case("loss alone bf16, Gram form", alike(256, 7, 7), "bf16", student=False),
    Case("loss alone, tiles", alike(256, 14, 14), student=False),
    # The other evaluations.
    Case("Gram form", alike(512, 7, 7)),
    Case("Gram form bf16", alike(512, 7, 7), "bf16"),
    Case("stored tiles", alike(256, 14, 14)),
    Case("stored tiles bf16", alike(256, 14, 14), "bf16"),
    Case("gradients by BLAS", alike(512, 16, 17), "bf16"),
    Case("split along positions", alike(256, 64, 64), batch=1),
    Case("split along positions bf16", alike(256, 64, 64), "bf16", batch=1),
    Case("all in one call", (*alike(16, 8, 8), *alike(256, 7, 7), *alike(256, 14, 14)), "bf16"),
    # Strides.
    Case("channels_last bf16", alike(64, 8, 8), "bf16", layout="channels_last"),
    Case("channels_last, Gram form", alike(256, 7, 7), layout="channels_last"),
    Case("tokens bf16", alike(192, 50), "bf16", layout="tokens"),
    Case("unaligned", alike(64, 7, 9), layout="unaligned"),
    Case("unaligned bf16", alike(64, 7, 9), "bf16", layout="unaligned"),
    Case("unaligned fp16, tiles", alike(256, 9, 15), "fp16", layout="unaligned"),
    # The matrix and its first and second derivatives.
    Case("matrix", alike(64, 8, 8), matrix=True),
    Case("matrix bf16, pooled", (((24, 16, 16), (40, 8, 8)),), "bf16", matrix=True),
    Case("matrix fp16, ragged", (((13, 7, 5), (37, 7, 5)),), "fp16", matrix=True),
    Case("matrix bf16, wide", alike(256, 14, 14), "bf16", matrix=True),
    Case("matrix, tokens", alike(96, 50), layout="tokens", matrix=True),
    Case("matrix bf16, unaligned", alike(64, 7, 9), "bf16", layout="unaligned", matrix=True),
)


def laid_out(shape: Shape, layout: str, generator: torch.Generator) -> Tensor:
    """Normal noise ``(B, C, *spatial)`` in fp32 with the strides of ``layout``."""
    batch, channels, *size = shape
    if layout == "tokens":  # (B, positions, channels) seen across its rows
        return torch.randn(batch, *size, channels, generator=generator).transpose(1, 2)
    x = torch.randn(shape, generator=generator)
    return x.to(memory_format=torch.channels_last) if layout == "channels_last" else x


def placed(x: Tensor, layout: str, device: str) -> Tensor:
    """A copy on the device with the same strides; ``"unaligned"`` one element off any boundary."""
    if layout != "unaligned":
        return x.to(device, copy=True)
    room = torch.zeros(x.numel() + 1, dtype=x.dtype)
    room[1:].view_as(x).copy_(x)
    return room.to(device)[1:].view_as(x)


def network(case: Case, seed: int) -> list[Pair]:
    """The maps of one network, on the CPU."""
    generator = torch.Generator().manual_seed(seed)

    def one(shape: Shape) -> Tensor:
        return laid_out((case.batch, *shape), case.layout, generator).to(DTYPES[case.dtype])

    return [(one(first), one(second)) for first, second in case.pairs]


def inputs(case: Case) -> tuple[list[Pair], list[Entry]]:
    """Student and teacher on the CPU, a ready matrix in place of each of the teacher's pairs."""
    student, teacher = network(case, 0), network(case, 1)
    if case.teacher != "ready":
        return student, list(teacher)
    return student, [(reference.fsp_matrix(*pair, pool=case.pool),) for pair in teacher]


def loss_results(case: Case, student: list[Pair], teacher: list[Entry], loss: Op) -> list[Tensor]:
    """Loss and gradients, these by way of a factor, so that they are scaled on their way."""
    wanted = [x for pair in student for x in pair] if case.student else []
    wanted += [x for entry in teacher for x in entry] if case.teacher == "gradients" else []
    for x in wanted:
        x.requires_grad_()
    entries = [entry if len(entry) == 2 else entry[0] for entry in teacher]
    value = loss(student, entries, pool=case.pool, norm=case.norm)
    if not wanted:
        return [value.detach()]
    scaled = value * 3
    kept = torch.autograd.grad(scaled, wanted, retain_graph=True)
    handed_out = torch.autograd.grad(scaled, wanted)  # scaled in place
    return [value.detach(), *kept, *handed_out]


def matrix_results(case: Case, student: list[Pair], matrix: Op) -> list[Tensor]:
    """The matrix, its gradients, and the gradients of their squares."""
    (maps,) = student
    for x in maps:
        x.requires_grad_()
    value = matrix(*maps, pool=case.pool)
    gradients = torch.autograd.grad(value.square().sum(), maps, create_graph=True)
    total = torch.stack([g.square().sum() for g in gradients]).sum()
    second = torch.autograd.grad(total, maps)
    return [x.detach() for x in (value, *gradients, *second)]


def results(
    case: Case, student: list[Pair], teacher: list[Entry], loss: Op, matrix: Op
) -> list[Tensor]:
    """What a case computes."""
    if case.matrix:
        return matrix_results(case, student, matrix)
    return loss_results(case, student, teacher, loss)


def error_of(case: Case, backend: str, device: str) -> float:
    """The largest relative error to float64 of all that a case computes."""
    student, teacher = inputs(case)

    def copies(entries: Sequence[Entry], copy: Callable[[Tensor], Tensor]) -> list:
        return [tuple(copy(x) for x in entry) for entry in entries]

    ours = tuple(partial(f, backend=backend, channel_dim=1) for f in (fsp.fsp_loss, fsp.fsp_matrix))
    to_device = partial(placed, layout=case.layout, device=device)
    found = results(case, copies(student, to_device), copies(teacher, to_device), *ours)
    definition = reference.fsp_loss, reference.fsp_matrix
    exact = results(
        case, copies(student, Tensor.double), copies(teacher, Tensor.double), *definition
    )
    return relative_error([x.cpu() for x in found], exact)


def run_cases(cases: Sequence[Case], backend: str, device: str) -> int:
    """Run cases, a line each; how many are wrong."""
    wrong = 0
    for case in cases:
        error, allowed = error_of(case, backend, device), TOLERANCES[case.dtype]
        wrong += error > allowed
        verdict = "ok" if error <= allowed else f"WRONG, allowed {allowed:.0e}"
        print(f"{case.name:36} {case.dtype}  error {error:.1e}  {verdict}", flush=True)
    print(f"{len(cases)} cases, {wrong} wrong", flush=True)
    return wrong


def run_side_by_side(backend: str, device: str, jobs: int) -> int:
    """Run all cases in as many processes; how many of these fail.

    Compiling the kernels takes nearly all of the time, and one core.
    """
    command = [sys.executable, "-m", "tools.smoke", "--backend", backend, "--device", device]
    processes = [
        subprocess.Popen([*command, "--share", f"{i}/{jobs}"], stdout=subprocess.PIPE, text=True)
        for i in range(1, jobs + 1)
    ]
    failed = 0
    for process in processes:
        print(process.communicate()[0], end="", flush=True)
        failed += process.returncode != 0
    return failed


def share(text: str) -> tuple[int, int]:
    """``"2/4"``: the second of four."""
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if match is None or not 1 <= int(match[1]) <= int(match[2]):
        raise argparse.ArgumentTypeError(f"{text!r}, must be like 2/4: the second of four")
    return int(match[1]), int(match[2])


def main(arguments: Sequence[str] | None = None) -> int:
    """Run every case, or a share of them."""
    parser = argparse.ArgumentParser(prog="python -m tools.smoke", description=__doc__)
    parser.add_argument("--backend", required=True, choices=registered_backends())
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--share", type=share, default=(1, 1), help="2/4: every fourth case")
    parser.add_argument("--jobs", type=int, default=1, help="processes, each with a share")
    options = parser.parse_args(arguments)
    if options.jobs > 1:
        return 1 if run_side_by_side(options.backend, options.device, options.jobs) else 0
    first, every = options.share
    return 1 if run_cases(CASES[first - 1 :: every], options.backend, options.device) else 0


if __name__ == "__main__":
    sys.exit(main())
