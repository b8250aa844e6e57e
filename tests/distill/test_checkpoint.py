"""Checkpoints: the same back bit for bit, or an error, whatever became of the file."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from fsp_kernels.distill import checkpoint
from fsp_kernels.distill.checkpoint import Series
from fsp_kernels.distill.errors import DistillError

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


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("written") / "a.safetensors"
    checkpoint.save(path, SOME, NOTE)
    return path


def refused(path: Path, content: bytes) -> bool:
    path.write_bytes(content)
    try:
        checkpoint.load(path)
    except DistillError as error:
        return str(path) in str(error)
    return False


def same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(
        x.dtype == theirs[name].dtype and torch.equal(x, theirs[name]) for name, x in ours.items()
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (0,), (3, 2)])
def test_tensors_come_back_bit_for_bit(
    tmp_path: Path, dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    tensors = {"x": (torch.randn(shape) * 9).to(dtype)}
    checkpoint.save(tmp_path / "a", tensors, {})
    assert same(checkpoint.load(tmp_path / "a").tensors, tensors)


def test_numbers_that_are_not_finite_come_back(tmp_path: Path) -> None:
    odd = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, 1e-45])
    checkpoint.save(tmp_path / "a", {"x": odd}, {})
    back = checkpoint.load(tmp_path / "a").tensors["x"]
    assert torch.equal(back.view(torch.int32), odd.view(torch.int32))


def test_the_note_comes_back(written: Path) -> None:
    assert checkpoint.load(written).note == NOTE


def test_tensors_that_share_memory_or_have_gaps_come_back(tmp_path: Path) -> None:
    base = torch.arange(12.0).view(3, 4)
    tied = {"x": base, "tied": base, "column": base[:, 1], "wide": base[:1].expand(5, 4)}
    checkpoint.save(tmp_path / "a", tied, {})
    assert same(checkpoint.load(tmp_path / "a").tensors, tied)


def test_what_is_loaded_does_not_change_with_the_file(written: Path, tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(written.read_bytes())
    stored = checkpoint.load(path)
    with path.open("r+b") as file:
        file.write(bytes(path.stat().st_size))
    assert same(stored.tensors, SOME)


def test_any_single_flipped_bit_is_found(tmp_path: Path) -> None:
    checkpoint.save(tmp_path / "a", {"x": torch.ones(1)}, {"a": 1})
    whole = (tmp_path / "a").read_bytes()
    for place in range(len(whole)):  # the header's length, the header, the data
        for bit in range(8):
            flipped = bytearray(whole)
            flipped[place] ^= 1 << bit
            assert refused(tmp_path / "a", bytes(flipped)), f"byte {place}, bit {bit}"


def test_any_length_but_its_own_is_found(written: Path, tmp_path: Path) -> None:
    whole = written.read_bytes()
    for length in range(len(whole)):
        assert refused(tmp_path / "a", whole[:length]), f"length {length}"
    for more in (b"\0", b"\0" * 4096, whole):
        assert refused(tmp_path / "a", whole + more)


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


def test_a_note_of_other_tensors_is_refused(tmp_path: Path) -> None:
    digest = checkpoint.digest_of(SOME, json.dumps(NOTE))
    metadata = {"note": json.dumps(NOTE), "digest": digest}
    save_file(SOME, tmp_path / "a", metadata=metadata)
    assert same(checkpoint.load(tmp_path / "a").tensors, SOME)  # so that is how they are written
    save_file(SOME | {"b": torch.tensor(8)}, tmp_path / "a", metadata=metadata)
    assert refused(tmp_path / "a", (tmp_path / "a").read_bytes())


@pytest.mark.parametrize("what", ["absent", "folder"])
def test_what_is_no_file_is_refused(tmp_path: Path, what: str) -> None:
    if what == "folder":
        (tmp_path / what).mkdir()
    with pytest.raises(DistillError, match=f"/{what}: not a checkpoint"):
        checkpoint.load(tmp_path / what)
    assert not checkpoint.is_whole(tmp_path / what)


def test_a_file_is_whole_or_not(written: Path, tmp_path: Path) -> None:
    assert checkpoint.is_whole(written)
    (tmp_path / "a").write_bytes(written.read_bytes()[:-1])
    assert not checkpoint.is_whole(tmp_path / "a")


def test_a_note_that_is_no_json_leaves_the_old_file_and_no_other(tmp_path: Path) -> None:
    path = tmp_path / "a"
    checkpoint.save(path, SOME, {"seed": 1})
    with pytest.raises(TypeError):
        checkpoint.save(path, SOME, {"seed": object()})
    assert checkpoint.load(path).note == {"seed": 1}
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    "error", [SafetensorError("I/O error"), OSError(errno.ENOSPC, "No space left on device")]
)
def test_a_failed_write_is_an_error_that_names_the_file_and_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(_tensors: object, path: Path, **_: object) -> None:
        path.write_bytes(b"half of")
        raise error

    path = tmp_path / "a"
    checkpoint.save(path, SOME, NOTE)
    monkeypatch.setattr(checkpoint, "save_file", fail)
    with pytest.raises(DistillError, match=r"/a: cannot be written: (I/O error|No space left)"):
        checkpoint.save(path, {}, {})
    assert same(checkpoint.load(path).tensors, SOME)
    assert list(tmp_path.iterdir()) == [path]


def test_a_full_disk_leaves_the_old_file(full_disk: Path) -> None:
    path = full_disk / "a"
    checkpoint.save(path, SOME, NOTE)
    with pytest.raises(DistillError, match=r"/full/a: cannot be written: .*[Nn]o space"):
        checkpoint.save(path, {"x": torch.zeros(100_000)}, {})
    assert same(checkpoint.load(path).tensors, SOME)
    assert [path.name for path in full_disk.iterdir()] == ["a"]


def test_weights_are_restored(tmp_path: Path) -> None:
    first, second = nn.BatchNorm1d(3), nn.BatchNorm1d(3)
    first(torch.randn(4, 3))
    checkpoint.save(tmp_path / "a", first.state_dict(), {})
    checkpoint.restore(second, checkpoint.load(tmp_path / "a"), tmp_path / "a")
    assert same(second.state_dict(), first.state_dict())


def test_weights_of_another_architecture_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a"
    checkpoint.save(path, nn.Linear(2, 3).state_dict(), {})
    with pytest.raises(
        DistillError, match=r"/a: its weights do not fit the network: [^$]*\[3, 2\]"
    ):
        checkpoint.restore(nn.Linear(3, 2), checkpoint.load(path), path)


def test_fingerprints_tell_settings_apart_but_not_their_order() -> None:
    one = checkpoint.fingerprint({"a": 1, "b": [1, 2]})
    assert checkpoint.fingerprint({"b": [1, 2], "a": 1}) == one
    assert checkpoint.fingerprint({"a": 1, "b": [2, 1]}) != one
    assert checkpoint.fingerprint({"a": None, "b": [1, 2]}) != one


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
    assert checkpoint.digest_of(other) != checkpoint.digest_of({"x": torch.tensor([1.0, 0.0])})


def test_a_files_digest_is_of_its_content(tmp_path: Path) -> None:
    for name, content in {"a": "1", "b": "1", "c": "2"}.items():
        (tmp_path / name).write_text(content)
    a, b, c = (checkpoint.file_digest(tmp_path / name) for name in "abc")
    assert a == b != c
    with pytest.raises(DistillError, match="/d: cannot be read: No such file"):
        checkpoint.file_digest(tmp_path / "d")


def series(folder: Path, *numbers: int, keep: int = 3) -> Series:
    made = Series(folder / "checkpoints", keep)
    for number in numbers:
        made.save(number, {"x": torch.tensor(number)}, {"number": number})
    return made


def numbers_of(made: Series) -> list[int]:
    return [int(path.stem) for path in made.paths()]


def test_a_series_keeps_the_last_ones(tmp_path: Path) -> None:
    assert numbers_of(series(tmp_path, 0, 5, 10, 123_456, 2_000_000)) == [10, 123_456, 2_000_000]


def test_a_series_gives_the_newest(tmp_path: Path) -> None:
    said: list[str] = []
    found = series(tmp_path, 0, 5, 10).newest(said.append)
    assert found is not None
    assert found[0].stem == "000000010"
    assert found[1].note == {"number": 10}
    assert not said


def test_a_series_without_any_gives_none(tmp_path: Path) -> None:
    assert series(tmp_path).newest(print) is None


@pytest.mark.parametrize("damage", ["flipped", "cut short", "empty"])
def test_a_damaged_newest_one_is_told_of_and_passed_over(tmp_path: Path, damage: str) -> None:
    made = series(tmp_path, 0, 5, 10)
    newest = made.paths()[-1]
    whole = newest.read_bytes()
    content = {
        "flipped": whole[:-1] + bytes([whole[-1] ^ 1]),
        "cut short": whole[:-1],
        "empty": b"",
    }
    newest.write_bytes(content[damage])
    said: list[str] = []
    found = made.newest(said.append)
    assert found is not None
    assert found[1].note == {"number": 5}
    [message] = said
    assert str(newest) in message
    assert message.endswith("; going on from the one before")


def test_where_all_are_damaged_it_is_told_that_all_begins_again(tmp_path: Path) -> None:
    made = series(tmp_path, 0, 5)
    for path in made.paths():
        path.write_bytes(b"")
    said: list[str] = []
    assert made.newest(said.append) is None
    assert [message.rpartition("; ")[2] for message in said] == [
        "going on from the one before",
        "beginning again",
    ]


def test_one_that_is_saved_after_damaged_ones_takes_their_place(tmp_path: Path) -> None:
    made = series(tmp_path, 7, 9, keep=2)
    for path in made.paths():
        path.write_bytes(b"")
    made.save(0, {}, {})
    assert numbers_of(made) == [0]


def test_one_that_cannot_be_written_leaves_the_earlier_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    made = series(tmp_path, 0, 5, keep=2)
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DistillError, match=r"/000000010.safetensors: cannot be written: No space"):
        made.save(10, {}, {})
    assert all(checkpoint.is_whole(path) for path in made.folder.iterdir())
    assert numbers_of(made) == [0, 5]


def test_a_cleared_series_leaves_nothing(tmp_path: Path) -> None:
    made = series(tmp_path, 0, 5)
    (made.folder / ".unfinished-0-a").write_text("of a killed process")
    made.clear()
    made.clear()
    assert list(tmp_path.iterdir()) == []
