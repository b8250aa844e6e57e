"""Build the CUDA extension in csrc/; everything else is in pyproject.toml.

The environment variable FSP_KERNELS_CUDA decides: ``auto``, the default, builds it if nvcc is
found; ``1`` requires the build; ``0`` skips it. Nothing here needs torch.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.errors import CompileError

PACKAGE = "fsp_kernels"
# A file of the package that says why it has no extension; python -m fsp_kernels shows it.
NOTE = "cuda_build.txt"
OLDEST_NVCC = (12, 0)
CUDA = "/usr/local/cuda"  # NVIDIA's installer puts CUDA there and does not change PATH


def find_nvcc() -> str | None:
    def of(home: str | None) -> str | None:
        return os.path.join(home, "bin", "nvcc") if home else None

    get = os.environ.get
    places = (get("CUDACXX"), of(get("CUDA_HOME")), of(get("CUDA_PATH")), "nvcc", of(CUDA))
    return next(filter(None, map(shutil.which, filter(None, places))), None)


def is_recent(nvcc: str) -> bool:
    printed = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    release = re.search(r"release (\d+)\.(\d+)", printed)
    return release is not None and tuple(map(int, release.groups())) >= OLDEST_NVCC


def decide() -> tuple[str | None, str]:
    """The nvcc to build the extension with, or ``None`` and why the extension is not built."""
    wanted = os.environ.get("FSP_KERNELS_CUDA", "auto")
    if wanted not in ("auto", "1", "0"):
        raise SystemExit(f"FSP_KERNELS_CUDA is {wanted!r}: it can be auto, 1 or 0")
    if wanted == "0":
        return None, "FSP_KERNELS_CUDA=0 was set"
    nvcc = find_nvcc()
    if nvcc is None:
        reason = f"nvcc was not found (looked at CUDACXX, CUDA_HOME, CUDA_PATH, PATH and {CUDA})"
    elif not is_recent(nvcc):
        reason = f"{nvcc} was not nvcc {'.'.join(map(str, OLDEST_NVCC))} or newer"
    else:
        return nvcc, ""
    if wanted == "1":
        raise SystemExit(f"FSP_KERNELS_CUDA=1 was set, but {reason}")
    return None, reason


def tool(name: str) -> str:
    """Path of cmake or ninja, on PATH (as in pip's isolated environment) or beside this python."""
    folders = os.environ.get("PATH", os.defpath), sysconfig.get_path("scripts")
    found = shutil.which(name, path=os.pathsep.join(folders))
    if found is None:
        raise CompileError(f"{name}, which builds the CUDA extension, is not on PATH")
    return found


def pybind11_folder() -> str:
    try:
        import pybind11
    except ImportError:
        raise CompileError("the CUDA extension needs the Python package pybind11") from None
    return pybind11.get_cmake_dir()


class BuildPy(build_py):
    """Write the note if the extension is not built; remove the one that is out of date."""

    def run(self) -> None:
        super().run()
        built = Path(self.build_lib, PACKAGE)
        package = Path(self.get_package_dir(PACKAGE)) if self.editable_mode else built
        note = package / NOTE
        nvcc, reason = decide()
        if nvcc:
            note.unlink(missing_ok=True)
        else:
            self.announce(f"the CUDA extension is left out: {reason}", logging.WARNING)
            note.write_text(f"when fsp_kernels was installed, {reason}\n")
            module = f"_cuda{sysconfig.get_config_var('EXT_SUFFIX')}"
            (package / module).unlink(missing_ok=True)  # from an earlier editable install


class BuildExt(build_ext):
    """Build the extension with CMake and ninja in build/cuda."""

    def build_extension(self, ext: Extension) -> None:
        nvcc, _ = decide()
        module = Path(self.get_ext_fullpath(ext.name))
        folder = Path("build", "cuda").absolute()
        # Delete what CMake found in an earlier build: pip's isolated environment is in another
        # folder each time, and nvcc and CUDAARCHS may differ. The objects stay, and ninja compiles
        # only what has changed.
        (folder / "CMakeCache.txt").unlink(missing_ok=True)
        for compilers in folder.glob("CMakeFiles/*/CMakeSystem.cmake"):
            shutil.rmtree(compilers.parent)
        cmake = tool("cmake")
        options = {
            "CMAKE_MAKE_PROGRAM": tool("ninja"),
            "CMAKE_CUDA_COMPILER": nvcc,
            "Python_EXECUTABLE": sys.executable,
            "pybind11_DIR": pybind11_folder(),
        }
        defined = [f"-D{name}={value}" for name, value in options.items()]
        try:
            subprocess.run([cmake, "-S", "csrc", "-B", folder, "-G", "Ninja", *defined], check=True)
            subprocess.run([cmake, "--build", folder], check=True)
        except subprocess.CalledProcessError:
            raise CompileError(
                "the CUDA extension did not build, see above; FSP_KERNELS_CUDA=0 leaves it out"
            ) from None
        module.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(folder / module.name, module)


if __name__ == "__main__":
    nvcc, _ = decide()
    setup(
        # Declared only if it is built: the wheel without it is pure Python.
        ext_modules=[Extension(f"{PACKAGE}._cuda", sources=[])] if nvcc else [],
        cmdclass={"build_py": BuildPy, "build_ext": BuildExt},
    )
