"""A distillation step of stage 1, whole and piece by piece."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.checks import Row, Truth, as_results, gradients_of, maps_of, with_each
from benchmarks.measure import Rounds, without_garbage_collection
from benchmarks.workloads import Loss, Pairs
from fsp_kernels.features.taps import FeatureTaps

# The networks see the same batch in every step. A larger rate would train them, and later rounds
# would time other maps. The optimiser's work is the same at any rate.
LEARNING_RATE = 1e-12
MOMENTUM = 0.9
# Columns of results.csv.
SEGMENTS = ("teacher_forward", "student_forward", "fsp_loss", "student_backward", "optimiser")
# Steps that are timed in pieces. A few are enough to see what a step is made of.
SPLIT_STEPS = Rounds(most=10, least=3, seconds=2.0)

Mark = Callable[[], None]


class TappedNetwork:
    """A network that returns the maps of the modules at ``paths``, two by two."""

    def __init__(self, model: nn.Module, paths: Sequence[str]):
        self.model = model
        self._taps = FeatureTaps(model, paths).attach()

    def __call__(self, images: Tensor) -> Pairs:
        """The maps of a forward pass."""
        self.model(images)
        return self._taps.take_pairs()


class Distillation:
    """Stage 1 with one contender's loss, on networks of its own.

    ``autocast`` is the dtype that matrix products are cast to, ``None`` for none.
    """

    def __init__(
        self,
        teacher: TappedNetwork,
        student: TappedNetwork,
        images: Tensor,
        loss: Loss,
        autocast: torch.dtype | None = None,
    ):
        self.teacher, self.student = teacher.model.eval(), student.model.train()
        self._run_teacher, self._run_student = teacher, student
        self._images, self._loss, self._autocast = images, loss, autocast
        parameters = self.student.parameters()
        self._optimiser = torch.optim.SGD(parameters, LEARNING_RATE, momentum=MOMENTUM)

    def step(self) -> Tensor:
        """Take a training step, which leaves no gradient behind; returns its loss."""
        teacher = self.teacher_maps()
        loss = self.loss(self.student_maps(), teacher)
        loss.backward()
        self._update()
        return loss.detach()

    def split_step(self, mark: Mark) -> None:
        """The same step in the pieces of ``SEGMENTS``; ``mark`` is called around each of them."""
        mark()
        teacher = self.teacher_maps()
        mark()
        student = self.student_maps()
        cut = as_results(cut_off(student))
        mark()
        gradients = gradients_of(self.loss(cut, teacher), cut)
        mark()
        torch.autograd.backward(maps_of(student), gradients)
        mark()
        self._update()
        mark()

    def teacher_maps(self) -> Pairs:
        """The teacher's maps, without a graph."""
        with torch.no_grad(), self._precision():
            return self._run_teacher(self._images)

    def student_maps(self) -> Pairs:
        """The student's maps."""
        with self._precision():
            return self._run_student(self._images)

    def loss(self, student: Pairs, teacher: Pairs) -> Tensor:
        """The loss of these maps."""
        with self._precision():
            return self._loss(student, teacher)

    def _update(self) -> None:
        self._optimiser.step()
        self._optimiser.zero_grad()

    def _precision(self) -> AbstractContextManager[Any]:
        if self._autocast is None:
            return nullcontext()
        return torch.autocast(self._images.device.type, self._autocast)


def cut_off(pairs: Pairs) -> Pairs:
    """The same maps without the layers before them.

    A later map of a network depends on an earlier one. The loss's gradient by the earlier map must
    not include what comes back through the layers between them.
    """
    return with_each(pairs, lambda x: x.detach().requires_grad_())


def errors(distillation: Distillation) -> dict[str, float]:
    """Errors of the loss and its gradients by the maps, relative to the definition in float64."""
    student, teacher = cut_off(distillation.student_maps()), distillation.teacher_maps()
    return Truth(student, teacher).errors(distillation.loss)


def segment_seconds(split_step: Callable[[Mark], None], device: str) -> list[float]:
    """Seconds of each piece of one step; on a GPU by its own events."""
    if device == "cpu":
        times: list[float] = []
        split_step(lambda: times.append(time.perf_counter()))
        return [end - start for start, end in itertools.pairwise(times)]
    events: list[torch.cuda.Event] = []

    def mark() -> None:
        events.append(torch.cuda.Event(enable_timing=True))
        events[-1].record()

    split_step(mark)
    torch.cuda.synchronize()
    return [start.elapsed_time(end) / 1e3 for start, end in itertools.pairwise(events)]


def split_facts(distillation: Distillation, device: str) -> Row:
    """Median seconds of each piece of a step; a first step, which warms up, does not count."""
    with without_garbage_collection():
        distillation.split_step(lambda: None)
        runs = [segment_seconds(distillation.split_step, device)]
        for _ in range(SPLIT_STEPS.affordable(sum(runs[0])) - 1):
            runs.append(segment_seconds(distillation.split_step, device))
    medians = [statistics.median(seconds) for seconds in zip(*runs, strict=True)]
    return dict(zip(SEGMENTS, medians, strict=True))
