"""The teacher's targets for the student: computed at each step, or read from a cache."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from fsp_kernels import fsp_matrix
from fsp_kernels.distill import checkpoint
from fsp_kernels.distill.config import Config, Pair
from fsp_kernels.distill.data import Batch, EvaluationBatches, Split
from fsp_kernels.distill.objective import Tapped, Targets
from fsp_kernels.distill.settings import to_tree
from fsp_kernels.distill.storage import check_writable
from fsp_kernels.errors import DistillError


class LiveTeacher:
    """Runs the network in evaluation mode for every batch.

    ``torch.inference_mode`` keeps no graph, only the maps of the pairs.
    """

    def __init__(
        self, network: nn.Module, pairs: Sequence[Pair], accelerator: Accelerator, compiled: bool
    ) -> None:
        self.network = network.eval().requires_grad_(False)
        self.pairs = pairs
        paths, dims = [pair.teacher for pair in pairs], [pair.channel_dim for pair in pairs]
        self._tapped = Tapped(network, paths, dims, compiled)
        self._accelerator = accelerator

    def targets(self, batch: Batch) -> Targets:
        """Maps and logits for a batch on the device."""
        with torch.inference_mode(), self._accelerator.autocast():
            logits, maps = self._tapped(batch.images)
        return Targets(maps, logits.clone())  # autograd would not save an inference tensor

    @torch.no_grad()
    def matrices(self, images: Tensor, pool: str) -> tuple[list[Tensor], Tensor]:
        """FSP matrices (B, m, n) of each pair, and logits (B, classes), of images (B, C, H, W)."""
        with self._accelerator.autocast():
            logits, maps = self._tapped.uncompiled(images.to(self._accelerator.device))
        matrices = [fsp_matrix(*pair, pool=pool, channel_dim=1).float() for pair in maps]
        return matrices, logits.float()


class CachedTeacher:
    """Gives FSP matrices and logits from tensors that are mapped into memory, not loaded.

    Args:
        tensors: ``pair 0``, ``pair 1``, ... (images, m, n) and ``logits`` (images, classes).
        device: of the targets.
    """

    def __init__(self, tensors: dict[str, Tensor], device: torch.device) -> None:
        self._matrices = [tensors[f"pair {index}"] for index in range(len(tensors) - 1)]
        self._logits, self._device = tensors["logits"], device

    def targets(self, batch: Batch) -> Targets:
        """What ``LiveTeacher.matrices`` gave for these images."""
        rows = batch.indices.cpu()
        matrices = [stored[rows].to(self._device) for stored in self._matrices]
        return Targets(matrices, self._logits[rows].to(self._device))


Teacher = LiveTeacher | CachedTeacher


def load_or_make_cache(
    teacher: LiveTeacher, split: Split, config: Config, accelerator: Accelerator, folder: Path
) -> CachedTeacher:
    """The cache of ``teacher`` for ``split`` in ``folder``; the first process makes it if needed.

    It is named by a digest of the teacher's model and weights, the pairs, the images and their
    transform, so that a cache of anything else is not found.

    Raises:
        DistillError: the disk has no space for it.
    """
    note = {
        "model": to_tree(config.teacher),
        "pairs": [(*pair.teacher, pair.channel_dim) for pair in teacher.pairs],
        "pool": config.fsp.pool,
        "precision": config.execution.precision,
        "images": split.fingerprint,
    }
    digest = checkpoint.digest_of(teacher.network.state_dict(), json.dumps(note))
    path = folder / f"{digest[:16]}.safetensors"
    with accelerator.local_main_process_first():
        try:
            stored = checkpoint.load(path, mapped=True)
        except DistillError:  # absent or damaged
            _write(path, teacher, split, config)
            stored = checkpoint.load(path, mapped=True)
    return CachedTeacher(stored.tensors, accelerator.device)


def _write(path: Path, teacher: LiveTeacher, split: Split, config: Config) -> None:
    tensors: dict[str, Tensor] = {}
    for batch in EvaluationBatches(split, workers=config.data.workers):
        matrices, logits = teacher.matrices(batch.images, config.fsp.pool)
        rows = {f"pair {index}": matrix for index, matrix in enumerate(matrices)}
        rows["logits"] = logits
        if not tensors:
            bytes_each = sum(x[0].nbytes for x in rows.values())
            check_writable(path.parent, len(split) * bytes_each)
            tensors = {
                name: x.new_empty(len(split), *x.shape[1:], device="cpu")
                for name, x in rows.items()
            }
        for name, values in rows.items():
            tensors[name][batch.indices] = values.cpu()
    checkpoint.save(path, tensors, {})
