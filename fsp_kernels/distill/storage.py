"""Files that are whole or absent, and checks of the folders that hold them."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from accelerate.utils import gather_object
from filelock import FileLock, Timeout
from safetensors import SafetensorError

from fsp_kernels.errors import DistillError

_LOCK = ".lock"
_UNFINISHED = ".unfinished-"  # prefix of files that are being written


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path to write to; flush it and rename it to ``path`` when the block ends.

    Whenever the process or the machine stops, ``path`` holds the old content or the new one.

    Raises:
        DistillError: the file cannot be written; ``path`` is unchanged.
    """
    unfinished = path.with_name(f"{_UNFINISHED}{uuid.uuid4().hex[:8]}-{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished.touch()
        mode = unfinished.stat().st_mode
        yield unfinished
        _flush(unfinished, os.O_RDWR)  # Windows flushes only files that are open for writing
        unfinished.chmod(mode)  # safetensors makes its files private
        os.replace(unfinished, path)
        with suppress(OSError):  # network shares, FUSE and Windows cannot flush a folder
            _flush(path.parent, os.O_RDONLY)
    except (OSError, SafetensorError) as error:  # SafetensorError wraps an OSError of its writes
        reason = getattr(error, "strerror", None) or error
        raise DistillError(f"{path}: cannot be written: {reason}") from error
    finally:
        with suppress(OSError):  # the parent may be no folder
            unfinished.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write ``text`` to ``path`` in UTF-8; surrogates, as of undecodable paths, are escaped."""
    with replacing(path) as unfinished:
        unfinished.write_text(text, encoding="utf-8", errors="backslashreplace")


def remove_unfinished(folder: Path) -> None:
    """Delete the temporary files that killed processes left in ``folder`` and below."""
    for path in folder.rglob(f"{_UNFINISHED}*"):
        path.unlink(missing_ok=True)


def is_in_use(folder: Path) -> bool:
    """Whether ``folder`` exists and holds more than temporary files and a lock."""
    return folder.exists() and not all(
        path.name.startswith((_UNFINISHED, _LOCK)) for path in folder.iterdir()
    )


def check_is_folder(folder: Path) -> None:
    """Check that ``folder`` is a folder or does not exist, and that its path is valid UTF-8.

    Raises:
        DistillError: it is not so.
    """
    try:
        str(folder.absolute()).encode()
    except UnicodeEncodeError:
        raise DistillError(
            f"{folder.absolute()}: is not a UTF-8 path, which safetensors and TensorBoard need; "
            f"choose another with --output"
        ) from None
    if folder.exists() and not folder.is_dir():
        raise DistillError(f"{folder}: is not a folder; choose another with --output")


def check_writable(folder: Path, needed: int) -> None:
    """Make ``folder`` and check that it can be written to and has ``needed`` bytes of space.

    Raises:
        DistillError: it is not a folder, cannot be written to, or its disk is too full.
    """
    check_is_folder(folder)
    probe = folder / f"{_UNFINISHED}probe"
    write_text(probe, "test\n")
    probe.unlink()
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise DistillError(
            f"{folder}: its disk has {free / 2**20:,.0f} MiB free, "
            f"the run needs about {needed / 2**20:,.0f} MiB; choose another with --output"
        )


def lock(folder: Path) -> FileLock:
    """Lock ``folder`` against other processes until this process ends.

    Raises:
        DistillError: another process holds the lock, or ``folder`` cannot be locked.
    """
    # A singleton, so that a second study of this process does not wait for the first.
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
    """Check that all processes ``found`` the same in ``folder``, as they do in a shared folder.

    Raises:
        DistillError: they did not; every process raises it.
    """
    if len(set(gather_object([found]))) > 1:
        raise DistillError(
            f"{folder}: not every process finds the same in it; several machines need a folder "
            f"on a disk that they share"
        )


def _flush(path: Path, flags: int) -> None:
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
