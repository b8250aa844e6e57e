"""csrc/ compiled for the host as the extension: the CUDA backend then serves the CPU."""

import ctypes
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import ModuleType

import pytest
from cuda_on_host.build import build, load

from fsp_kernels.backends import registered_backends
from fsp_kernels.backends.compiled import compiled_module
from fsp_kernels.backends.cuda import extension, product

NAME = "fsp_kernels._cuda"
# What ``pytest --host-cuda`` chooses from: the architecture, and what watches.
HOST_BUILDS = {
    "80": (80, ""),
    "75": (75, ""),
    "80-sanitized": (80, "sanitizers"),
    "75-sanitized": (75, "sanitizers"),
    "80-races": (80, "races"),
    "75-races": (75, "races"),
}


@cache  # a process loads each build once
def host_cuda_module(architecture: int = 80, watched: str = "") -> ModuleType:
    """csrc/ as that chip would run it, compiled unless that has been done before."""
    return load(build(architecture, watched))


class Seen(ctypes.Structure):
    """What a build for the host tells, and is told, of its two devices: cuda_api.cpp, ``seen``."""

    _fields_ = (
        ("launches", ctypes.c_int * 2),
        ("capturing", ctypes.c_int),
        ("observer", ctypes.c_void_p),
        ("observed", ctypes.c_int),
    )


class Machine:
    """A copy of a build on which nothing has happened yet."""

    def __init__(self, folder: Path, architecture: int = 80):
        path = Path(shutil.copy(build(architecture), folder))
        self.module = load(path)
        self._library = ctypes.CDLL(str(path))
        self._library.on_host_seen.restype = ctypes.POINTER(Seen)
        self.seen: Seen = self._library.on_host_seen().contents

    @property
    def current_device(self) -> int:
        """Of this thread."""
        return self._library.on_host_device()


@contextmanager
def extension_is(module: ModuleType | None) -> Iterator[None]:
    """The backend finds this module for its extension, or none; nothing is prepared by another."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, NAME, module)
        _forget()
        yield
    _forget()


def _forget() -> None:
    compiled_module.cache_clear()
    extension.why_unavailable.cache_clear()
    extension.why_not_on.cache_clear()
    product._prepared_product.cache_clear()
    registered_backends()["cuda"].prepared.clear()
