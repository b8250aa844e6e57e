"""The entry point: without the extra ``train``, and in terminals and notebooks of all kinds."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from studies import TINY_RECIPE

from fsp_kernels.distill import cli, records


def test_a_missing_package_is_named_with_its_remedy(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delitem(sys.modules, "fsp_kernels.distill.commands", raising=False)
    monkeypatch.setitem(sys.modules, "typer", None)  # makes `import typer` fail
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 2
    assert "typer: pip install 'fsp-kernels[train]'" in capsys.readouterr().err


def study_in_terminal(
    folder: Path, encoding: str, *arguments: str | bytes
) -> subprocess.CompletedProcess[bytes]:
    environment = {
        "PYTHONPATH": os.pathsep.join(sys.path),
        "PYTHONIOENCODING": encoding,
        "MPLBACKEND": "module://matplotlib_inline.backend_inline",
    }
    command = [sys.executable, "-m", "fsp_kernels.distill", "study", *arguments]
    environment = os.environ | environment
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, timeout=300)


@pytest.mark.slow
@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_no_terminal_notebook_or_path_ends_a_run(tmp_path: Path, encoding: str) -> None:
    (tmp_path / os.fsdecode(b"my r\xff\xc3\xa9cipe.yaml")).write_text(TINY_RECIPE)
    overrides = ("seeds=[0]", "arms=[two-stage]", "--output", "\u03c6")
    overrides += ("teacher_training.steps=2", "stage1.steps=2", "stage2.steps=2")
    done = study_in_terminal(tmp_path, encoding, b"my r\xff\xc3\xa9cipe.yaml", *overrides)
    assert done.returncode == 0, done.stderr
    assert b"report: \\u03c6/report.md" in done.stdout
    run = records.read(tmp_path / "\u03c6" / "two-stage" / "seed-0")
    assert run.config["name"] == "my-r-\u00e9cipe"


@pytest.mark.slow
def test_an_unreadable_recipe_is_named_in_any_terminal(tmp_path: Path) -> None:
    done = study_in_terminal(tmp_path, "ascii", b"r\xff.yaml")
    assert done.returncode == 2
    assert done.stderr.startswith(b"error: r\\udcff.yaml: cannot be read: No such file")
