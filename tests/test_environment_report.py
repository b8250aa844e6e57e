"""``python -m fsp_kernels``."""

import json
import types

import pytest
import torch

from fsp_kernels import __main__ as report
from fsp_kernels import backends


def test_it_names_versions_and_backends(capsys: pytest.CaptureFixture[str]) -> None:
    report.main([])
    printed = capsys.readouterr().out
    assert torch.__version__ in printed
    assert "backend torch" in printed


def test_json_holds_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    report.main(["--json"])
    assert json.loads(capsys.readouterr().out) == report.environment()


def test_it_says_why_a_backend_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    class Missing:
        name = "missing"

        def why_unavailable(self) -> str:
            return "it was never built"

    monkeypatch.setitem(backends._REGISTRY, "missing", Missing())
    assert report.environment()["backend missing"] == "not available: it was never built"


def test_it_says_which_backend_was_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FSP_KERNELS_BACKEND", "torch")
    assert report.environment()["backend requested"] == "torch"


def test_it_says_for_which_chips_the_extension_is(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.SimpleNamespace(architectures="90-real 90-virtual")
    monkeypatch.setattr(report, "extension", lambda: module)
    assert report.environment()["cuda extension"] == "built for 90-real 90-virtual"


def test_it_says_why_there_is_no_extension(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "extension", lambda: "its extension is not built: no nvcc")
    assert report.environment()["cuda extension"] == "is not built: no nvcc"
