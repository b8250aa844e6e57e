"""Checkpoints: the same back bit for bit, or an error; and the state of a run from them."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from safetensors import SafetensorError
from safetensors.torch import save_file
from studies import bits
from torch import Tensor, nn
from torch.optim import Optimizer

from fsp_kernels.distill import checkpoint
from fsp_kernels.distill.checkpoint import Series, State, flatten
from fsp_kernels.distill.config import Training
from fsp_kernels.distill.records import Phase
from fsp_kernels.distill.schedule import make_optimizer
from fsp_kernels.errors import DistillError

DTYPES = (
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.uint8,
    torch.bool,
)
SOME = {"a/weight": torch.arange(6.0).view(2, 3), "b": torch.tensor(7)}
NOTE = {"step": 3, "history": [{"loss": 0.1}, {}], "patience": None, "label": 'é "quoted" \\'}


def same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(
        (x.dtype, x.shape, bits(x)) == (theirs[name].dtype, theirs[name].shape, bits(theirs[name]))
        for name, x in ours.items()
    )


def refused(path: Path, content: bytes) -> bool:
    path.write_bytes(content)
    try:
        checkpoint.load(path)
    except DistillError as error:
        return str(path) in str(error)
    return False


@pytest.fixture
def written(tmp_path: Path) -> Path:
    path = tmp_path / "a"
    checkpoint.save(path, SOME, NOTE)
    return path


def test_tensors_and_note_come_back_bit_for_bit(tmp_path: Path) -> None:
    base = torch.arange(12.0).view(3, 4)
    tensors = {
        f"{dtype} {shape}": (torch.randn(shape) * 9).to(dtype)
        for dtype in DTYPES
        for shape in [(), (0,), (3, 2)]
    } | {
        "odd": torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, 1e-45]),
        "base": base,
        "tied": base,
        "column": base[:, 1],
        "wide": base[:1].expand(5, 4),
    }
    checkpoint.save(tmp_path / "a", tensors, NOTE)
    back = checkpoint.load(tmp_path / "a")
    assert same(back.tensors, tensors)
    assert back.note == NOTE


def test_what_is_loaded_does_not_change_with_the_file(written: Path) -> None:
    stored = checkpoint.load(written)
    with written.open("r+b") as file:
        file.write(bytes(written.stat().st_size))
    assert same(stored.tensors, SOME)


def test_any_single_flipped_bit_is_found(tmp_path: Path) -> None:
    checkpoint.save(tmp_path / "a", {"x": torch.ones(1)}, {"a": 1})
    whole = (tmp_path / "a").read_bytes()
    for place in range(len(whole)):  # the header's length, the header, the data
        for bit in range(8):
            flipped = bytearray(whole)
            flipped[place] ^= 1 << bit
            assert refused(tmp_path / "a", bytes(flipped)), f"byte {place}, bit {bit}"


def test_any_length_but_its_own_is_found(written: Path) -> None:
    whole = written.read_bytes()
    for length in range(len(whole)):
        assert refused(written, whole[:length]), f"length {length}"
    for more in (b"\0", b"\0" * 4096, whole):
        assert refused(written, whole + more)


@given(st.binary(max_size=64))
@example(b"PK\3\4" * 99)
@example(b"\2\0\0\0\0\0\0\0{}")  # a whole safetensors file, of nothing
@example(b"\xff" * 8)
def test_a_foreign_file_is_refused(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    assert refused(tmp_path_factory.getbasetemp() / "foreign", data)


def test_another_programs_safetensors_are_refused(tmp_path: Path) -> None:
    for metadata in (None, {"note": "{}"}, {"note": "{}", "digest": "0"}, {"digest": "0"}):
        save_file(SOME, tmp_path / "a", metadata=metadata)
        assert refused(tmp_path / "a", (tmp_path / "a").read_bytes())


def test_a_checkpoint_of_another_version_is_refused_and_not_passed_over(tmp_path: Path) -> None:
    made = Series(tmp_path)
    made.save(0, SOME, NOTE)
    metadata = {"note": json.dumps(NOTE), "digest": checkpoint.digest_of(SOME, json.dumps(NOTE))}
    save_file(SOME, tmp_path / "000000001.safetensors", metadata=metadata)
    with pytest.raises(DistillError, match="was written by another version of this program"):
        made.newest(print)


@pytest.mark.parametrize("what", ["absent", "folder"])
def test_a_path_without_a_file_is_refused(tmp_path: Path, what: str) -> None:
    if what == "folder":
        (tmp_path / what).mkdir()
    with pytest.raises(DistillError, match=f"/{what}: not a checkpoint"):
        checkpoint.load(tmp_path / what)


def test_a_note_that_is_no_json_leaves_the_old_file_and_no_other(written: Path) -> None:
    with pytest.raises(TypeError):
        checkpoint.save(written, SOME, {"seed": object()})
    assert checkpoint.load(written).note == NOTE
    assert list(written.parent.iterdir()) == [written]


@pytest.mark.parametrize(
    "error", [SafetensorError("I/O error"), OSError(errno.ENOSPC, "No space left on device")]
)
def test_a_failed_write_is_an_error_that_names_the_file_and_leaves_the_old_one(
    written: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(_tensors: object, path: Path, **_: object) -> None:
        path.write_bytes(b"half of")
        raise error

    monkeypatch.setattr(checkpoint, "save_file", fail)
    with pytest.raises(DistillError, match=r"/a: cannot be written: (I/O error|No space left)"):
        checkpoint.save(written, {}, {})
    assert same(checkpoint.load(written).tensors, SOME)
    assert list(written.parent.iterdir()) == [written]


def test_a_full_disk_leaves_the_old_file(full_disk: Path) -> None:
    path = full_disk / "a"
    checkpoint.save(path, SOME, NOTE)
    with pytest.raises(DistillError, match=r"/full/a: cannot be written: .*[Nn]o space"):
        checkpoint.save(path, {"x": torch.zeros(100_000)}, {})
    assert same(checkpoint.load(path).tensors, SOME)
    assert [path.name for path in full_disk.iterdir()] == ["a"]


def test_weights_are_restored_into_their_architecture_only(tmp_path: Path) -> None:
    path, first, second = tmp_path / "a", nn.BatchNorm1d(3), nn.BatchNorm1d(3)
    first(torch.randn(4, 3))
    checkpoint.save(path, first.state_dict(), {})
    checkpoint.restore(second, checkpoint.load(path), path)
    assert same(second.state_dict(), first.state_dict())
    with pytest.raises(DistillError, match=r"/a: its weights do not fit the network: [^$]*\[4\]"):
        checkpoint.restore(nn.BatchNorm1d(4), checkpoint.load(path), path)


@pytest.mark.parametrize(
    "other",
    [
        {"x": torch.tensor([1.0, -0.0])},
        {"y": torch.tensor([1.0, 0.0])},
        {"x": torch.tensor([[1.0, 0.0]])},
        {"x": torch.tensor([1.0, 0.0]).view(torch.int32)},
    ],
    ids=["values", "name", "shape", "dtype"],
)
def test_digests_tell_tensors_apart(other: dict[str, Tensor]) -> None:
    some = {"x": torch.tensor([1.0, 0.0])}
    assert checkpoint.digest_of(other) != checkpoint.digest_of(some)
    assert checkpoint.digest_of(some, "a note") != checkpoint.digest_of(some)


def test_a_files_digest_is_of_its_content(tmp_path: Path) -> None:
    for name, content in {"a": "1", "b": "1", "c": "2"}.items():
        (tmp_path / name).write_text(content)
    a, b, c = (checkpoint.file_digest(tmp_path / name) for name in "abc")
    assert a == b != c
    with pytest.raises(DistillError, match="/d: cannot be read: No such file"):
        checkpoint.file_digest(tmp_path / "d")


def series(folder: Path, *numbers: int) -> Series:
    made = Series(folder / "checkpoints")
    for number in numbers:
        made.save(number, {"x": torch.tensor(number)}, {"number": number})
    return made


def numbers_of(made: Series) -> list[int]:
    return [int(path.stem) for path in made.paths()]


def test_a_series_keeps_the_last_two_and_gives_the_newest(tmp_path: Path) -> None:
    assert series(tmp_path).newest(print) is None
    said: list[str] = []
    made = series(tmp_path, 0, 5, 10, 123_456, 2_000_000)
    assert numbers_of(made) == [123_456, 2_000_000]
    found = made.newest(said.append)
    assert found is not None
    assert found[1].note == {"number": 2_000_000}
    assert not said


def test_a_checkpoint_that_cannot_be_written_leaves_the_earlier_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    made = series(tmp_path, 0, 5)
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DistillError, match=r"/000000010.safetensors: cannot be written: No space"):
        made.save(10, {}, {})
    assert [checkpoint.load(path).note for path in made.paths()] == [{"number": 0}, {"number": 5}]


def test_a_cleared_series_leaves_nothing(tmp_path: Path) -> None:
    made = series(tmp_path, 0, 5)
    (made.folder / ".unfinished-0-a").write_text("of a killed process")
    made.clear()
    made.clear()
    assert list(tmp_path.iterdir()) == []


def test_a_state_comes_back_from_a_checkpoint(tmp_path: Path) -> None:
    state = State(
        phases=[Phase("stage 1", ["FSP loss"], [{"step": 0, "fsp_loss": 0.1}], 1.5, False)],
        step=7,
        history=[{"step": 4, "accuracy": 1 / 3}],
        seconds=0.1 + 0.2,
        loss_sum=1e-300,
        patience={"best": None, "waited": 2},
        scaler={"scale": 65536.0},
        tensors=flatten({"network": {"a.b": torch.ones(2)}, "networks": {"c": torch.ones(1)}}),
    )
    checkpoint.save(tmp_path / "a", state.tensors, state.note() | {"settings": {}})
    back = State.of(checkpoint.load(tmp_path / "a"))
    assert (back.note(), back.phases) == (state.note(), state.phases)
    assert same(back.part("network"), {"a.b": torch.ones(2)})


def test_flattened_tensors_are_named_by_their_keys() -> None:
    one = torch.ones(1)
    flat = flatten({"a": {0: one, 10: {"b.c": one}}, "empty": {}, "none": None, "number": 3})
    assert list(flat) == ["a/0", "a/10/b.c", "number"]
    assert flat["a/0"] is one
    assert flat["number"].item() == 3


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))


def step(model: nn.Module, optimizer: Optimizer, number: int) -> None:
    generator = torch.Generator().manual_seed(number)
    model[0](torch.randn(5, 3, generator=generator)).square().mean().backward()  # not the last
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("steps", [0, 3])
@pytest.mark.parametrize(
    "settings",
    [{"momentum": 0.0}, {"momentum": 0.9}, {"optimizer": "adam"}, {"optimizer": "adamw"}],
    ids=lambda settings: "-".join(map(str, settings.values())),
)
def test_an_optimizer_goes_on_to_the_same_bits_at_its_own_rate(
    tmp_path: Path, settings: dict[str, Any], steps: int
) -> None:
    training = Training(steps=6, learning_rate=0.1, **settings)
    model, other = network(), network()
    optimizer = make_optimizer(training, model.parameters())
    for number in range(steps):
        step(model, optimizer, number)
    checkpoint.save(tmp_path / "a", flatten(optimizer.state_dict()["state"]), {})
    other.load_state_dict(model.state_dict())
    resumed = make_optimizer(training.model_copy(update={"learning_rate": 0.7}), other.parameters())
    checkpoint.restore_optimizer(resumed, checkpoint.load(tmp_path / "a").tensors)
    assert resumed.param_groups[0]["lr"] == 0.7
    resumed.param_groups[0]["lr"] = 0.1
    for number in range(steps, 6):
        step(model, optimizer, number)
        step(other, resumed, number)
    assert same(other.state_dict(), model.state_dict())
