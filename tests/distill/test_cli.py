"""The entry point without the extra ``train``."""

from __future__ import annotations

import sys

import pytest

from fsp_kernels.distill import cli


def test_a_missing_package_is_named_with_its_remedy(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delitem(sys.modules, "fsp_kernels.distill.commands", raising=False)
    monkeypatch.setitem(sys.modules, "typer", None)  # makes `import typer` fail
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 2
    assert "typer: pip install 'fsp-kernels[train]'" in capsys.readouterr().err
