"""Tensors with a note, on disk: written whole or not at all, and verified on reading."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from fsp_kernels.distill.records import FORMAT, Phase, another_version_error
from fsp_kernels.distill.storage import replacing
from fsp_kernels.errors import DamagedError, DistillError

_KEPT = 2  # checkpoints of a run: if the newest is damaged, the one before serves


class Checkpoint(NamedTuple):
    """Tensors by name, and a note of plain dicts, lists and scalars."""

    tensors: dict[str, Tensor]
    note: dict[str, Any]


def save(path: Path, tensors: Mapping[str, Tensor], note: dict[str, Any]) -> None:
    """Write ``tensors`` and ``note`` (serialisable as JSON) to ``path``, replacing it at once.

    Raises:
        DistillError: the file cannot be written; the old one is unchanged.
    """
    separate: dict[str, Tensor] = {}
    storages: set[int] = set()
    for name, x in tensors.items():
        tensor = x.detach().cpu().contiguous()
        storage = tensor.untyped_storage().data_ptr()
        # Safetensors refuses tensors that share memory, as tied weights do.
        separate[name] = tensor.clone() if storage in storages else tensor
        storages.add(storage)
    text = json.dumps({"format": FORMAT, **note})
    with replacing(path) as unfinished:
        metadata = {"note": text, "digest": digest_of(separate, text)}
        save_file(separate, unfinished, metadata=metadata)


def load(path: Path, *, mapped: bool = False) -> Checkpoint:
    """Read what ``save`` wrote; no code from the file is run.

    With ``mapped`` the tensors are the file, mapped into memory; neither may be changed then.

    Raises:
        DamagedError: the file is damaged (one bit is enough), or was not written by ``save``.
        DistillError: it was written by another version.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if metadata["digest"] != digest_of(tensors, metadata["note"]):
            raise ValueError("its content does not match its digest")
        note = json.loads(metadata["note"])
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise DamagedError(
            f"{path}: not a checkpoint of this program, or damaged: {error}"
        ) from None
    if note.pop("format", None) != FORMAT:
        raise another_version_error(path)
    if not mapped:
        tensors = {name: x.clone() for name, x in tensors.items()}
    return Checkpoint(tensors, note)


def restore(model: nn.Module, checkpoint: Checkpoint, path: Path) -> None:
    """Load ``checkpoint``, which was read from ``path``, into ``model``.

    Raises:
        DamagedError: the weights are of another architecture.
    """
    try:
        model.load_state_dict(checkpoint.tensors)
    except RuntimeError as error:
        raise DamagedError(f"{path}: its weights do not fit the network: {error}") from error


def digest_of(tensors: Mapping[str, Tensor], note: str = "") -> str:
    """SHA-256 of names, types, shapes and values of ``tensors``, and of ``note``."""
    digest = hashlib.sha256(note.encode())
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def file_digest(path: Path) -> str:
    """A short digest of a file's content.

    Raises:
        DistillError: it cannot be read.
    """
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    except OSError as error:
        raise DistillError(f"{path}: cannot be read: {error.strerror}") from error
    return digest.hexdigest()[:16]


@dataclass
class State:
    """Where a run is between two optimiser steps, as a checkpoint holds it.

    Learning rates, random numbers and the order of images are functions of the step, so they are
    not stored.

    Attributes:
        phases: the stages that are finished.
        step: optimiser steps of the current stage.
        history: its evaluations so far, as ``Phase.history``.
        seconds: spent in its steps.
        loss_sum: of the training losses since the last evaluation.
        patience: state of its stopping rule.
        scaler: state of the loss scaler, for fp16.
        tensors: weights (``network/...``, ``projection/...``), state of the optimiser
            (``optimizer/...``), and the student's FSP matrices before the stage (``before/...``).
    """

    phases: list[Phase] = field(default_factory=list)
    step: int = 0
    history: list[dict[str, float]] = field(default_factory=list)
    seconds: float = 0.0
    loss_sum: float = 0.0
    patience: dict[str, Any] | None = None
    scaler: dict[str, Any] | None = None
    tensors: dict[str, Tensor] = field(default_factory=dict)

    def note(self) -> dict[str, Any]:
        """All but the tensors, for a checkpoint's note."""
        note = asdict(replace(self, tensors={}))
        del note["tensors"]
        return note

    @classmethod
    def of(cls, stored: Checkpoint) -> State:
        """The state that a checkpoint holds."""
        note = dict(stored.note)
        del note["settings"]
        phases = [Phase(**phase) for phase in note.pop("phases")]
        return cls(phases=phases, tensors=stored.tensors, **note)

    def part(self, name: str) -> dict[str, Tensor]:
        """The tensors under ``name/``."""
        prefix = f"{name}/"
        return {k[len(prefix) :]: v for k, v in self.tensors.items() if k.startswith(prefix)}


def flatten(tree: Mapping[Any, Any], prefix: str = "") -> dict[str, Tensor]:
    """The tensors and numbers of nested mappings as tensors, named by their keys: ``A/B/C``."""
    flat: dict[str, Tensor] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}/")
        elif value is not None:
            flat[f"{prefix}{key}"] = torch.as_tensor(value)
    return flat


def restore_optimizer(optimizer: Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Load a flattened ``state`` of ``optimizer.state_dict()``; settings are the recipe's."""
    state: dict[int, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        index, name = key.split("/")
        state.setdefault(int(index), {})[name] = tensor
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state, "param_groups": groups})


class Series:
    """The newest checkpoints of one run, in a folder of their own, named by a growing number."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def paths(self) -> list[Path]:
        """The checkpoints, oldest first."""
        return sorted(self.folder.glob("*.safetensors"))

    def save(self, number: int, tensors: Mapping[str, Tensor], note: dict[str, Any]) -> Path:
        """Write a checkpoint, then delete all but it and the one before."""
        path = self.folder / f"{number:09d}.safetensors"
        save(path, tensors, note)
        earlier = [other for other in self.paths() if other < path]
        later = [other for other in self.paths() if other > path]  # damaged, or resumed before them
        for other in [*earlier[: 1 - _KEPT], *later]:
            other.unlink()
        return path

    def newest(self, say: Callable[[str], None]) -> tuple[Path, Checkpoint] | None:
        """The newest checkpoint that is whole; ``say`` is told of each damaged one.

        Raises:
            DistillError: it was written by another version.
        """
        paths = self.paths()
        for path in reversed(paths):
            try:
                return path, load(path)
            except DamagedError as error:
                going_on = "beginning again" if path == paths[0] else "going on from the one before"
                say(f"{error}; {going_on}")
        return None

    def clear(self) -> None:
        """Delete the folder with all that is in it."""
        if self.folder.is_dir():
            shutil.rmtree(self.folder)
