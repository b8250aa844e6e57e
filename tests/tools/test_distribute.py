"""tools.distribute: the programs that installed wheels run. `make dist` runs all of it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tools import distribute

COMPILED = "fsp_kernels-0.1.0-cp311-cp311-manylinux_2_34_x86_64.whl"
PURE = "fsp_kernels-0.1.0-py3-none-any.whl"


def without_torch(installed: Path, wheel: str) -> subprocess.CompletedProcess[str]:
    """Run the program where ``installed`` has packages. -S: without site-packages."""
    command = [sys.executable, "-S", "-c", distribute.WITHOUT_TORCH, wheel]
    return subprocess.run(command, cwd=installed, capture_output=True, text=True)


@pytest.fixture
def installed(tmp_path: Path) -> Path:
    package = tmp_path / "fsp_kernels"
    package.mkdir()
    (package / "__init__.py").write_text("import torch")
    return tmp_path


def test_a_wheel_with_a_module_must_have_one_that_can_be_imported(installed: Path) -> None:
    failed = without_torch(installed, COMPILED)
    assert "No module named '_cpu'" in failed.stderr
    (installed / "fsp_kernels" / "_cpu.py").write_text("instruction_sets = ['avx2']")
    assert without_torch(installed, COMPILED).stdout == "['avx2']\n"


def test_a_pure_wheel_needs_no_module(installed: Path) -> None:
    assert without_torch(installed, PURE).returncode == 0


def test_an_environment_with_torch_proves_nothing(installed: Path) -> None:
    (installed / "torch.py").touch()
    assert without_torch(installed, PURE).returncode == 1


def test_the_program_is_the_first_of_the_readme() -> None:
    lines = distribute.usage().splitlines()
    assert lines[0] == "import torch, fsp_kernels as fsp"
    assert lines[-1] == "loss.backward()"
