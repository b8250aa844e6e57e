"""tools.matrix and tools.pythons: the interpreters that are found, and what a row says."""

from __future__ import annotations

import os
import platform
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from tools import matrix, pythons

TESTS = """
import pytest
def test_passes(): pass
def test_fails(): assert False
@pytest.fixture
def broken(): raise ValueError
def test_has_an_error(broken): pass
def test_is_skipped(): pytest.skip()
@pytest.mark.slow
def test_is_slow(): pass
"""
OPTION = "def pytest_addoption(parser): parser.addoption('--crosses')"


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "checkout"
    for name, text in {
        "pyproject.toml": '[tool.pytest.ini_options]\nmarkers = ["slow"]',
        "tests/conftest.py": OPTION,
        "tests/test_chosen.py": TESTS,
        "tests/test_other.py": TESTS,
        "tests/used/test_chosen_too.py": "def test_passes(): pass",
        "tests/used/test_other_too.py": TESTS,
        "tests/unused/conftest.py": "import no_such_package",
        "tests/unused/test_third.py": TESTS,
    }.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    monkeypatch.setattr(matrix, "ROOT", root)


@pytest.mark.usefixtures("checkout")
def test_a_row_counts_the_chosen_tests_alone(tmp_path: Path) -> None:
    chosen = ["tests/test_chosen.py", "tests/used/test_chosen_too.py"]
    row = matrix.run_row(sys.executable, chosen, "0", tmp_path)
    assert row[:2] == [platform.python_version(), version("torch")]
    assert row[4:7] == ["2", "2", "1"]  # passed, failed, skipped


def test_a_python_that_is_missing_is_named_in_the_table(tmp_path: Path) -> None:
    row = matrix.run_row("3.99 torch==2.6.*", [], "0", tmp_path)
    assert matrix.table([row, ["3.12.1", *"1234567"]]).splitlines() == [
        "python  torch  triton  numpy  passed  failed  skipped  seconds",
        "3.99 torch==2.6.*: no such Python was found",
        "3.12.1  1      2       3      4       5       6        7",
    ]


def test_only_a_python_that_is_missing_is_no_failure() -> None:
    assert not matrix.fails(["3.99 torch: no such Python was found"])
    assert matrix.fails(["3.12 torch: pip failed"])
    for counts, failing in (("7 0 1", False), ("7 1 1", True), ("0 0 0", True)):
        assert matrix.fails([*"1234", *counts.split(), "5"]) == failing


def interpreter(path: Path, works: bool) -> str:
    path.parent.mkdir(parents=True)
    path.write_text(f"#!/bin/sh\nexit {0 if works else 127}\n")
    path.chmod(0o755)
    return str(path)


def test_interpreters_of_pyenv_and_uv_are_found_where_none_on_path_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("PATH", f"{tmp_path / 'shims'}{os.pathsep}/bin")
    interpreter(tmp_path / "shims" / "python3.98", works=False)
    assert pythons.find("3.98") is None
    uv = ".local/share/uv/python/cpython-3.98.0-linux-x86_64-gnu/bin/python"
    by_uv = interpreter(tmp_path / uv, works=True)
    assert pythons.find("3.98") == by_uv
    by_pyenv = interpreter(tmp_path / ".pyenv/versions/3.98.1/bin/python", works=True)
    assert pythons.find("3.98") == by_pyenv
    assert pythons.find("3.9") is None
    named = interpreter(tmp_path / "path" / "python3.98", works=True)
    monkeypatch.setenv("PATH", str(tmp_path / "path"), prepend=os.pathsep)
    assert pythons.find("3.98") == named
