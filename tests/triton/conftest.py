"""What is about Triton alone; tests that are not about its kernels ask for no ``backend``."""

import hashlib
import os
import shutil
import subprocess
from pathlib import Path

import filelock
import pytest
import triton
from cuda_on_host.build import ROOT
from fused_fixtures import (  # noqa: F401
    in_force,
    limits,
    programs,
    regime,
    regimes,
    small,
    tf32,
    tile,
)

STUB = Path(__file__).parent / "libcuda_stub.c"


@pytest.fixture
def backend():
    with in_force("triton") as name:
        yield name


@pytest.fixture(scope="session")
def libcuda() -> Path:
    """A CUDA driver that needs no GPU, compiled unless that has been done before."""
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("needs a C compiler, as Triton does")
    key = hashlib.sha256(STUB.read_bytes() + triton.__version__.encode()).hexdigest()[:16]
    library = ROOT / "build" / "libcuda_stub" / key / "libcuda.so.1"
    library.parent.mkdir(parents=True, exist_ok=True)
    includes = Path(triton.__file__).parent / "backends" / "nvidia" / "include"
    with filelock.FileLock(library.parent / "lock"):
        if not library.exists():
            unfinished = library.with_suffix(".unfinished")
            flags = ["-shared", "-fPIC", f"-Wl,-soname,{library.name}", f"-I{includes}"]
            subprocess.run([compiler, *flags, STUB, "-o", unfinished], check=True)
            unfinished.rename(library)
    return library


@pytest.fixture(scope="session")
def over_the_stub(libcuda) -> dict[str, str]:
    """The environment of a process whose Triton compiles kernels and launches them on the stub."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    paths = [str(ROOT / "tests"), str(ROOT), os.environ.get("PYTHONPATH", "")]
    return environment | {
        "CUDA_VISIBLE_DEVICES": "",
        "LD_LIBRARY_PATH": str(libcuda.parent),
        "PYTHONPATH": os.pathsep.join(paths),
        "TRITON_CACHE_DIR": str(libcuda.parent / "cache"),
        "TRITON_LIBCUDA_PATH": str(libcuda.parent),
    }
