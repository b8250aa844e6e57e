"""Tensors on disk with a note of their origin: written whole or not at all, verified on reading."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from fsp_kernels.distill.errors import DamagedError, DistillError
from fsp_kernels.distill.storage import replacing


class Checkpoint(NamedTuple):
    """What ``save`` was given: ``tensors`` by name, and ``note``, plain dicts, lists, scalars."""

    tensors: dict[str, Tensor]
    note: dict[str, Any]


def fingerprint(settings: Any) -> str:
    """A short digest of plain dicts, lists and scalars: equal settings, equal digest."""
    text = json.dumps(settings, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def save(path: Path, tensors: Mapping[str, Tensor], note: dict[str, Any]) -> None:
    """Write ``tensors`` and ``note`` (JSON-able) to ``path``, replacing it at once.

    Raises:
        DistillError: the file cannot be written: no space, no permission. The old one is untouched.
    """
    ours = _apart({name: x.detach().cpu().contiguous() for name, x in tensors.items()})
    text = json.dumps(note)
    with replacing(path) as unfinished:
        save_file(ours, unfinished, metadata={"note": text, "digest": digest_of(ours, text)})


def load(path: Path) -> Checkpoint:
    """What ``save`` wrote; runs no code from the file.

    Raises:
        DistillError: the file is damaged (a bit is enough), or not one of ours.
    """
    mapped = load_mapped(path)
    # Copies: what safetensors hands out is the file itself.
    return mapped._replace(tensors={name: x.clone() for name, x in mapped.tensors.items()})


def load_mapped(path: Path) -> Checkpoint:
    """As ``load``, but the tensors are the file, mapped into memory: neither may be changed."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            note = json.loads(metadata["note"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if metadata["digest"] != digest_of(tensors, metadata["note"]):
            raise ValueError("its contents are not those that were written")
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise DamagedError(
            f"{path}: not a checkpoint of this program, or damaged: {error}"
        ) from None
    return Checkpoint(tensors, note)


def is_whole(path: Path) -> bool:
    """Whether there is a file that ``load`` would read."""
    try:
        return path.is_file() and bool(load_mapped(path))
    except DistillError:
        return False


def restore(model: nn.Module, checkpoint: Checkpoint, path: Path) -> None:
    """Load ``checkpoint`` (read from ``path``) into ``model``.

    Raises:
        DistillError: the weights are of another architecture.
    """
    try:
        model.load_state_dict(checkpoint.tensors)
    except RuntimeError as error:
        raise DamagedError(f"{path}: its weights do not fit the network: {error}") from error


class Series:
    """The last few checkpoints of one run, named by how far it was.

    Args:
        folder: theirs alone; made when the first is saved.
        keep: how many. With two, a damaged newest one leaves another to go on from.
    """

    def __init__(self, folder: Path, keep: int = 2) -> None:
        self.folder, self._keep = folder, keep

    def paths(self) -> list[Path]:
        """Oldest first."""
        return sorted(self.folder.glob("*.safetensors"))

    def save(self, number: int, tensors: Mapping[str, Tensor], note: dict[str, Any]) -> Path:
        """Write one; ``number`` must grow from one to the next. Then drop the oldest."""
        path = self.folder / f"{number:09d}.safetensors"
        save(path, tensors, note)
        earlier = [other for other in self.paths() if other < path]
        later = [other for other in self.paths() if other > path]  # damaged, or we were not here
        for other in [*earlier[: max(0, len(earlier) + 1 - self._keep)], *later]:
            other.unlink()
        return path

    def newest(self, say: Callable[[str], None]) -> tuple[Path, Checkpoint] | None:
        """The newest that is whole; tells ``say`` of each damaged one that it passed over."""
        paths = self.paths()
        for path in reversed(paths):
            try:
                return path, load(path)
            except DistillError as error:
                going_on = "beginning again" if path == paths[0] else "going on from the one before"
                say(f"{error}; {going_on}")
        return None

    def clear(self) -> None:
        """Remove them, and what a killed process left unfinished."""
        for path in self.folder.glob("*") if self.folder.is_dir() else ():
            path.unlink()
        if self.folder.is_dir():
            self.folder.rmdir()


def digest_of(tensors: Mapping[str, Tensor], note: str = "") -> str:
    """Of ``tensors`` and ``note``: a bit's difference, another digest."""
    digest = hashlib.sha256(note.encode())
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _apart(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same, but copies of those that share another's memory, as tied weights do.

    Safetensors refuses them. Copies of all would be twice the memory.
    """
    seen: set[int] = set()
    for name, tensor in tensors.items():
        place = tensor.untyped_storage().data_ptr()
        tensors[name] = tensor.clone() if place in seen else tensor
        seen.add(place)
    return tensors


def file_digest(path: Path) -> str:
    """Of a file's content, as ``fingerprint``.

    Raises:
        DistillError: it cannot be read.
    """
    try:
        with path.open("rb") as file:
            digest = hashlib.sha256()
            while block := file.read(1 << 20):
                digest.update(block)
    except OSError as error:
        raise DistillError(f"{path}: cannot be read: {error.strerror}") from error
    return digest.hexdigest()[:16]
