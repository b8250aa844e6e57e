"""A step as training does it, and the check of what it computes against the definition."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.contenders import Contender
from benchmarks.peers import Loss
from benchmarks.race import Step
from benchmarks.workloads import Case, Pairs
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


def maps_of(pairs: Pairs) -> list[Tensor]:
    """All maps of a network, in order."""
    return [x for pair in pairs for x in pair]


def as_results(pairs: Pairs) -> Pairs:
    """The same maps as results of a layer that costs nothing: no copies, and no leaves.

    In training, a map is the result of a layer, and the layer takes the map's gradient as it is.
    A leaf keeps its gradient in ``.grad``, and PyTorch copies it there if its strides are not the
    leaf's. The naive op has one such gradient in each pair. With leaves it would pay for a copy
    that no training step makes.
    """
    return [(first.view_as(first), second.view_as(second)) for first, second in pairs]


def gradients_of(value: Tensor, pairs: Pairs, scale: float = 1.0) -> tuple[Tensor, ...]:
    """The gradients of ``scale`` times the loss by all maps, as the layers before would get them.

    They are the caller's alone: nothing is accumulated, and nothing is left behind.
    """
    factor = None if scale == 1 else torch.full_like(value, scale)
    return torch.autograd.grad(value, maps_of(pairs), factor)


def step_of(loss: Loss, student: Pairs, teacher: Pairs, training: bool = True) -> Step:
    """Forward and backward as a training loop calls them, or the loss alone as validation does."""
    scale = LOSS_SCALES.get(student[0][0].dtype, 1.0)
    maps = as_results(student)

    def train() -> None:
        gradients_of(loss(maps, teacher), maps, scale)

    def validate() -> None:
        with torch.no_grad():
            loss(maps, teacher)

    return train if training else validate


def evaluate(
    loss: Loss, student: Pairs, teacher: Pairs, scale: float = 1.0
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The loss and its scaled gradients by every student map, by the road that is timed."""
    maps = as_results(student)
    value = loss(maps, teacher)
    return value.detach(), gradients_of(value, maps, scale)


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


def hold(contender: Contender, errors: Mapping[str, float], dtype: torch.dtype, where: str) -> None:
    """Raise AssertionError where errors are larger than ``TOLERANCES`` allow."""
    row = TOLERANCES[dtype]
    allowed = row.ours if contender.ours else row.peers
    if not max(errors.values()) < allowed:
        raise AssertionError(
            f"{contender.name} is wrong on {where}: relative to float64 {errors}, allowed {allowed}"
        )


@contextmanager
def float32_products(precision: str) -> Iterator[None]:
    """Within, fp32 matrices are multiplied as ``torch.set_float32_matmul_precision`` has it."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


class Check:
    """The definition in float64 on a case's maps, to hold contenders to."""

    def __init__(self, case: Case, student: Pairs, teacher: Pairs):
        self._case, self._student, self._teacher = case, student, teacher
        self._dtype = student[0][0].dtype
        exact = in_float64(student), in_float64(teacher)
        self._truth = self._computed(reference.fsp_loss, *exact)

    def __call__(self, contender: Contender, loss: Loss) -> dict[str, float]:
        """Errors of loss and gradients; raises AssertionError where they are too large."""
        value, gradients = self._computed(loss, self._student, self._teacher)
        errors = {"loss_error": relative_error([value], [self._truth[0]])}
        if self._case.training:
            errors["gradient_error"] = relative_error(gradients, self._truth[1])
        hold(contender, errors, self._dtype, self._case.workload.name)
        return errors

    def _computed(
        self, loss: Loss, student: Pairs, teacher: Pairs
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        if self._case.training:
            return evaluate(loss, student, teacher, LOSS_SCALES.get(self._dtype, 1.0))
        with torch.no_grad():
            return loss(student, teacher), ()
