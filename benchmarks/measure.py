"""Check every contender against the definition, then time them turn by turn."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from benchmarks.contenders import Contender
from benchmarks.peers import Loss
from benchmarks.workloads import Pairs, Workload, feature_maps
from fsp_kernels import reference

# A right fp32 sum over at most 16384 positions of maps that don't cancel errs by less than 1e-5
# of the whole; a wrong formula, window or weight errs by far more than this.
CHECK_TOLERANCE = 1e-4

Step = Callable[[], None]


@dataclass(frozen=True)
class Timing:
    """What one contender did on one workload; errors are relative to float64, in the 2-norm."""

    durations: list[float]  # seconds, in the order of the rounds
    loss_error: float
    gradient_error: float


def leaves(pairs: Pairs) -> list[Tensor]:
    """All maps of a network, in order."""
    return [x for pair in pairs for x in pair]


def gradient_step(loss: Loss, student: Pairs, teacher: Pairs) -> Step:
    """Forward and backward, as a training loop calls them."""

    def step() -> None:
        loss(student, teacher).backward()

    return step


def forget_gradients(student: Pairs) -> None:
    """As ``optimizer.zero_grad()`` does between steps."""
    for x in leaves(student):
        x.grad = None


def evaluate(loss: Loss, student: Pairs, teacher: Pairs) -> tuple[Tensor, list[Tensor]]:
    """The loss and its gradients by every student map; leaves no gradient behind."""
    value = loss(student, teacher)
    value.backward()
    gradients = [x.grad for x in leaves(student) if x.grad is not None]
    forget_gradients(student)
    return value.detach(), gradients


def in_float64(pairs: Pairs) -> Pairs:
    """Copies for the oracle, with gradients where the originals want them."""

    def copy(x: Tensor) -> Tensor:
        return x.detach().double().requires_grad_(x.requires_grad)

    return [(copy(first), copy(second)) for first, second in pairs]


def relative_error(values: Iterable[Tensor], truths: Iterable[Tensor]) -> float:
    """The largest ``|value - truth| / |truth|`` in the 2-norm; nan counts as infinitely wrong."""
    errors = [
        ((value.double() - truth).norm() / truth.norm()).item()
        for value, truth in zip(values, truths, strict=True)
    ]
    return max(float("inf") if error != error else error for error in errors)


def interleave(
    steps: Mapping[str, Step],
    rounds: int,
    max_rounds: Mapping[str, int],
    between: Step,
) -> dict[str, list[float]]:
    """Time all steps in every round, so that whatever slows the machine down slows them alike.

    The order rotates: no step always runs after the same neighbour, with its leftovers in cache.
    ``between`` runs before each step, untimed.
    """
    names = list(steps)
    durations: dict[str, list[float]] = {name: [] for name in names}
    was_collecting = gc.isenabled()
    gc.disable()
    try:
        for turn in range(rounds):
            shift = turn % len(names)
            for name in names[shift:] + names[:shift]:
                if turn >= max_rounds.get(name, rounds):
                    continue
                between()
                start = time.perf_counter()
                steps[name]()
                durations[name].append(time.perf_counter() - start)
    finally:
        if was_collecting:
            gc.enable()
    return durations


def time_workload(
    workload: Workload, contenders: Sequence[Contender], rounds: int
) -> dict[str, Timing]:
    """Time every contender that fits, all on the same tensors; the check is their warm-up."""
    student, teacher = feature_maps(workload, workload.cpu_batch)
    true_loss, true_gradients = evaluate(
        reference.fsp_loss, in_float64(student), in_float64(teacher)
    )
    fitting = [c for c in contenders if c.fits(workload, workload.cpu_batch)]
    losses = {c.name: c.build() for c in fitting}
    errors = {}
    for name, loss in losses.items():
        value, gradients = evaluate(loss, student, teacher)
        errors[name] = (
            relative_error([value], [true_loss]),
            relative_error(gradients, true_gradients),
        )
        if not max(errors[name]) < CHECK_TOLERANCE:
            raise AssertionError(
                f"{name} is wrong on {workload.name}: relative errors of loss and gradients to "
                f"float64 are {errors[name]}, allowed {CHECK_TOLERANCE}"
            )
    del true_gradients
    durations = interleave(
        {name: gradient_step(loss, student, teacher) for name, loss in losses.items()},
        rounds,
        {c.name: c.max_rounds for c in fitting if c.max_rounds is not None},
        between=lambda: forget_gradients(student),
    )
    return {name: Timing(durations[name], *errors[name]) for name in losses}
