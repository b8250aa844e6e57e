"""Compiles CUDA sources for the host: those of csrc/ into the extension module they are for."""

import hashlib
import importlib.machinery
import importlib.util
import os
import shlex
import subprocess
import sysconfig
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import filelock

SHIM = Path(__file__).resolve().parent
ROOT = SHIM.parents[1]
BUILDS = ROOT / "build" / "cuda_on_host"
SHIM_SOURCES = [
    SHIM / name
    for name in ("cuda_api.cpp", "fiber.cpp", "race.cpp", "runtime.cpp", "tensor_cores.cpp")
]
CPP_SUFFIXES = {".cpp", ".cu", ".cuh", ".h"}

FLAGS = ["-std=c++17", "-O1", "-g1", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra"]
FLAGS += ["-Wno-unknown-pragmas"]  # "unroll"
FLAGS += ['-DFSP_ARCHITECTURES="host"']
FLAGS += ["-fno-strict-aliasing"]  # kernels look at the same memory as several types
# What may watch a build, and the flags for that: of all sources, and of kernels alone.
WATCHED = {
    "": ([], []),
    "sanitizers": (
        ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"],
        [],
    ),
    "races": (["-DON_HOST_RACES"], ["-fsanitize=thread"]),  # race.h
}


def build(architecture: int = 80, watched: str = "", csrc: Path = ROOT / "csrc") -> Path:
    """The path of the module `_cuda` of csrc/, compiled unless that has been done before.

    ``watched`` is a key of :data:`WATCHED`.
    """
    import pybind11

    sources = sorted([*csrc.glob("*.cu"), *csrc.glob("*.cpp")])
    includes = [csrc, Path(pybind11.get_include()), Path(sysconfig.get_paths()["include"])]
    name = "_cuda" + sysconfig.get_config_var("EXT_SUFFIX")
    return build_library(name, sources, includes, architecture, watched)


def load(path: Path) -> ModuleType:
    """The module at `path`, in the place of `fsp_kernels._cuda` but not in sys.modules under it."""
    # Every build under a name of its own: pybind11 has one module per name in a process.
    name = f"fsp_kernels.{path.parent.name}._cuda"
    loader = importlib.machinery.ExtensionFileLoader(name, str(path))
    spec = importlib.util.spec_from_file_location(name, path, loader=loader)
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    module.__name__ = "fsp_kernels._cuda"
    return module


def sanitizer_environment() -> dict[str, str]:
    """What a process that loads a sanitized library needs in its environment from the start."""
    # libstdc++ too, or AddressSanitizer looks for __cxa_throw before it is there.
    libraries = [_file_of_compiler(name) for name in ("libasan.so", "libstdc++.so")]
    return {"LD_PRELOAD": " ".join(libraries), "ASAN_OPTIONS": "detect_leaks=0"}


def build_library(
    name: str,
    sources: Sequence[Path],
    includes: Sequence[Path],
    architecture: int = 80,
    watched: str = "",
) -> Path:
    """A shared library of the sources and the shim, in a folder named after all that went in."""
    of_all, of_kernels = WATCHED[watched]
    flags = [*FLAGS, f"-D__CUDA_ARCH__={architecture}0", *of_all]
    sources = [*sources, *SHIM_SOURCES]
    # By what is in the sources, wherever they lie.
    folder = BUILDS / _key(name, sources, [*flags, *of_kernels])
    flags += [f"-I{path}" for path in [SHIM, *includes]]
    library = folder / name
    folder.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(folder / "lock"):
        if not library.exists():
            _compile_and_link(sources, flags, of_kernels, library)
    return library


def _compile_and_link(
    sources: Sequence[Path], flags: Sequence[str], of_kernels: Sequence[str], library: Path
) -> None:
    # As nvcc does, unasked.
    of_kernels = [*of_kernels, "-include", "cuda_runtime.h"]

    def compile_one(source: Path) -> str:
        target = library.parent / (source.name + ".o")
        more = of_kernels if source.suffix == ".cu" else []
        files = ["-x", "c++", "-c", str(source), "-o", str(target)]
        _run([*_compiler(), *flags, *more, *files])
        return str(target)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compile_one, sources))
    unfinished = library.with_suffix(".unfinished")
    _run([*_compiler(), *flags, "-shared", *objects, "-o", str(unfinished)])
    unfinished.rename(library)  # whoever was interrupted leaves no library


def _key(name: str, sources: Sequence[Path], flags: Sequence[str]) -> str:
    folders = {source.parent for source in sources}
    files = {path for folder in folders for path in folder.iterdir() if path.suffix in CPP_SUFFIXES}
    digest = hashlib.sha256(repr((name, flags, _run([*_compiler(), "--version"]))).encode())
    for path in sorted(files):
        digest.update(f"\0{path.name}\0".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _compiler() -> list[str]:
    return shlex.split(os.environ.get("CXX", "g++"))


def _file_of_compiler(name: str) -> str:
    return _run([*_compiler(), f"-print-file-name={name}"]).strip()


def _run(command: Sequence[str]) -> str:
    """The command's output; if it fails, that is what the error says."""
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise RuntimeError(f"{shlex.join(command)} failed:\n{result.stdout}{result.stderr}")
    return result.stdout
