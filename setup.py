"""Build the compiled modules of csrc/; everything else is in pyproject.toml.

The environment variables FSP_KERNELS_CUDA and FSP_KERNELS_CPU decide, each for its module:
``auto``, the default, builds it if a compiler is found; ``1`` requires the build; ``0`` skips it.
Nothing here needs torch.
"""

from __future__ import annotations

import logging
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.errors import CompileError

PACKAGE = "fsp_kernels"
OLDEST_NVCC = (12, 0)
CUDA = "/usr/local/cuda"  # NVIDIA's installer puts CUDA there and does not change PATH
Found = tuple[str | None, str]  # a compiler, or None and why there is none


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


def find_recent_nvcc() -> Found:
    nvcc = find_nvcc()
    if nvcc is None:
        places = f"CUDACXX, CUDA_HOME, CUDA_PATH, PATH and {CUDA}"
        return None, f"nvcc was not found (looked at {places})"
    if not is_recent(nvcc):
        return None, f"{nvcc} was not nvcc {'.'.join(map(str, OLDEST_NVCC))} or newer"
    return nvcc, ""


def find_cxx() -> Found:
    """CXX may hold options or a launcher, e.g. ``ccache g++``. CMake understands them."""
    if platform.system() == "Windows":
        return None, "the CPU kernels could not be compiled on Windows"
    for command in (os.environ.get("CXX"), "c++", "g++", "clang++"):
        if command and shutil.which(command.split()[0]):
            return command, ""
    return None, "no C++ compiler was found (looked at CXX, and for c++, g++ and clang++ on PATH)"


class Module(NamedTuple):
    """A compiled module of the package, ``fsp_kernels._<name>``."""

    name: str
    sources: str  # the folder of its CMakeLists.txt
    find_compiler: Callable[[], Found]
    compiler_variable: str  # names the compiler to CMake
    may_fail: bool  # with ``auto``, whether the package is installed if this does not compile

    @property
    def title(self) -> str:
        return f"the {self.name.upper()} extension"

    @property
    def variable(self) -> str:
        return f"FSP_KERNELS_{self.name.upper()}"

    @property
    def file(self) -> str:
        return f"_{self.name}{sysconfig.get_config_var('EXT_SUFFIX')}"

    @property
    def note(self) -> str:
        """A file that says why the package has no such module; backends/compiled.py reads it."""
        return f"{self.name}_build.txt"

    @property
    def wanted(self) -> str:
        value = os.environ.get(self.variable, "auto")
        if value not in ("auto", "1", "0"):
            raise SystemExit(f"{self.variable} is {value!r}: it can be auto, 1 or 0")
        return value

    def decide(self) -> Found:
        """The compiler to build the module with, or ``None`` and why the module is not built."""
        if self.wanted == "0":
            return None, f"{self.variable}=0 was set"
        compiler, reason = self.find_compiler()
        if compiler is None and self.wanted == "1":
            raise SystemExit(f"{self.variable}=1 was set, but {reason}")
        return compiler, reason

    def extension(self) -> Extension:
        optional = self.may_fail and self.wanted == "auto"
        return Extension(f"{PACKAGE}._{self.name}", sources=[], optional=optional)

    def leave_out(self, package: Path, reason: str) -> None:
        """Write the note; remove the module of an earlier build, which is out of date."""
        package.mkdir(parents=True, exist_ok=True)
        (package / self.note).write_text(f"when fsp_kernels was built, {reason}\n")
        (package / self.file).unlink(missing_ok=True)


MODULES = {
    module.name: module
    for module in (
        Module("cuda", "csrc", find_recent_nvcc, "CUDACXX", may_fail=False),
        Module("cpu", "csrc/cpu", find_cxx, "CXX", may_fail=True),
    )
}


def tool(name: str) -> str:
    """Path of cmake or ninja, on PATH (as in pip's isolated environment) or beside this python."""
    folders = os.environ.get("PATH", os.defpath), sysconfig.get_path("scripts")
    found = shutil.which(name, path=os.pathsep.join(folders))
    if found is None:
        raise CompileError(f"{name} was not on PATH")
    return found


def pybind11_folder() -> str:
    try:
        import pybind11
    except ImportError:
        raise CompileError("the Python package pybind11 was not installed") from None
    return pybind11.get_cmake_dir()


def compile_module(module: Module) -> Path:
    """Build it with CMake and ninja in build/<name>. Returns its path."""
    compiler, _ = module.decide()
    folder = Path("build", module.name).absolute()
    # Delete what CMake found in an earlier build: pip's isolated environment is in another folder
    # each time, and the compiler and CUDAARCHS may differ. The objects stay, and ninja compiles
    # only what has changed.
    (folder / "CMakeCache.txt").unlink(missing_ok=True)
    for compilers in folder.glob("CMakeFiles/*/CMakeSystem.cmake"):
        shutil.rmtree(compilers.parent)
    cmake = tool("cmake")
    options = {
        "CMAKE_MAKE_PROGRAM": tool("ninja"),
        "Python_EXECUTABLE": sys.executable,
        "pybind11_DIR": pybind11_folder(),
    }
    defined = [f"-D{name}={value}" for name, value in options.items()]
    configure = [cmake, "-S", module.sources, "-B", folder, "-G", "Ninja", *defined]
    environment = os.environ | {module.compiler_variable: compiler}
    try:
        subprocess.run(configure, check=True, env=environment)
        subprocess.run([cmake, "--build", folder], check=True)
    except subprocess.CalledProcessError:
        other = f"{module.compiler_variable} names another compiler"
        raise CompileError(f"the build with {compiler} failed ({other})") from None
    return folder / module.file


def package_of(command: build_py | build_ext) -> Path:
    """The folder where the package is put together: in an editable install, that of its sources."""
    return Path("" if command.editable_mode else command.build_lib, PACKAGE)


class BuildPy(build_py):
    """Leave out the modules that are not built."""

    def run(self) -> None:
        super().run()
        package = package_of(self)
        for module in MODULES.values():
            compiler, reason = module.decide()
            if compiler:
                (package / module.note).unlink(missing_ok=True)
            else:
                self.announce(f"{module.title} is left out: {reason}", logging.WARNING)
                module.leave_out(package, reason)


class BuildExt(build_ext):
    """Build the others. One that is optional is left out if it does not compile."""

    def run(self) -> None:
        super().run()
        built = [x for x in self.extensions if Path(self.get_ext_fullpath(x.name)).exists()]
        self.extensions = self.distribution.ext_modules = built
        wheel = self.distribution.get_command_obj("bdist_wheel", create=False)
        if wheel:  # it was prepared before anything was built
            wheel.root_is_pure = not built

    def build_extension(self, ext: Extension) -> None:
        module = MODULES[ext.name.removeprefix(f"{PACKAGE}._")]
        try:
            built = compile_module(module)
        except CompileError as error:
            if not ext.optional:
                why = f"{module.title} was not built: {error}. {module.variable}=0 skips it"
                raise CompileError(why) from None
            reason = f"{error}; with {module.variable}=1, pip shows the errors"
            module.leave_out(package_of(self), reason)
            raise  # setuptools prints it as a warning
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(built, target)


if __name__ == "__main__":
    setup(
        # Declared only if they are built: the wheel without them is pure Python.
        ext_modules=[x.extension() for x in MODULES.values() if x.decide()[0]],
        cmdclass={"build_py": BuildPy, "build_ext": BuildExt},
    )
