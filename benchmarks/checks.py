"""The step that is timed, as training runs it, and its check against the definition in float64."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.contenders import Contender
from benchmarks.workloads import Loss, Pairs
from fsp_kernels import reference

Step = Callable[[], object]
Row = dict[str, Any]  # a row of results.csv, or a part of one


class Prepared(NamedTuple):
    """A contender that is ready to be timed.

    ``steps`` hold one step for each copy of the inputs: several copies on a GPU, where steps take
    turns so that no input is still in the cache, and one on a CPU. A step leaves no gradient
    behind. ``facts`` are recorded beside the times.
    """

    steps: Sequence[Step]
    facts: Row


class Tolerance(NamedTuple):
    """The largest allowed error relative to float64, in the 2-norm."""

    ours: float
    peers: float


# fp32: a right sum over at most 16384 positions of maps that don't cancel errs by less than 1e-5 of
# the whole. A wrong formula, window or weight errs by far more than the 1e-4 allowed.
# Half precision: ours rounds the residual and the gradient once each, together below two units of
# 2^-8. The peers round both FSP matrices before they subtract them. Independent maps after a ReLU
# have matrices near 0.16 that differ by 0.7 / sqrt(K), so at K = 16384 the rounding of bf16 is a
# tenth of what is left. The peers cannot avoid that loss, and it is recorded with each result. The
# check in fp32 shows that they compute the right thing; this one shows that nothing broke.
TOLERANCES = {
    torch.float32: Tolerance(1e-4, 1e-4),
    torch.bfloat16: Tolerance(1e-2, 0.25),
    torch.float16: Tolerance(1e-2, 0.25),
}
# Training in fp16 scales the loss. Without it, gradients of about 1 / (B K) would be rounded to
# subnormal numbers or zero.
LOSS_SCALES = {torch.float16: 8192.0}


def maps_of(pairs: Pairs) -> list[Tensor]:
    """All maps of a network, in order. A map that is in several places counts once."""
    return list({id(x): x for pair in pairs for x in pair}.values())


def with_each(pairs: Pairs, function: Callable[[Tensor], Tensor]) -> Pairs:
    """The pairs with ``function(x)`` in place of every map ``x``, called once for each map."""
    found = {id(x): function(x) for x in maps_of(pairs)}
    return [(found[id(first)], found[id(second)]) for first, second in pairs]


def as_results(pairs: Pairs) -> Pairs:
    """The same maps as results of a layer that costs nothing: no copies, and no leaves.

    In training, a map is the result of a layer, and the layer takes the map's gradient as it is.
    A leaf keeps its gradient in ``.grad``, and PyTorch copies it there if its strides are not the
    leaf's. The naive op has one such gradient in each pair. With leaves it would pay for a copy
    that no training step makes.
    """
    return with_each(pairs, lambda x: x.view_as(x))


def gradients_of(value: Tensor, pairs: Pairs, scale: float = 1.0) -> tuple[Tensor, ...]:
    """The gradients of ``scale`` times the loss by all maps, without accumulating any of them."""
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
    """The loss and its scaled gradients by every student map, computed as the timed step does."""
    maps = as_results(student)
    value = loss(maps, teacher)
    return value.detach(), gradients_of(value, maps, scale)


def in_float64(pairs: Pairs) -> Pairs:
    """Copies in float64, which require gradients where the originals do."""

    def copy(x: Tensor) -> Tensor:
        return x.detach().double().requires_grad_(x.requires_grad)

    return with_each(pairs, copy)


def relative_error(values: Iterable[Tensor], truths: Iterable[Tensor]) -> float:
    """The largest ``|value - truth| / |truth|`` in the 2-norm; NaN counts as infinite."""
    errors = [
        ((value.double() - truth).norm() / truth.norm()).item()
        for value, truth in zip(values, truths, strict=True)
    ]
    return max(float("inf") if error != error else error for error in errors)


class Truth:
    """Loss and gradients of given maps by the definition in float64.

    They are computed from the maps as rounded to their dtype, so rounding the maps is no error.
    Without ``training`` there are no gradients. ``definition`` is the loss, with masks if the loss
    has any.
    """

    def __init__(
        self,
        student: Pairs,
        teacher: Pairs,
        training: bool = True,
        definition: Loss = reference.fsp_loss,
    ):
        self.student, self.teacher, self._training = student, teacher, training
        self._scale = LOSS_SCALES.get(student[0][0].dtype, 1.0)
        exact = in_float64(student), in_float64(teacher)
        self.loss, self.gradients = self._evaluate(definition, *exact)

    def errors(self, loss: Loss) -> dict[str, float]:
        """Relative errors in the 2-norm; ``gradient_error`` is that of the worst gradient."""
        value, gradients = self._evaluate(loss, self.student, self.teacher)
        errors = {"loss_error": relative_error([value], [self.loss])}
        if self._training:
            errors["gradient_error"] = relative_error(gradients, self.gradients)
        return errors

    def _evaluate(
        self, loss: Loss, student: Pairs, teacher: Pairs
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        if self._training:
            return evaluate(loss, student, teacher, self._scale)
        with torch.no_grad():
            return loss(student, teacher), ()


def require_small(
    contender: Contender, errors: Mapping[str, float], dtype: torch.dtype, where: str
) -> None:
    """Raise AssertionError where an error is larger than ``TOLERANCES`` allow."""
    row = TOLERANCES[dtype]
    allowed = row.ours if contender.ours else row.peers
    if not max(errors.values()) < allowed:
        raise AssertionError(
            f"{contender.name} is wrong on {where}: relative to float64 {errors}, allowed {allowed}"
        )


@contextmanager
def float32_products(precision: str) -> Iterator[None]:
    """Set ``torch.set_float32_matmul_precision`` within the block."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
