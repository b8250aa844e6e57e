"""backends/compiled.py: what is found of a compiled module."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from importlib.machinery import PathFinder
from pathlib import Path

import pytest

import fsp_kernels
from fsp_kernels.backends import compiled
from fsp_kernels.backends.compiled import compiled_module


@pytest.fixture(params=["cuda", "cpu"])
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(autouse=True)
def folder(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """An empty folder, in the place of the one where modules and notes are."""
    monkeypatch.delitem(sys.modules, f"fsp_kernels._{name}", raising=False)
    monkeypatch.setattr(fsp_kernels, "__path__", [str(tmp_path)])
    monkeypatch.setattr(sys, "meta_path", [PathFinder])  # without that of an editable install
    monkeypatch.setattr(compiled, "NOTES", tmp_path)
    compiled_module.cache_clear()
    yield tmp_path
    sys.modules.pop(f"fsp_kernels._{name}", None)
    compiled_module.cache_clear()


def test_the_module_is_imported_once(name: str, folder: Path) -> None:
    (folder / f"_{name}.py").write_text("instruction_sets = ['avx2']\n")
    found = compiled_module(name)
    assert not isinstance(found, str)
    assert found.instruction_sets == ["avx2"]
    del sys.modules[f"fsp_kernels._{name}"]
    assert compiled_module(name) is found


def test_without_it_one_is_told_how_to_build_it(name: str) -> None:
    assert compiled_module(name) == f"its extension is not built: {compiled.HOW_TO_BUILD[name]}"


def test_without_it_the_note_is_told_if_there_is_one(name: str, folder: Path) -> None:
    (folder / f"{name}_build.txt").write_text("when fsp_kernels was built, it was left out\n")
    assert compiled_module(name) == (
        "its extension is not built: when fsp_kernels was built, it was left out"
    )


def test_a_module_that_cannot_be_loaded_says_why(name: str, folder: Path) -> None:
    why = "libgomp.so.1: cannot open shared object file"
    (folder / f"_{name}.py").write_text(f"raise ImportError({why!r})\n")
    assert compiled_module(name) == f"its extension cannot be loaded: {why}"


def test_importing_the_library_imports_no_compiled_module(name: str) -> None:
    code = f"import sys, fsp_kernels; print('fsp_kernels._{name}' in sys.modules)"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd="/"
    )
    assert result.stdout.strip() == "False"
