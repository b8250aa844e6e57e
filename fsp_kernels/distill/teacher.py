"""What the teacher says of the student's images: worked out at each step, or read from a cache."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import torch
from accelerate import Accelerator
from safetensors import safe_open
from torch import Tensor, nn

from fsp_kernels import fsp_matrix
from fsp_kernels.distill import checkpoint
from fsp_kernels.distill.config import Config, Pair
from fsp_kernels.distill.data import Batch, EvaluationBatches, Split
from fsp_kernels.distill.objective import Tapped, Targets
from fsp_kernels.distill.settings import to_tree
from fsp_kernels.distill.storage import check_writable


class Teacher(Protocol):
    """Answers for a batch of the training split."""

    def targets(self, batch: Batch) -> Targets:
        """For images that are on the device."""


class LiveTeacher:
    """Runs the network, in evaluation mode, for every batch.

    Under ``torch.inference_mode`` nothing of its graph is kept, only the maps of the pairs.
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
        """Its maps and logits."""
        with torch.inference_mode(), self._accelerator.autocast():
            logits, maps = self._tapped(batch.images)
        return Targets(maps, logits.clone())  # an inference tensor, autograd would not save

    @torch.no_grad()
    def matrices(self, images: Tensor, pool: str) -> tuple[list[Tensor], Tensor]:
        """Its FSP matrices, (B, m, n) for each pair, and logits (B, classes) of ``images``."""
        with self._accelerator.autocast():
            logits, maps = self._tapped.uncompiled(images)
        matrices = [fsp_matrix(*pair, pool=pool, channel_dim=1).float() for pair in maps]
        return matrices, logits.float()


class CachedTeacher:
    """Reads FSP matrices and logits from a file, which is mapped into memory, not loaded."""

    def __init__(self, path: Path, pairs: int, device: torch.device) -> None:
        with safe_open(path, framework="pt") as file:
            self._matrices = [file.get_tensor(f"pair {index}") for index in range(pairs)]
            self._logits = file.get_tensor("logits")
        self._device = device

    def targets(self, batch: Batch) -> Targets:
        """What ``LiveTeacher.matrices`` said of these images."""
        rows = batch.indices.cpu()
        matrices = [stored[rows].to(self._device) for stored in self._matrices]
        return Targets(matrices, self._logits[rows].to(self._device))


def cached(
    teacher: LiveTeacher, split: Split, config: Config, accelerator: Accelerator, folder: Path
) -> CachedTeacher:
    """The cache of ``teacher`` for ``split`` in ``folder``, made by the first process if need be.

    Its name is a digest of the teacher's model and weights, the pairs, the images and their
    transform: a cache of anything else is not found.

    Raises:
        DistillError: the disk has no space for it.
    """
    digest = checkpoint.fingerprint(
        {
            "model": to_tree(config.teacher),
            "weights": checkpoint.digest_of(teacher.network.state_dict()),
            "pairs": [(*pair.teacher, pair.channel_dim) for pair in teacher.pairs],
            "pool": config.fsp.pool,
            "precision": config.execution.precision,
            "images": split.fingerprint,
        }
    )
    path = folder / f"{digest}.safetensors"
    with accelerator.local_main_process_first():
        # Written by a rename it is whole if it is there; but disks and copies do fail.
        if not checkpoint.is_whole(path):
            _write(path, teacher, split, config, accelerator.device)
    return CachedTeacher(path, len(teacher.pairs), accelerator.device)


def _write(
    path: Path, teacher: LiveTeacher, split: Split, config: Config, device: torch.device
) -> None:
    tensors: dict[str, Tensor] = {}
    for batch in EvaluationBatches(split, workers=config.data.workers):
        matrices, logits = teacher.matrices(batch.images.to(device), config.fsp.pool)
        rows = {f"pair {index}": matrix for index, matrix in enumerate(matrices)}
        rows["logits"] = logits
        if not tensors:
            bytes_each = sum(x[0].nbytes for x in rows.values())
            check_writable(path.parent, len(split) * bytes_each)
            tensors = {
                name: x.new_empty(len(split), *x.shape[1:]).cpu() for name, x in rows.items()
            }
        for name, values in rows.items():
            tensors[name][batch.indices] = values.cpu()
    checkpoint.save(path, tensors, {})
