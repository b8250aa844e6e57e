"""setup.py: when the CUDA extension is built, and what a wheel holds with and without it."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path
from types import ModuleType

import pytest
from setuptools.errors import CompileError

ROOT = Path(__file__).parents[1]
NOTE = "fsp_kernels/cuda_build.txt"
MODULE = f"fsp_kernels/_cuda{sysconfig.get_config_var('EXT_SUFFIX')}"
VARIABLES = ("CUDACXX", "CUDA_HOME", "CUDA_PATH", "FSP_KERNELS_CUDA", "CUDAARCHS")


def imported() -> ModuleType:
    spec = importlib.util.spec_from_file_location("fsp_kernels_setup", ROOT / "setup.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def has_nvcc() -> bool:
    setup = imported()
    nvcc = setup.find_nvcc()
    return nvcc is not None and setup.is_recent(nvcc)


def fake_nvcc(path: Path, release: str = "12.4") -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\necho 'Cuda compilation tools, release {release}, V{release}.1'\n")
    path.chmod(0o755)
    return str(path)


@pytest.fixture
def setup(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    """setup.py on a machine without an nvcc, whose PATH is an empty folder."""
    module = imported()
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path / "path"))
    monkeypatch.setattr(module, "CUDA", str(tmp_path / "cuda"))
    return module


def test_nvcc_is_looked_for_in_order(
    setup: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("CUDACXX", str(tmp_path / "named"))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("CUDA_PATH", str(tmp_path / "other"))
    folders = ("home/bin", "other/bin", "path", "cuda/bin")
    places = [tmp_path / "named", *(tmp_path / folder / "nvcc" for folder in folders)]
    for place in places:
        fake_nvcc(place)
    for place in places:
        assert setup.find_nvcc() == str(place)
        place.unlink()
    assert setup.find_nvcc() is None


def test_auto_builds_where_there_is_an_nvcc(setup: ModuleType, tmp_path: Path) -> None:
    nvcc = fake_nvcc(tmp_path / "path" / "nvcc", "12.0")
    assert setup.decide() == (nvcc, "")


def test_auto_says_where_it_looked(setup: ModuleType) -> None:
    nvcc, reason = setup.decide()
    assert nvcc is None
    for place in ("CUDACXX", "CUDA_HOME", "CUDA_PATH", "PATH", setup.CUDA):
        assert place in reason


def test_zero_leaves_it_out(
    setup: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    fake_nvcc(tmp_path / "path" / "nvcc")
    monkeypatch.setenv("FSP_KERNELS_CUDA", "0")
    assert setup.decide() == (None, "FSP_KERNELS_CUDA=0 was set")


def test_one_requires_it(setup: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FSP_KERNELS_CUDA", "1")
    with pytest.raises(SystemExit, match=r"FSP_KERNELS_CUDA=1 .* nvcc was not found"):
        setup.decide()


def test_other_values_are_an_error(setup: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FSP_KERNELS_CUDA", "yes")
    with pytest.raises(SystemExit, match="'yes': it can be auto, 1 or 0"):
        setup.decide()


@pytest.mark.parametrize("release", ["11.8", "9.2", "unreadable"])
def test_an_nvcc_that_is_too_old_is_as_good_as_none(
    setup: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, release: str
) -> None:
    path = fake_nvcc(tmp_path / "path" / "nvcc", release)
    nvcc, reason = setup.decide()
    assert nvcc is None
    assert reason == f"{path} was not nvcc 12.0 or newer"
    monkeypatch.setenv("FSP_KERNELS_CUDA", "1")
    with pytest.raises(SystemExit, match=r"was not nvcc 12\.0 or newer"):
        setup.decide()


def test_a_missing_build_tool_is_named(setup: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CompileError, match="no-such-tool"):
        setup.tool("no-such-tool")
    monkeypatch.setitem(sys.modules, "pybind11", None)
    with pytest.raises(CompileError, match="pybind11"):
        setup.pybind11_folder()


def test_the_sources_know_nothing_of_torch() -> None:
    for source in (ROOT / "csrc").iterdir():
        includes = re.findall(r"^\s*#\s*include\s*[<\"](.+)[>\"]", source.read_text(), re.MULTILINE)
        assert not [x for x in includes if x.startswith(("torch/", "ATen/", "c10/"))], source


def tree(to: Path) -> Path:
    """A copy of what a build reads, without csrc/."""
    generated = shutil.ignore_patterns("__pycache__", Path(MODULE).name, Path(NOTE).name)
    shutil.copytree(ROOT / "fsp_kernels", to / "fsp_kernels", ignore=generated)
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, to)
    return to


def run(*command: str, cwd: Path, **variables: str) -> None:
    inherited = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    done = subprocess.run(
        command, cwd=cwd, env=inherited | variables, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


def wheel(source: Path, *options: str, **variables: str) -> Path:
    output = source / "dist"
    pip = (sys.executable, "-m", "pip", "wheel", "--no-deps", "--wheel-dir", str(output), *options)
    run(*pip, ".", cwd=source, **variables)
    (made,) = output.glob("*.whl")
    return made


def content(made: Path, name: str) -> str:
    with zipfile.ZipFile(made) as opened:
        return opened.read(name).decode()


def names(made: Path) -> set[str]:
    with zipfile.ZipFile(made) as opened:
        return set(opened.namelist())


@pytest.mark.slow
def test_a_wheel_without_the_extension_is_pure_and_says_why(tmp_path: Path) -> None:
    old = fake_nvcc(tmp_path / "nvcc", "11.8")
    for label, variables, why in (
        ("zero", {"FSP_KERNELS_CUDA": "0"}, "FSP_KERNELS_CUDA=0 was set"),
        ("auto", {"CUDACXX": old}, f"{old} was not nvcc 12.0 or newer"),
    ):
        source = tree(tmp_path / label)
        made = wheel(source, "--no-build-isolation", **variables)
        assert made.name.endswith("-py3-none-any.whl")
        assert content(made, NOTE) == f"when fsp_kernels was installed, {why}\n"
        assert not [name for name in names(made) if "_cuda." in name]


def test_in_place_the_note_takes_the_place_of_an_earlier_extension(tmp_path: Path) -> None:
    source = tree(tmp_path / "tree")
    (source / MODULE).touch()
    build = "from setuptools import build_meta; build_meta.build_editable('dist')"
    (source / "dist").mkdir()
    run(sys.executable, "-c", build, cwd=source, FSP_KERNELS_CUDA="0")
    assert not (source / MODULE).exists()
    assert "FSP_KERNELS_CUDA=0" in (source / NOTE).read_text()


def test_a_source_distribution_holds_the_sources(tmp_path: Path) -> None:
    source = tree(tmp_path / "tree")
    shutil.copytree(ROOT / "csrc", source / "csrc")
    (source / NOTE).touch()  # an editable install was here
    build = "from setuptools import build_meta; build_meta.build_sdist('dist')"
    run(sys.executable, "-c", build, cwd=source, FSP_KERNELS_CUDA="0")
    (made,) = (source / "dist").glob("*.tar.gz")
    with tarfile.open(made) as opened:
        held = {name.partition("/")[2] for name in opened.getnames()}
    assert {f"csrc/{path.name}" for path in (ROOT / "csrc").iterdir()} <= held
    assert NOTE not in held


@pytest.mark.slow
@pytest.mark.skipif(not has_nvcc(), reason="no nvcc 12.0 or newer")
@pytest.mark.parametrize(
    ("architectures", "flags"),
    [
        ("90-virtual", "-Xcicc -O0"),  # PTX alone: ptxas takes most of the time
        pytest.param("90", "", marks=pytest.mark.thorough),
    ],
)
def test_a_wheel_with_the_extension_needs_no_torch_and_is_built_on(
    tmp_path: Path, architectures: str, flags: str
) -> None:
    variables = {
        "FSP_KERNELS_CUDA": "1",
        "CUDAARCHS": architectures,
        "NVCC_APPEND_FLAGS": flags,
    }
    source = tree(tmp_path / "tree")
    shutil.copytree(ROOT / "csrc", source / "csrc")
    (source / NOTE).touch()  # an editable install was here
    # Isolated: in an environment that has nothing but pyproject.toml's build requirements.
    made = wheel(source, **variables)
    assert MODULE in names(made)
    assert NOTE not in names(made)
    with zipfile.ZipFile(made) as opened:
        opened.extractall(tmp_path)
    # -S: without site-packages, where torch is.
    report = f"import _cuda; assert _cuda.architectures == {architectures!r}"
    run(sys.executable, "-S", "-c", report, cwd=tmp_path / "fsp_kernels")
    # Another isolated environment, where cmake, ninja and pybind11 lie elsewhere. What includes
    # pybind11 is compiled again, and is short here for that.
    (source / "csrc" / "bindings.cpp").write_text(
        "#include <pybind11/pybind11.h>\nPYBIND11_MODULE(_cuda, module) {}\n"
    )
    compiled = {path: path.stat().st_mtime_ns for path in source.glob("build/cuda/**/*.cu.o")}
    assert compiled
    wheel(source, **variables)
    assert {path: path.stat().st_mtime_ns for path in compiled} == compiled
