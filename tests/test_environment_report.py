"""``python -m fsp_kernels``, and what an import of the library takes."""

import json
import subprocess
import sys
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


def found(monkeypatch: pytest.MonkeyPatch, **modules: object) -> None:
    """The compiled modules, by name, are these."""
    missing = "its extension is not built: {} is not here"
    find = lambda name: modules.get(name, missing.format(name))  # noqa: E731
    monkeypatch.setattr(report, "compiled_module", find)


def test_it_says_for_which_chips_the_cuda_extension_is(monkeypatch: pytest.MonkeyPatch) -> None:
    found(monkeypatch, cuda=types.SimpleNamespace(architectures="90-real 90-virtual"))
    assert report.environment()["cuda extension"] == "built for 90-real 90-virtual"


@pytest.mark.parametrize(
    ("instruction_sets", "said"),
    [
        (["avx512", "avx2"], "has avx512, avx2 for this processor"),
        ([], "has no kernels that this processor runs"),
    ],
)
def test_it_says_what_the_cpu_extension_has_for_this_processor(
    monkeypatch: pytest.MonkeyPatch, instruction_sets: list[str], said: str
) -> None:
    found(monkeypatch, cpu=types.SimpleNamespace(instruction_sets=instruction_sets))
    assert report.environment()["cpu extension"] == said


@pytest.mark.parametrize("name", ["cuda", "cpu"])
def test_it_says_why_there_is_no_extension(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    found(monkeypatch)
    assert report.environment()[f"{name} extension"] == f"is not built: {name} is not here"


def test_importing_the_library_imports_pytorch_alone() -> None:
    code = (
        "import sys, torch; before = set(sys.modules); import fsp_kernels; "
        "print(*{x.partition('.')[0] for x in sys.modules.keys() - before})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    found = set(done.stdout.split()) - sys.stdlib_module_names
    # sysconfig keeps its values in a module whose name is the platform's.
    assert {x for x in found if not x.startswith("_sysconfigdata")} == {"fsp_kernels"}
