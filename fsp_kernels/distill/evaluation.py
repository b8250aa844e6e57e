"""What a network is worth: its accuracy, and how far its FSP matrices are from a teacher's."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fsp_kernels import fsp_matrix
from fsp_kernels.distill.arms import Stage
from fsp_kernels.distill.config import Config
from fsp_kernels.distill.data import Batch, EvaluationBatches, Split, Splits
from fsp_kernels.distill.job import Setup
from fsp_kernels.distill.objective import Objective, Targets
from fsp_kernels.distill.pairs import Maps
from fsp_kernels.distill.teacher import LiveTeacher

_MATRIX_BYTES = 256 << 20
_BATCH = 512
Matrices = list[Tensor]
Figures = dict[str, float]


def on_device(
    batches: Iterable[Batch], device: torch.device, config: Config
) -> Generator[Batch, None, None]:
    """The same batches with images (B, C, H, W) and labels (B,) where the networks are."""
    layout = torch.channels_last if config.execution.channels_last else torch.contiguous_format
    for batch in batches:
        images = batch.images.to(device, memory_format=layout, non_blocking=True)
        yield Batch(images, batch.labels.to(device, non_blocking=True), batch.indices)


def _unless_stopped(batches: Iterable[Batch], setup: Setup) -> Iterator[Batch]:
    """The batches on the device; a signal ends them, for a large split takes longer than is waited.

    But not where there are several processes, which might be told at different batches.
    """
    for batch in on_device(batches, setup.accelerator.device, setup.config):
        if setup.accelerator.num_processes == 1:
            setup.interruption.check()
        yield batch


@contextmanager
def by_batch_statistics(network: nn.Module) -> Iterator[None]:
    """In training mode, as stage 1 sees the student, and afterwards as if it had never been.

    Running statistics lag while stage 1 multiplies the scale of the maps, and are those of no
    training at all before it.
    """
    modes = [(module, module.training) for module in network.modules()]
    kept = [(buffer, buffer.clone()) for buffer in network.buffers()]
    network.train()
    try:
        with torch.no_grad():
            yield
    finally:
        with torch.no_grad():
            for buffer, value in kept:
                buffer.copy_(value)
        for module, training in modes:
            module.training = training


class TaskEvaluation:
    """Accuracy and cross-entropy on a split, which the processes share out."""

    def __init__(self, split: Split, setup: Setup) -> None:
        accelerator = setup.accelerator
        self._images, self._setup = len(split), setup
        self.batches = EvaluationBatches(
            split,
            batch_size=_BATCH,
            process=accelerator.process_index,
            processes=accelerator.num_processes,
            workers=setup.config.data.workers,
        )

    @torch.no_grad()
    def __call__(self, network: nn.Module) -> Figures:
        """``accuracy`` (0 to 1) and mean cross-entropy ``loss`` of ``network`` as it stands."""
        accelerator = self._setup.accelerator
        right, loss = 0, 0.0
        for batch in _unless_stopped(self.batches, self._setup):
            with accelerator.autocast():
                logits = network(batch.images).float()
            right += int((logits.argmax(1) == batch.labels).sum())
            loss += F.cross_entropy(logits, batch.labels, reduction="sum").item()
        if accelerator.num_processes > 1:
            sums = torch.tensor([right, loss], dtype=torch.float64, device=accelerator.device)
            right, loss = accelerator.reduce(sums).tolist()
        return {"accuracy": right / self._images, "loss": loss / self._images}


class FspEvaluation:
    """FSP loss and mean FSP matrices on a split, by each batch's own statistics.

    The teacher stands still, so what it says of the split is worked out once, for as many of the
    split's images as have matrices that fit 256 MiB. Every process evaluates all of them.
    """

    def __init__(self, teacher: LiveTeacher, split: Split, setup: Setup) -> None:
        self._setup = setup
        self.batches = EvaluationBatches(split, limit=1)
        [one] = self._of_teacher(teacher)
        bytes_each = sum(matrix.nbytes for matrix in one)
        limit = min(len(split), max(2, _MATRIX_BYTES // bytes_each))
        # Batch normalisation has no statistics of a single image whose map is 1 x 1.
        limit -= limit % _BATCH == 1
        workers = setup.config.data.workers
        self.batches = EvaluationBatches(split, batch_size=_BATCH, workers=workers, limit=limit)
        self._targets = list(self._of_teacher(teacher))

    @property
    def teacher_matrices(self) -> Matrices:
        """Each pair's FSP matrix (m, n), averaged over the images."""
        return _mean(self._targets)

    def __call__(self, objective: Objective) -> Figures:
        """``fsp_loss``, weighted and summed over the pairs, and ``fsp_loss/INDEX`` of each."""
        sums, count = [0.0] * len(objective.weights), 0
        for maps, targets in zip(self._of_student(objective), self._targets, strict=True):
            size = len(targets[0])
            losses = objective.fsp_losses(maps, Targets(targets))
            sums = [total + loss.item() * size for total, loss in zip(sums, losses, strict=True)]
            count += size
        each = [total / count for total in sums]
        return {"fsp_loss": sum(each)} | {f"fsp_loss/{i}": value for i, value in enumerate(each)}

    def matrices(self, objective: Objective) -> Matrices:
        """Each pair's FSP matrix (m, n) of the student, projected where stage 1 does so."""
        pool, project = self._setup.config.fsp.pool, objective.projection or (lambda maps: maps)
        return _mean(
            [fsp_matrix(*pair, pool=pool, channel_dim=1).float() for pair in project(maps)]
            for maps in self._of_student(objective)
        )

    def _of_teacher(self, teacher: LiveTeacher) -> Iterator[Matrices]:
        for batch in _unless_stopped(self.batches, self._setup):
            yield teacher.matrices(batch.images, self._setup.config.fsp.pool)[0]

    def _of_student(self, objective: Objective) -> Iterator[Sequence[Maps]]:
        with by_batch_statistics(objective.student.network):
            for batch in _unless_stopped(self.batches, self._setup):
                with self._setup.accelerator.autocast():
                    _, maps = objective.student.uncompiled(batch.images)
                    yield maps


