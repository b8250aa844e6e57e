"""setup.py: when the extensions are built, and what a wheel holds with and without them."""

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

from fsp_kernels import __version__

ROOT = Path(__file__).parents[1]
NAMES = ("cuda", "cpu")
NOTE = {name: f"fsp_kernels/{name}_build.txt" for name in NAMES}
MODULE = {name: f"fsp_kernels/_{name}{sysconfig.get_config_var('EXT_SUFFIX')}" for name in NAMES}
SWITCH = {name: f"FSP_KERNELS_{name.upper()}" for name in NAMES}
DIST_INFO = f"fsp_kernels-{__version__}.dist-info"
SKIPPED = dict.fromkeys(SWITCH.values(), "0")
COMPILERS = ("CUDACXX", "CUDA_HOME", "CUDA_PATH", "CXX")
VARIABLES = (*COMPILERS, *SWITCH.values(), "CUDAARCHS")


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


def fake_program(path: Path, line: str = "") -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{line}\n")
    path.chmod(0o755)
    return str(path)


def fake_nvcc(path: Path, release: str = "12.4") -> str:
    return fake_program(path, f"echo 'Cuda compilation tools, release {release}, V{release}.1'")


def fake_compiler(name: str, folder: Path) -> str:
    """Put a compiler on a PATH that has this folder. Returns what `decide` calls it."""
    return fake_nvcc(folder / "nvcc") if name == "cuda" else Path(fake_program(folder / "c++")).name


