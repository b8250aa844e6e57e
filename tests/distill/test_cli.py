"""The entry point: without the extra ``train``, and from terminals and notebooks of all kinds."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from distill.studies import TINY_RECIPE
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


@pytest.mark.slow
@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_no_terminal_notebook_or_path_ends_a_run(tmp_path: Path, encoding: str) -> None:
    (tmp_path / os.fsdecode(b"my r\xff\xc3\xa9cipe.yaml")).write_text(TINY_RECIPE)
    arguments = [
        *("study", b"my r\xff\xc3\xa9cipe.yaml", "seeds=[0]", "arms=[two-stage]"),
        *("--output", "\N{GREEK SMALL LETTER PHI}"),
    ]
    done = subprocess.run(
        [sys.executable, "-m", "fsp_kernels.distill", *arguments],
        cwd=tmp_path,
        env=os.environ
        | {
            "PYTHONPATH": os.pathsep.join(sys.path),
            "PYTHONIOENCODING": encoding,
            "MPLBACKEND": "module://matplotlib_inline.backend_inline",
        },
        capture_output=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert b"report: \\u03c6/report.md" in done.stdout
    run = records.read(tmp_path / "\N{GREEK SMALL LETTER PHI}" / "two-stage" / "seed-0")
    assert run.config["name"] == "my-r-\N{LATIN SMALL LETTER E WITH ACUTE}cipe"


@pytest.mark.slow
def test_an_unreadable_recipe_is_named_in_any_terminal(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "fsp_kernels.distill", "study", b"r\xff.yaml"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "PYTHONIOENCODING": "ascii"},
        capture_output=True,
        timeout=300,
    )
    assert done.returncode == 2
    assert done.stderr.startswith(b"error: r\\udcff.yaml: cannot be read: No such file")
