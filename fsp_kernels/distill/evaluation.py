"""Measures of a network: its accuracy, and how far its FSP matrices are from a teacher's."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fsp_kernels import fsp_matrix
from fsp_kernels.distill.arms import TrainingStage
from fsp_kernels.distill.config import Config
from fsp_kernels.distill.data import Batch, EvaluationBatches, Split, Splits
from fsp_kernels.distill.objective import Objective, Targets
from fsp_kernels.distill.runtime import Runtime
from fsp_kernels.distill.teacher import LiveTeacher
from fsp_kernels.features.pairs import Maps

_MATRIX_BYTES = 256 << 20
_BATCH = 512
Matrices = list[Tensor]
Figures = dict[str, float]


def move_to_device(
    batches: Iterable[Batch], device: torch.device, config: Config
) -> Generator[Batch, None, None]:
    """The same batches, with images (B, C, H, W) and labels (B,) on the device."""
    layout = torch.channels_last if config.execution.channels_last else torch.contiguous_format
    for batch in batches:
        images = batch.images.to(device, memory_format=layout, non_blocking=True)
        yield Batch(images, batch.labels.to(device, non_blocking=True), batch.indices)


@contextmanager
def by_batch_statistics(network: nn.Module) -> Iterator[None]:
    """Put ``network`` in training mode without gradients, then give back modes and buffers.

    So stage 1 sees the student. Running statistics would lag while stage 1 changes the scale of the
    maps, and they are meaningless before any training.
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