@pytest.fixture
def setup(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    """setup.py on a machine without a compiler, whose PATH is an empty folder."""
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


def test_a_cxx_compiler_is_looked_for_in_order(
    setup: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    named = fake_program(tmp_path / "named")
    monkeypatch.setenv("CXX", named)
    on_path = ("c++", "g++", "clang++")
    for name in on_path:
        fake_program(tmp_path / "path" / name)
    for command in (named, *on_path):
        assert setup.find_cxx() == (command, "")
        (tmp_path / "path" / command).unlink()
    assert setup.find_cxx()[0] is None


def test_cxx_may_have_a_launcher_and_options(
    setup: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    command = f"{fake_program(tmp_path / 'ccache')} clang++ -stdlib=libc++"
    monkeypatch.setenv("CXX", command)
    assert setup.find_cxx() == (command, "")


def test_the_cpu_extension_is_not_for_windows(
    setup: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    fake_compiler("cpu", tmp_path / "path")
    monkeypatch.setattr(setup.platform, "system", lambda: "Windows")
    compiler, reason = setup.MODULES["cpu"].decide()
    assert compiler is None
    assert "Windows" in reason


@pytest.mark.parametrize("name", NAMES)
def test_auto_builds_where_there_is_a_compiler(
    setup: ModuleType, tmp_path: Path, name: str
) -> None:
    compiler = fake_compiler(name, tmp_path / "path")
    assert setup.MODULES[name].decide() == (compiler, "")


@pytest.mark.parametrize(
    ("name", "places"),
    [
        ("cuda", ("CUDACXX", "CUDA_HOME", "CUDA_PATH", "PATH", "{CUDA}")),
        ("cpu", ("CXX", "c++", "g++", "clang++", "PATH")),
    ],
)
def test_auto_says_where_it_looked(setup: ModuleType, name: str, places: tuple[str, ...]) -> None:
    compiler, reason = setup.MODULES[name].decide()
    assert compiler is None
    for place in places:
        assert place.format(CUDA=setup.CUDA) in reason


@pytest.mark.parametrize("name", NAMES)
def test_zero_leaves_it_out(
    setup: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str
) -> None:
    fake_compiler(name, tmp_path / "path")
    monkeypatch.setenv(SWITCH[name], "0")
    assert setup.MODULES[name].decide() == (None, f"{SWITCH[name]}=0 was set")


@pytest.mark.parametrize(
    ("name", "what"), [("cuda", "nvcc was not"), ("cpu", r"no C\+\+ compiler")]
)
def test_one_requires_it(
    setup: ModuleType, monkeypatch: pytest.MonkeyPatch, name: str, what: str
) -> None:
    monkeypatch.setenv(SWITCH[name], "1")
    with pytest.raises(SystemExit, match=f"{SWITCH[name]}=1 was set, but {what}"):
        setup.MODULES[name].decide()


@pytest.mark.parametrize("name", NAMES)
def test_other_values_are_an_error(
    setup: ModuleType, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv(SWITCH[name], "yes")
    with pytest.raises(SystemExit, match=f"{SWITCH[name]} is 'yes': it can be auto, 1 or 0"):
        setup.MODULES[name].decide()


@pytest.mark.parametrize("release", ["11.8", "9.2", "unreadable"])
def test_an_nvcc_that_is_too_old_is_as_good_as_none(
    setup: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, release: str
) -> None:
    path = fake_nvcc(tmp_path / "path" / "nvcc", release)
    nvcc, reason = setup.MODULES["cuda"].decide()
    assert nvcc is None
    assert reason == f"{path} was not nvcc 12.0 or newer"
    monkeypatch.setenv("FSP_KERNELS_CUDA", "1")
    with pytest.raises(SystemExit, match=r"was not nvcc 12\.0 or newer"):
        setup.MODULES["cuda"].decide()


def test_a_missing_build_tool_is_named(setup: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CompileError, match="no-such-tool"):
        setup.tool("no-such-tool")
    monkeypatch.setitem(sys.modules, "pybind11", None)
    with pytest.raises(CompileError, match="pybind11"):
        setup.pybind11_folder()


def sources() -> list[Path]:
    return [path for path in (ROOT / "csrc").rglob("*") if path.is_file()]


def test_the_sources_know_nothing_of_torch() -> None:
    for source in sources():
        includes = re.findall(r"^\s*#\s*include\s*[<\"](.+)[>\"]", source.read_text(), re.MULTILINE)
        assert not [x for x in includes if x.startswith(("torch/", "ATen/", "c10/"))], source


def tree(to: Path) -> Path:
    """A copy of what a build reads, without csrc/."""
    generated = shutil.ignore_patterns("__pycache__", "_*.so", "*_build.txt")
    shutil.copytree(ROOT / "fsp_kernels", to / "fsp_kernels", ignore=generated)
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, to)
    return to


def run(*command: str, cwd: Path, fails: bool = False, **variables: str) -> str:
    inherited = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    done = subprocess.run(
        command, cwd=cwd, env=inherited | variables, capture_output=True, text=True
    )
    printed = done.stdout + done.stderr
    assert (done.returncode != 0) == fails, printed
    return printed


def build(what: str, source: Path, fails: bool = False, **variables: str) -> str:
    """Call setuptools as pip does, but in this environment. ``what`` is editable or sdist."""
    (source / "dist").mkdir()
    code = f"from setuptools import build_meta; build_meta.build_{what}('dist')"
    return run(sys.executable, "-c", code, cwd=source, fails=fails, **variables)


def cpu_tools(folder: Path, works: bool) -> dict[str, str]:
    """A machine whose C++ compiler is c++, and whose cmake leaves an empty module if it works."""
    module = Path(MODULE["cpu"]).name
    lines = (
        'case "$1" in',
        f'--build) mkdir -p "$2" && touch "$2/{module}" ;;',
        '*) [ "$CXX" = c++ ] ;;',
        "esac",
    )
    fake_program(folder / "cmake", "\n".join(lines) if works else "exit 1")
    for name in ("ninja", "c++"):
        fake_program(folder / name)
    return {"PATH": f"{folder}{os.pathsep}{os.environ['PATH']}", SWITCH["cuda"]: "0"}


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
def test_a_wheel_without_the_extensions_is_pure_and_says_why(tmp_path: Path) -> None:
    old = fake_nvcc(tmp_path / "nvcc", "11.8")
    tools = cpu_tools(tmp_path / "tools", works=False)
    for label, variables, cuda, cpu in (
        ("zero", SKIPPED, "FSP_KERNELS_CUDA=0 was set", "FSP_KERNELS_CPU=0 was set"),
        (
            "auto",
            tools | {"CUDACXX": old, SWITCH["cuda"]: "auto"},
            f"{old} was not nvcc 12.0 or newer",
            "the build with c++ failed (CXX names another compiler); "
            "with FSP_KERNELS_CPU=1, pip shows the errors",
        ),
    ):
        source = tree(tmp_path / label)
        made = wheel(source, "--no-build-isolation", **variables)
        assert made.name.endswith("-py3-none-any.whl")
        assert "Root-Is-Purelib: true" in content(made, DIST_INFO + "/WHEEL")
        assert content(made, NOTE["cuda"]) == f"when fsp_kernels was built, {cuda}\n"
        assert content(made, NOTE["cpu"]) == f"when fsp_kernels was built, {cpu}\n"
        assert not names(made) & set(MODULE.values())
    with zipfile.ZipFile(made) as opened:
        opened.extractall(tmp_path / "installed")
    # An editable install of this library would lend its modules.
    code = (
        "import sys; from importlib import machinery as m; "
        "sys.meta_path[:] = [m.BuiltinImporter, m.FrozenImporter, m.PathFinder]; "
        "from fsp_kernels.__main__ import main; main([])"
    )
    report = run(sys.executable, "-c", code, cwd=tmp_path / "installed")
    assert f"is not built: when fsp_kernels was built, {cpu}\n" in report


@pytest.mark.parametrize("name", NAMES)
def test_in_place_the_note_takes_the_place_of_an_earlier_extension(
    tmp_path: Path, name: str
) -> None:
    source = tree(tmp_path / "tree")
    (source / MODULE[name]).touch()
    build("editable", source, **SKIPPED)
    assert not (source / MODULE[name]).exists()
    assert f"{SWITCH[name]}=0" in (source / NOTE[name]).read_text()


def test_in_place_a_build_that_fails_leaves_the_note_alone(tmp_path: Path) -> None:
    source = tree(tmp_path / "tree")
    (source / MODULE["cpu"]).touch()
    printed = build("editable", source, **cpu_tools(tmp_path, works=False))
    assert "the build with c++ failed" in printed
    assert not (source / MODULE["cpu"]).exists()
    assert "the build with c++ failed" in (source / NOTE["cpu"]).read_text()


def test_in_place_the_extension_takes_the_place_of_an_earlier_note(tmp_path: Path) -> None:
    source = tree(tmp_path / "tree")
    (source / NOTE["cpu"]).touch()
    build("editable", source, **cpu_tools(tmp_path, works=True))
    assert (source / MODULE["cpu"]).exists()
    assert not (source / NOTE["cpu"]).exists()


def test_with_one_a_build_that_fails_is_an_error(tmp_path: Path) -> None:
    source = tree(tmp_path / "tree")
    variables = cpu_tools(tmp_path, works=False) | {"FSP_KERNELS_CPU": "1"}
    printed = build("editable", source, fails=True, **variables)
    assert "the build with c++ failed (CXX names another compiler)" in printed
    assert "FSP_KERNELS_CPU=0 skips it" in printed


def test_a_source_distribution_holds_the_sources(tmp_path: Path) -> None:
    source = tree(tmp_path / "tree")
    shutil.copytree(ROOT / "csrc", source / "csrc")
    for note in NOTE.values():
        (source / note).touch()  # an editable install was here
    (source / "tests").mkdir()
    (source / "tests" / "test_plan.py").touch()
    build("sdist", source, **SKIPPED)
    (made,) = (source / "dist").glob("*.tar.gz")
    with tarfile.open(made) as opened:
        held = {name.partition("/")[2] for name in opened.getnames()}
    assert {path.relative_to(ROOT).as_posix() for path in sources()} <= held
    assert {"LICENSE", "README.md", "pyproject.toml", "setup.py"} <= held
    assert not held & set(NOTE.values())
    assert "tests/test_plan.py" not in held  # it needs files that setuptools leaves out


@pytest.mark.slow
@pytest.mark.skipif(imported().find_cxx()[0] is None, reason="no C++ compiler")
def test_a_wheel_with_the_cpu_extension_needs_no_torch(tmp_path: Path) -> None:
    source = tree(tmp_path / "tree")
    shutil.copytree(ROOT / "csrc", source / "csrc")
    for name in NAMES:
        (source / NOTE[name]).touch()  # an editable install was here
    # Isolated: in an environment that has nothing but pyproject.toml's build requirements.
    # Debug: not optimised, so that it compiles sooner.
    made = wheel(source, FSP_KERNELS_CUDA="0", FSP_KERNELS_CPU="1", CMAKE_BUILD_TYPE="Debug")
    assert not made.name.endswith("-any.whl")
    assert {MODULE["cpu"], NOTE["cuda"]} <= names(made)
    assert not {MODULE["cuda"], NOTE["cpu"]} & names(made)
    with zipfile.ZipFile(made) as opened:
        opened.extractall(tmp_path)
    # -S: without site-packages, where torch is.
    report = "import _cpu; assert isinstance(_cpu.instruction_sets, list)"
    run(sys.executable, "-S", "-c", report, cwd=tmp_path / "fsp_kernels")


@pytest.mark.slow
@pytest.mark.skipif(not has_nvcc(), reason="no nvcc 12.0 or newer")
@pytest.mark.parametrize(
    ("architectures", "flags"),
    [
        ("90-virtual", "-Xcicc -O0"),  # PTX alone: ptxas takes most of the time
        pytest.param("90", "", marks=pytest.mark.thorough),
    ],
)
def test_a_wheel_with_the_cuda_extension_needs_no_torch_and_is_built_on(
    tmp_path: Path, architectures: str, flags: str
) -> None:
    variables = {
        "FSP_KERNELS_CUDA": "1",
        "FSP_KERNELS_CPU": "0",
        "CUDAARCHS": architectures,
        "NVCC_APPEND_FLAGS": flags,
    }
    source = tree(tmp_path / "tree")
    shutil.copytree(ROOT / "csrc", source / "csrc")
    (source / NOTE["cuda"]).touch()  # an editable install was here
    # Isolated: in an environment that has nothing but pyproject.toml's build requirements.
    made = wheel(source, **variables)
    assert MODULE["cuda"] in names(made)
    assert NOTE["cuda"] not in names(made)
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
