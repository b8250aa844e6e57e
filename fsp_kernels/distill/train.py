"""Training one network: the teacher, stage 1 (the FSP loss alone), stage 2 (the task loss)."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor, nn
from torch.optim.lr_scheduler import MultiStepLR
from torch.utils.data import DataLoader

from fsp_kernels import fsp_loss, fsp_matrix
from fsp_kernels.distill.config import Config, Network, Training
from fsp_kernels.distill.data import Split, Splits, endless, shuffled_batches
from fsp_kernels.distill.errors import DistillError
from fsp_kernels.distill.models import CifarResNet
from fsp_kernels.distill.monitor import Monitor, Watch
from fsp_kernels.distill.taps import FeatureTaps

Objective = Callable[[Tensor, Tensor], Tensor]
"""Images (B, C, H, W) and labels (B,) to the scalar to minimise."""

_EVALUATION_BATCH = 512


@dataclass(frozen=True)
class Phase:
    """What one run of the optimiser left behind.

    ``history`` has a row per evaluation: ``step``, the evaluated figures and, but for step 0, the
    mean ``train_loss`` of the steps since the row before. ``seconds`` excludes evaluations.
    """

    history: list[dict[str, float]]
    seconds: float


def tapped_pairs(
    model: nn.Module, paths: Sequence[tuple[str, str]], images: Tensor
) -> list[tuple[Tensor, Tensor]]:
    """Run ``model`` on ``images``; the ``(first, second)`` feature maps named by ``paths``."""
    with FeatureTaps(model, [path for pair in paths for path in pair]) as taps:
        model(images)
        maps = taps.take()
    return list(zip(maps[::2], maps[1::2], strict=True))


def as_in_stage1(student: nn.Module) -> nn.Module:
    """A copy to measure feature maps on as stage 1 sees them: normalised by the batch's statistics.

    Running statistics lag while stage 1 multiplies the scale of the maps, and are those of no
    training at all before it; a copy, because a forward pass in training mode would change them.
    """
    return copy.deepcopy(student).train()


class Trainer:
    """A recipe, its data and the device, ready to train networks.

    Everything random is drawn from the seeds given to the methods: the same seed on the same
    machine, with the same number of threads, gives the same weights bit for bit.
    """

    def __init__(self, config: Config, splits: Splits, monitor: Monitor) -> None:
        self.config, self.splits, self.monitor = config, splits, monitor
        self.accelerator = Accelerator()
        self.student_paths = [pair.student for pair in config.pairs]
        self.teacher_paths = [pair.teacher for pair in config.pairs]
        torch.set_num_threads(config.threads)

    def new_network(self, network: Network, seed: int) -> nn.Module:
        """A freshly initialised network on the device."""
        self.accelerator.free_memory()  # it holds on to every model and optimiser it prepared
        set_seed(seed)
        channels = self.splits.train.images.shape[1]
        model = CifarResNet(network.depth, network.width, channels, self.splits.classes)
        return self.accelerator.prepare(model)

    def task(
        self, model: nn.Module, training: Training, images: Split, seed: int, label: tuple[str, str]
    ) -> Phase:
        """Minimise the cross-entropy: stage 2, and all training of a teacher or a baseline.

        Args:
            model: from ``new_network``, or what ``stage1`` made of it.
            training: its optimiser and schedule.
            images: which to train on.
            seed: of their order.
            label: the network's name and the phase's, for the progress bar and TensorBoard.
        """

        def objective(images: Tensor, labels: Tensor) -> Tensor:
            return F.cross_entropy(model(images), labels)

        def evaluate() -> dict[str, float]:
            return self.evaluate_task(model)

        loader = shuffled_batches(images, self.config.data.batch_size, seed)
        return self._optimise(model, objective, evaluate, training, loader, label)

    def stage1(self, student: nn.Module, teacher: nn.Module, seed: int, run: str) -> Phase:
        """Minimise the FSP loss over the student's weights; the teacher is only read."""
        teacher.eval()
        weights = [pair.weight for pair in self.config.pairs]

        def objective(images: Tensor, _labels: Tensor) -> Tensor:
            with torch.no_grad():
                target = tapped_pairs(teacher, self.teacher_paths, images)
            maps = tapped_pairs(student, self.student_paths, images)
            return fsp_loss(maps, target, weights=weights)

        # The teacher stands still, so what it says of the evaluation split is worked out once.
        targets = [self.fsp_matrices(teacher, "teacher", x) for x, _ in self.evaluation_batches()]

        def evaluate() -> dict[str, float]:
            measured, total = as_in_stage1(student), 0.0
            for (images, _), target in zip(self.evaluation_batches(), targets, strict=True):
                maps = tapped_pairs(measured, self.student_paths, images)
                total += fsp_loss(maps, target, weights=weights).item() * len(images)
            return {"fsp_loss": total / len(self.evaluation_split.labels)}

        loader = shuffled_batches(self.splits.train, self.config.data.batch_size, seed)
        training = self.config.stage1
        return self._optimise(student, objective, evaluate, training, loader, (run, "stage 1"))

    @torch.no_grad()
    def fsp_matrices(self, model: nn.Module, role: str, images: Tensor) -> list[Tensor]:
        """The FSP matrices (B, m, n) of the recipe's pairs; ``role`` is "student" or "teacher"."""
        paths = self.student_paths if role == "student" else self.teacher_paths
        return [fsp_matrix(*maps) for maps in tapped_pairs(model, paths, images)]

    @property
    def evaluation_split(self) -> Split:
        """The split the recipe quotes."""
        return getattr(self.splits, self.config.evaluation.split)

    def evaluation_batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The evaluation split on the device, piece by piece."""
        device = self.accelerator.device
        pieces = (part.split(_EVALUATION_BATCH) for part in self.evaluation_split)
        for images, labels in zip(*pieces, strict=True):
            yield images.to(device), labels.to(device)

    def evaluate_task(self, model: nn.Module) -> dict[str, float]:
        """``accuracy`` (0 to 1) and mean cross-entropy ``loss`` of ``model``, as it stands."""
        right, loss = 0, 0.0
        for images, labels in self.evaluation_batches():
            logits = model(images)
            right += int((logits.argmax(1) == labels).sum())
            loss += F.cross_entropy(logits, labels, reduction="sum").item()
        count = len(self.evaluation_split.labels)
        return {"accuracy": right / count, "loss": loss / count}

    def _optimise(
        self,
        model: nn.Module,
        objective: Objective,
        evaluate: Callable[[], dict[str, float]],
        training: Training,
        loader: DataLoader,
        label: tuple[str, str],
    ) -> Phase:
        optimiser, scheduler = _sgd(model, training)
        optimiser, scheduler, loader = self.accelerator.prepare(optimiser, scheduler, loader)
        batches = endless(loader)
        with self.monitor.watch(*label, training.steps) as watch:
            recorder = _Recorder(model, evaluate, watch, label)
            recorder.evaluate(0)
            for step in range(1, training.steps + 1):
                loss = objective(*next(batches))
                self.accelerator.backward(loss)
                optimiser.step()
                scheduler.step()
                optimiser.zero_grad()
                recorder.add(loss)
                if step % self.config.evaluation.every == 0 or step == training.steps:
                    recorder.evaluate(step)
        return Phase(recorder.history, recorder.seconds)


class _Recorder:
    """Keeps a phase's history and its clock, which stands still during evaluations."""

    def __init__(
        self,
        model: nn.Module,
        evaluate: Callable[[], dict[str, float]],
        watch: Watch,
        label: tuple[str, str],
    ) -> None:
        self.history: list[dict[str, float]] = []
        self.seconds = 0.0
        self._model, self._evaluate, self._watch, self._label = model, evaluate, watch, label
        self._sum: Tensor | float = 0.0
        self._last_step = 0
        self._started = time.perf_counter()

    def add(self, loss: Tensor) -> None:
        # Stays on the device: reading it here would make every step wait for the last one.
        self._sum = self._sum + loss.detach()
        self._watch.step()

    def evaluate(self, step: int) -> None:
        self.seconds += time.perf_counter() - self._started
        row: dict[str, float] = {"step": step}
        if step:
            row["train_loss"] = float(self._sum) / (step - self._last_step)
            self._check_finite(row["train_loss"], step)
        self._model.eval()
        with torch.no_grad():
            row |= self._evaluate()
        self.history.append(row)
        self._watch.log(step, row)
        self._model.train()
        self._sum, self._last_step, self._started = 0.0, step, time.perf_counter()

    def _check_finite(self, train_loss: float, step: int) -> None:
        if not math.isfinite(train_loss):
            run, phase = self._label
            raise DistillError(
                f"{run}, {phase}: the training loss is {train_loss} by step {step}; "
                f"try a smaller learning rate"
            )


def _sgd(model: nn.Module, training: Training) -> tuple[torch.optim.SGD, MultiStepLR]:
    optimiser = torch.optim.SGD(
        model.parameters(),
        lr=training.learning_rate,
        momentum=training.momentum,
        weight_decay=training.weight_decay,
    )
    milestones = [round(share * training.steps) for share in training.milestones]
    return optimiser, MultiStepLR(optimiser, milestones, gamma=training.decay)