def _mean(batches: Iterator[Matrices] | Sequence[Matrices]) -> Matrices:
    return [torch.cat(pair).mean(0).cpu() for pair in zip(*batches, strict=True)]


class Evaluations:
    """All that is measured of a network: on the split that is quoted and, for a stopping rule, on
    the validation split, which must be there then.
    """

    def __init__(self, splits: Splits, setup: Setup, teacher: LiveTeacher | None = None) -> None:
        self._splits, self._setup, self._teacher = splits, setup, teacher
        self._tasks: dict[str, TaskEvaluation] = {}
        self._fsps: dict[str, FspEvaluation] = {}

    def task(self, split: str | None = None) -> TaskEvaluation:
        """Of the quoted split, or of another."""
        name = split or self._setup.config.evaluation.split
        if name not in self._tasks:
            self._tasks[name] = TaskEvaluation(self._of(name), self._setup)
        return self._tasks[name]

    def fsp(self, split: str | None = None) -> FspEvaluation:
        """Likewise; there must be a teacher."""
        assert self._teacher is not None
        name = split or self._setup.config.evaluation.split
        if name not in self._fsps:
            self._fsps[name] = FspEvaluation(self._teacher, self._of(name), self._setup)
        return self._fsps[name]

    def figures(self, stage: Stage, objective: Objective, split: str | None = None) -> Figures:
        """What it is about: ``accuracy`` and ``loss``, ``fsp_loss`` and each pair's, or both."""
        found: Figures = {}
        if stage.fsp:
            found |= self.fsp(split)(objective)
        if stage.task:
            network = objective.student.network
            network.eval()
            found |= self.task(split)(network)
            network.train()
        return found

    def stopping_loss(self, stage: Stage, objective: Objective) -> float:
        """The stage's loss on the validation split, without soft targets."""
        found = self.figures(stage, objective, "validation")
        return found.get("loss", 0.0) + stage.fsp * found.get("fsp_loss", 0.0)

    def close(self) -> None:
        """End the processes that load images; what is measured later starts new ones."""
        for task in self._tasks.values():
            task.batches.close()
        for fsp in self._fsps.values():
            fsp.batches.close()

    def _of(self, name: str) -> Split:
        split: Split | None = getattr(self._splits, name)
        assert split is not None  # the study has been checked
        return split
