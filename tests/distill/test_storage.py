"""Files are whole or not there, whatever stops their writing, and errors name the file."""

from __future__ import annotations

import errno
import os
import shutil
import stat
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from fsp_kernels.distill.storage import (
    check_writable,
    is_in_use,
    lock,
    remove_unfinished,
    replacing,
    write_text,
)
from fsp_kernels.errors import DistillError


def full(*_: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_text_comes_back_in_utf8_from_a_folder_that_was_made(tmp_path: Path) -> None:
    path = tmp_path / "new" / "newer" / "a"
    write_text(path, "naïve\n")
    assert path.read_bytes() == "naïve\n".encode()


def test_the_old_file_is_there_until_the_new_one_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_text("old")
    with replacing(path) as unfinished:
        unfinished.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_failing_write_leaves_the_old_file_and_no_other(
    tmp_path: Path, error: type[BaseException]
) -> None:
    path = tmp_path / "a"
    path.write_text("old")

    def fail() -> None:
        with replacing(path) as unfinished:
            unfinished.write_text("half of")
            raise error

    with pytest.raises(error):
        fail()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_the_content_is_on_the_disk_before_it_takes_the_name_and_the_name_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = []
    monkeypatch.setattr(os, "fsync", lambda file: done.append(os.fstat(file).st_ino))
    rename = os.replace
    monkeypatch.setattr(os, "replace", lambda a, b: (done.append("rename"), rename(a, b)))
    with replacing(tmp_path / "a") as unfinished:
        unfinished.write_text("new")
        written = unfinished.stat().st_ino
    assert done == [written, "rename", tmp_path.stat().st_ino]


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_disk_that_fails_at_the_end_is_an_error_that_names_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    path = tmp_path / "a"
    path.write_text("old")
    monkeypatch.setattr(os, call, full)
    with pytest.raises(DistillError, match=r"/a: cannot be written: No space left on device"):
        write_text(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("system", ["network share", "Windows"])
def test_a_file_system_that_cannot_flush_a_folder_is_good_enough(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, system: str
) -> None:
    flush, open_ = os.fsync, os.open

    def flush_files(file: int) -> None:
        if stat.S_ISDIR(os.fstat(file).st_mode):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        flush(file)

    def open_files(path: Path, flags: int, *mode: int) -> int:
        if os.path.isdir(path):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        # A file opened for reading alone could not be flushed there.
        assert flags & (os.O_RDWR | os.O_WRONLY)
        return open_(path, flags, *mode)

    if system == "Windows":
        monkeypatch.setattr(os, "open", open_files)
    else:
        monkeypatch.setattr(os, "fsync", flush_files)
    write_text(tmp_path / "a", "x")
    assert (tmp_path / "a").read_text() == "x"


@pytest.mark.parametrize("umask", [0o022, 0o027])
def test_all_files_may_be_read_by_the_same_people(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        write_text(tmp_path / "text", "x")
        with replacing(tmp_path / "tensors") as unfinished:
            save_file({"x": torch.zeros(1)}, unfinished)
            unfinished.chmod(0o600)  # as safetensors does; 0.4 did not
    finally:
        os.umask(before)
    modes = [(tmp_path / name).stat().st_mode & 0o777 for name in ("text", "tensors")]
    assert modes == [0o666 & ~umask] * 2


def test_a_path_in_a_text_need_not_be_text(tmp_path: Path) -> None:
    write_text(tmp_path / "a", f"in {os.fsdecode(b'r' + bytes([255]))}")
    assert (tmp_path / "a").read_text() == r"in r\udcff"


def test_a_folder_whose_path_is_no_text_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / os.fsdecode(b"r\xff")
    with pytest.raises(
        DistillError, match=r"is not a UTF-8 path, which safetensors and TensorBoard"
    ):
        check_writable(folder, needed=1)
    assert not folder.exists()


def test_a_full_disk_is_an_error_that_names_the_file(full_disk: Path) -> None:
    write_text(full_disk / "a", "old")
    with pytest.raises(DistillError, match=r"/full/a: cannot be written: No space left on device"):
        write_text(full_disk / "a", "n" * 100_000)
    assert (full_disk / "a").read_text() == "old"
    assert [path.name for path in full_disk.iterdir()] == ["a"]


def test_a_path_below_a_file_is_an_error_that_names_it(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("no folder")
    with pytest.raises(DistillError, match=r"/a/b: cannot be written"):
        write_text(tmp_path / "a" / "b", "x")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write to any folder")
def test_a_folder_without_permission_is_an_error_that_names_the_file(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(DistillError, match=r"/a: cannot be written: Permission denied"):
        write_text(tmp_path / "a", "x")
    tmp_path.chmod(0o700)


def test_a_folder_that_can_be_written_to_is_made_and_left_empty(tmp_path: Path) -> None:
    check_writable(tmp_path / "new", needed=1)
    assert list((tmp_path / "new").iterdir()) == []
    (tmp_path / "a").write_text("")
    with pytest.raises(DistillError, match="/a: is not a folder; choose another with --output"):
        check_writable(tmp_path / "a", needed=1)


def test_a_folder_that_cannot_be_written_to_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(os, "replace", refuse)  # as of a read-only folder, but for root too
    with pytest.raises(DistillError, match=r"/new/.*: cannot be written: Permission denied"):
        check_writable(tmp_path / "new", needed=1)


def test_a_disk_with_too_little_space_is_refused_before_it_is_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=2 << 20)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    check_writable(tmp_path, needed=2 << 20)
    with pytest.raises(DistillError, match=r"2 MiB free, the run needs about 3 MiB"):
        check_writable(tmp_path, needed=3 << 20)


def test_what_a_killed_process_left_is_removed_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "below").mkdir()
    left = []
    for folder in (tmp_path, tmp_path / "below"):
        (folder / "kept").write_text("")
        with replacing(folder / "a") as unfinished:
            unfinished.write_text("")
            left.append(unfinished.name)
        (folder / left[-1]).write_text("")  # as a killed process has no time to clear up
    remove_unfinished(tmp_path)
    names = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*"))
    assert names == ["a", "below", "below/a", "below/kept", "kept"]


def test_a_folder_with_nothing_but_what_a_killed_process_left_is_not_in_use(tmp_path: Path) -> None:
    assert not is_in_use(tmp_path / "absent")
    lock(tmp_path).release()
    with replacing(tmp_path / "a") as unfinished:
        unfinished.write_text("")
        assert not is_in_use(tmp_path)
    assert is_in_use(tmp_path)
