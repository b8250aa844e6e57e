"""Files that are whole or not there at all, and folders that can take them."""

from __future__ import annotations

import errno
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from accelerate.utils import gather_object
from filelock import FileLock, Timeout
from safetensors import SafetensorError

from fsp_kernels.distill.errors import DistillError

_LOCK = ".lock"
_UNFINISHED = ".unfinished-"  # what a killed process leaves behind begins so
# What network shares, FUSE and Windows say of a folder, and some of a file, that they can't flush.
_CANT_FLUSH = (errno.EACCES, errno.EBADF, errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EPERM)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path beside ``path`` to write to; it takes ``path``'s place, on the disk, at the end.

    Whenever the process or the machine stops, ``path`` is the old file or the new one.

    Raises:
        DistillError: the file cannot be written; ``path`` is as it was.
    """
    unfinished = path.with_name(f"{_UNFINISHED}{uuid.uuid4().hex[:8]}-{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished.touch()
        mode = unfinished.stat().st_mode
        yield unfinished
        _flush(unfinished)
        unfinished.chmod(mode)  # whoever wrote it may have made it private, as safetensors does
        os.replace(unfinished, path)
        _flush(path.parent)
    except (OSError, SafetensorError) as error:  # the latter wraps the former of its writes
        reason = getattr(error, "strerror", None) or error
        raise DistillError(f"{path}: cannot be written: {reason}") from error
    finally:
        with suppress(OSError):  # of a folder that is none, too
            unfinished.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """``text`` as the whole of ``path``, in UTF-8; what isn't text, as a path may be, escaped."""
    with replacing(path) as unfinished:
        unfinished.write_text(text, encoding="utf-8", errors="backslashreplace")


def remove_unfinished(folder: Path) -> None:
    """Delete what killed processes were writing in ``folder`` and below."""
    for path in folder.rglob(f"{_UNFINISHED}*"):
        path.unlink(missing_ok=True)


def is_in_use(folder: Path) -> bool:
    """Whether ``folder`` is there and holds more than what killed processes left unfinished."""
    return folder.exists() and not all(
        path.name.startswith((_UNFINISHED, _LOCK)) for path in folder.iterdir()
    )


def check_is_folder(folder: Path) -> None:
    """``folder`` is one, or could be made, under a path that all who write in it can use.

    Raises:
        DistillError: not so.
    """
    try:
        str(folder.absolute()).encode()
    except UnicodeEncodeError:
        raise DistillError(
            f"{folder.absolute()}: is no UTF-8 path, which safetensors and TensorBoard need; "
            f"choose another with --output"
        ) from None
    if folder.exists() and not folder.is_dir():
        raise DistillError(f"{folder}: is not a folder; choose another with --output")


def check_writable(folder: Path, needed: int) -> None:
    """Files can be written in ``folder`` and its disk has ``needed`` bytes left; makes the folder.

    Raises:
        DistillError: it is no folder, cannot be written to, or the disk is too full.
    """
    check_is_folder(folder)
    probe = folder / f"{_UNFINISHED}probe"
    write_text(probe, "can this be written?\n")
    probe.unlink()
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise DistillError(
            f"{folder}: its disk has {free / 2**20:,.0f} MiB free, "
            f"the run needs about {needed / 2**20:,.0f} MiB; choose another with --output"
        )


def lock(folder: Path) -> FileLock:
    """Keep other processes from training in ``folder``, until this one ends, however it does.

    Raises:
        DistillError: one is at it.
    """
    # One object for each path: a second study of this process would otherwise wait for the first.
    held = FileLock(folder / _LOCK, timeout=0, is_singleton=True)
    try:
        held.acquire()
    except Timeout:
        raise DistillError(
            f"{folder}: another process is training in it; wait for it, or choose another folder "
            f"with --output"
        ) from None
    except (OSError, NotImplementedError) as error:
        raise DistillError(f"{folder}: cannot be locked: {error}") from error
    return held


def require_agreement(found: object, folder: Path) -> None:
    """All processes ``found`` the same in ``folder``: where it is one folder, they do.

    Raises:
        DistillError: not so; each process then raises it.
    """
    if len(set(gather_object([found]))) > 1:
        raise DistillError(
            f"{folder}: not every process finds the same in it; several machines need a folder on "
            f"a disk that they share"
        )


def _flush(path: Path) -> None:
    """Have the disk hold what was written to a file, or which names a folder has, if it can."""
    try:
        # Windows flushes only what is open for writing, and opens no folder.
        descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno not in _CANT_FLUSH:
            raise
