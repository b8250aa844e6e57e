"""Weights on disk: safetensors with a note of what they came from, written whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from fsp_kernels.distill.errors import DistillError


class Checkpoint(NamedTuple):
    """``weights`` as in ``state_dict()``; ``note`` is what ``save`` was given."""

    weights: dict[str, Tensor]
    note: dict[str, Any]


def fingerprint(settings: Any) -> str:
    """A short digest of plain dicts, lists and scalars: equal settings, equal digest."""
    text = json.dumps(settings, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def save(path: Path, model: nn.Module, note: dict[str, Any]) -> None:
    """Write ``model``'s weights and ``note`` (JSON-able) to ``path``, replacing it at once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    weights = {name: x.detach().cpu().contiguous() for name, x in model.state_dict().items()}
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        save_file(weights, unfinished, metadata={"note": json.dumps(note)})
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def load(path: Path) -> Checkpoint:
    """What ``save`` wrote; runs no code from the file.

    Raises:
        DistillError: the file is damaged, or not one of ours.
    """
    try:
        with safe_open(path, framework="pt") as file:
            note = json.loads((file.metadata() or {})["note"])
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError, KeyError, json.JSONDecodeError) as error:
        raise DistillError(
            f"{path}: not a checkpoint of this program, or damaged ({error}); "
            f"delete it to train anew"
        ) from error
    return Checkpoint(weights, note)


def restore(model: nn.Module, checkpoint: Checkpoint, path: Path) -> None:
    """Load ``checkpoint`` (read from ``path``) into ``model``.

    Raises:
        DistillError: the weights are of another architecture.
    """
    try:
        model.load_state_dict(checkpoint.weights)
    except RuntimeError as error:
        raise DistillError(
            f"{path}: its weights do not fit the network ({error}); delete it to train anew"
        ) from error