class Evaluations:
    """Measures networks on the splits of one data set.

    Processes that load images are started once and wait for the next evaluation, until ``close``.
    ``split`` names one of ``splits``; by default it is the quoted one, ``evaluation.split``.

    Args:
        splits: the data set.
        runtime: the devices to measure on.
        teacher: for FSP losses and matrices. It does not change, so its matrices are computed once,
            of as many images as have matrices that fit in 256 MiB.
    """

    def __init__(
        self, splits: Splits, runtime: Runtime, teacher: LiveTeacher | None = None
    ) -> None:
        self._splits, self._runtime, self._teacher = splits, runtime, teacher
        self._config, self._accelerator = runtime.config, runtime.accelerator
        self._task_batches: dict[str, EvaluationBatches] = {}  # the processes share them out
        # Every process measures all of these; with the teacher's matrices (B, m, n) of each batch.
        self._fsp_batches: dict[str, tuple[EvaluationBatches, list[Matrices]]] = {}

    def figures(
        self, stage: TrainingStage, objective: Objective, split: str | None = None
    ) -> Figures:
        """What ``task`` gives, what ``fsp`` gives, or both, by the losses of the stage."""
        found: Figures = {}
        if stage.fsp:
            found |= self.fsp(objective, split)
        if stage.task:
            network = objective.student.network
            found |= self.task(network.eval(), split)
            network.train()
        return found

    def stopping_loss(self, stage: TrainingStage, objective: Objective) -> float:
        """The stage's loss on the validation split, without soft targets."""
        found = self.figures(stage, objective, "validation")
        return found.get("loss", 0.0) + stage.fsp * found.get("fsp_loss", 0.0)

    @torch.no_grad()
    def task(self, network: nn.Module, split: str | None = None) -> Figures:
        """``accuracy`` (0 to 1) and mean cross-entropy ``loss`` of ``network``, in its mode."""
        name, accelerator = split or self._config.evaluation.split, self._accelerator
        images = self._split(name)
        if name not in self._task_batches:
            self._task_batches[name] = EvaluationBatches(
                images,
                batch_size=_BATCH,
                process=accelerator.process_index,
                processes=accelerator.num_processes,
                workers=self._config.data.workers,
            )
        right, loss = 0, 0.0
        for batch in self._until_stopped(self._task_batches[name]):
            with accelerator.autocast():
                logits = network(batch.images).float()
            right += int((logits.argmax(1) == batch.labels).sum())
            loss += F.cross_entropy(logits, batch.labels, reduction="sum").item()
        if accelerator.num_processes > 1:
            sums = torch.tensor([right, loss], dtype=torch.float64, device=accelerator.device)
            right, loss = accelerator.reduce(sums).tolist()
        return {"accuracy": right / len(images), "loss": loss / len(images)}

    def fsp(self, objective: Objective, split: str | None = None) -> Figures:
        """``fsp_loss``, weighted and summed over the pairs, and ``fsp_loss/INDEX`` of each pair."""
        sums, count = torch.zeros(len(objective.weights), dtype=torch.float64), 0
        batches, targets = self._batches_with_targets(split)
        for maps, matrices in zip(self._student_maps(objective, batches), targets, strict=True):
            size = len(matrices[0])
            sums += size * objective.fsp_loss(maps, Targets(matrices), "none").double().cpu()
            count += size
        each = (sums / count).tolist()
        return {"fsp_loss": sum(each)} | {f"fsp_loss/{i}": value for i, value in enumerate(each)}

    def teacher_matrices(self) -> Matrices:
        """The teacher's FSP matrix (m, n) of each pair, averaged over the quoted split."""
        return _average(self._batches_with_targets()[1])

    def student_matrices(self, objective: Objective) -> Matrices:
        """The student's FSP matrix (m, n) of each pair, after the projection if there is one."""
        pool, project = self._config.fsp.pool, objective.projection or (lambda maps: maps)
        batches, _ = self._batches_with_targets()
        return _average(
            [fsp_matrix(*pair, pool=pool, channel_dim=1).float() for pair in project(maps)]
            for maps in self._student_maps(objective, batches)
        )

    def close(self) -> None:
        """End the processes that load images; a later evaluation starts new ones."""
        fsp_batches = (batches for batches, _ in self._fsp_batches.values())
        for batches in (*self._task_batches.values(), *fsp_batches):
            batches.close()

    def _split(self, name: str) -> Split:
        split: Split | None = getattr(self._splits, name)
        assert split is not None  # checked when the study was opened
        return split

    def _batches_with_targets(
        self, split: str | None = None
    ) -> tuple[EvaluationBatches, list[Matrices]]:
        """A split's batches, and the teacher's matrices (B, m, n) for each."""
        name, pool = split or self._config.evaluation.split, self._config.fsp.pool
        if name not in self._fsp_batches:
            assert self._teacher is not None
            images = self._split(name)
            one, _ = self._teacher.matrices(images[0].image[None], pool)
            limit = min(len(images), max(2, _MATRIX_BYTES // sum(x.nbytes for x in one)))
            # Batch normalisation has no statistics of a single image whose map is 1 x 1.
            limit -= limit % _BATCH == 1
            workers = self._config.data.workers
            batches = EvaluationBatches(images, batch_size=_BATCH, workers=workers, limit=limit)
            stopping = self._until_stopped(batches)
            targets = [self._teacher.matrices(batch.images, pool)[0] for batch in stopping]
            self._fsp_batches[name] = batches, targets
        return self._fsp_batches[name]

    def _student_maps(
        self, objective: Objective, batches: EvaluationBatches
    ) -> Iterator[Sequence[Maps]]:
        with by_batch_statistics(objective.student.network):
            for batch in self._until_stopped(batches):
                with self._accelerator.autocast():
                    _, maps = objective.student.uncompiled(batch.images)
                    yield maps

    def _until_stopped(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """The batches on the device; a signal ends them by an ``InterruptedRunError``.

        Several processes go on to the end, since a signal may reach them at different batches.
        """
        for batch in move_to_device(batches, self._accelerator.device, self._config):
            if self._accelerator.num_processes == 1:
                self._runtime.interruption.check()
            yield batch


def _average(batches: Iterable[Matrices]) -> Matrices:
    return [torch.cat(pair).mean(0).cpu() for pair in zip(*batches, strict=True)]
