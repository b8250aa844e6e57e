"""Weights on disk: the same back, whole or not at all, and clear words about damaged files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from fsp_kernels.distill import checkpoint
from fsp_kernels.distill.errors import DistillError
from fsp_kernels.distill.models import CifarResNet


def test_weights_and_note_come_back(tmp_path: Path) -> None:
    path, model, other = tmp_path / "new" / "a.safetensors", CifarResNet(8), CifarResNet(8)
    checkpoint.save(path, model, {"seed": 3, "history": [{"step": 0.5}]})
    stored = checkpoint.load(path)
    checkpoint.restore(other, stored, path)
    assert stored.note == {"seed": 3, "history": [{"step": 0.5}]}
    for name, tensor in model.state_dict().items():
        assert torch.equal(other.state_dict()[name], tensor)


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    checkpoint.save(path, CifarResNet(8), {"seed": 1})
    with pytest.raises(TypeError):
        checkpoint.save(path, CifarResNet(8), {"seed": object()})
    assert checkpoint.load(path).note == {"seed": 1}
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("damage", ["cut short", "not ours", "other format", "empty"])
def test_a_damaged_file_is_refused_in_clear_words(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "a.safetensors"
    checkpoint.save(path, CifarResNet(8), {})
    whole = path.read_bytes()
    if damage == "not ours":
        save_file({"x": torch.zeros(1)}, path)
    else:
        path.write_bytes(
            {"cut short": whole[:-9], "other format": b"PK\3\4" * 99, "empty": b""}[damage]
        )
    with pytest.raises(DistillError, match=r"a\.safetensors: not a checkpoint .* delete it"):
        checkpoint.load(path)


def test_weights_of_another_architecture_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    checkpoint.save(path, CifarResNet(8), {})
    with pytest.raises(DistillError, match="do not fit the network"):
        checkpoint.restore(CifarResNet(14), checkpoint.load(path), path)


def test_fingerprints_tell_settings_apart_but_not_their_order() -> None:
    one = checkpoint.fingerprint({"a": 1, "b": [1, 2]})
    assert checkpoint.fingerprint({"b": [1, 2], "a": 1}) == one
    assert checkpoint.fingerprint({"a": 1, "b": [2, 1]}) != one
