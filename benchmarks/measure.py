"""Check every contender against the definition, then time them turn by turn."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.contenders import Contender
from benchmarks.peers import Loss
from benchmarks.workloads import Pairs, Workload, feature_maps
from fsp_kernels import reference


class Tolerance(NamedTuple):
    """The largest relative error to float64, in the 2-norm, with which one is still timed."""

    ours: float
    peers: float


# fp32: a right sum over at most 16384 positions of maps that don't cancel errs by less than 1e-5 of
# the whole; a wrong formula, window or weight errs by far more than the 1e-4 allowed.
# Half: ours rounds the residual and the gradient once each, together below two units of 2^-8. The
# peers round both FSP matrices before they subtract them. Independent maps after a ReLU have
# matrices near 0.16 that differ by 0.7 / sqrt(K), so at K = 16384 the rounding of bf16 is a tenth
# of what is left. That loss is theirs by construction and recorded with each result. Whether they
# compute the right thing is for the check in fp32 to show, this one shows that nothing broke.
TOLERANCES = {
    torch.float32: Tolerance(1e-4, 1e-4),
    torch.bfloat16: Tolerance(1e-2, 0.25),
    torch.float16: Tolerance(1e-2, 0.25),
}
# Training in fp16 scales the loss, or gradients of about 1 / (B K) drown among subnormal numbers.
LOSS_SCALES = {torch.float16: 8192.0}

Step = Callable[[], None]


@dataclass(frozen=True)
class Timing:
    """What one contender did on one workload; errors are relative to float64, in the 2-norm."""

    durations: list[float]  # seconds, in the order of the rounds
    loss_error: float
    gradient_error: float

    def facts(self) -> dict[str, Any]:
        """What is recorded beside the durations."""
        return {"loss_error": self.loss_error, "gradient_error": self.gradient_error}


def leaves(pairs: Pairs) -> list[Tensor]:
    """All maps of a network, in order."""
    return [x for pair in pairs for x in pair]


def backward(value: Tensor, scale: float) -> None:
    """``scale`` times the loss, differentiated; as everyone does it where it is 1."""
    value.backward(None if scale == 1 else torch.full_like(value, scale))


def gradient_step(loss: Loss, student: Pairs, teacher: Pairs) -> Step:
    """Forward and backward, as a training loop calls them."""
    scale = LOSS_SCALES.get(student[0][0].dtype, 1.0)

    def step() -> None:
        backward(loss(student, teacher), scale)

    return step


def forget_gradients(student: Pairs) -> None:
    """As ``optimizer.zero_grad()`` does between steps."""
    for x in leaves(student):
        x.grad = None


def evaluate(
    loss: Loss, student: Pairs, teacher: Pairs, scale: float = 1.0
) -> tuple[Tensor, list[Tensor]]:
    """The loss and its scaled gradients by every student map; leaves no gradient behind."""
    value = loss(student, teacher)
    backward(value, scale)
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


class Check:
    """The definition in float64 on one workload's maps, to hold contenders to."""

    def __init__(self, workload: Workload, student: Pairs, teacher: Pairs):
        self._workload, self._student, self._teacher = workload, student, teacher
        self._dtype = student[0][0].dtype
        self._scale = LOSS_SCALES.get(self._dtype, 1.0)
        self._truth = evaluate(
            reference.fsp_loss, in_float64(student), in_float64(teacher), self._scale
        )

    def __call__(self, contender: Contender, loss: Loss) -> tuple[float, float]:
        """Errors of loss and gradients; raises AssertionError where they are too large."""
        value, gradients = evaluate(loss, self._student, self._teacher, self._scale)
        errors = (
            relative_error([value], [self._truth[0]]),
            relative_error(gradients, self._truth[1]),
        )
        row = TOLERANCES[self._dtype]
        allowed = row.ours if contender.ours else row.peers
        if not max(errors) < allowed:
            raise AssertionError(
                f"{contender.name} is wrong on {self._workload.name}: relative errors of loss and "
                f"gradients to float64 are {errors}, allowed {allowed}"
            )
        return errors


@contextmanager
def without_garbage_collection() -> Iterator[None]:
    """A collection would fall on whoever happens to be timed."""
    was_collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_collecting:
            gc.enable()


def turns(names: Sequence[str], rounds: int, max_rounds: Mapping[str, int]) -> Iterator[str]:
    """Every name in every round, so that whatever slows the machine down slows all alike.

    The order rotates: no one always runs after the same neighbour, with its leftovers in cache.
    """
    for turn in range(rounds if names else 0):
        shift = turn % len(names)
        for name in (*names[shift:], *names[:shift]):
            if turn < max_rounds.get(name, rounds):
                yield name


def interleave(
    steps: Mapping[str, Step],
    rounds: int,
    max_rounds: Mapping[str, int],
    between: Step,
) -> dict[str, list[float]]:
    """Time all steps in turns; ``between`` runs before each step, untimed."""
    durations: dict[str, list[float]] = {name: [] for name in steps}
    with without_garbage_collection():
        for name in turns(list(steps), rounds, max_rounds):
            between()
            start = time.perf_counter()
            steps[name]()
            durations[name].append(time.perf_counter() - start)
    return durations


def time_workload(
    workload: Workload,
    contenders: Sequence[Contender],
    rounds: int,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Timing]:
    """Time every contender that fits, all on the same tensors; the check is their warm-up."""
    student, teacher = feature_maps(workload, workload.cpu_batch, dtype)
    fitting = [c for c in contenders if c.fits(workload, workload.cpu_batch)]
    losses = {c.name: c.build() for c in fitting}
    check = Check(workload, student, teacher)
    errors = {c.name: check(c, losses[c.name]) for c in fitting}
    del check
    durations = interleave(
        {name: gradient_step(loss, student, teacher) for name, loss in losses.items()},
        rounds,
        {c.name: c.max_rounds for c in fitting if c.max_rounds is not None},
        between=lambda: forget_gradients(student),
    )
    return {name: Timing(durations[name], *errors[name]) for name in losses}
