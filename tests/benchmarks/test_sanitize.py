"""compute-sanitizer: how it is called and how its log is read."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks import sanitize

OURS = """========= Uninitialized __global__ memory read of size 4 bytes
=========     at fsp_residual+0x70 in loss.py:41
=========     by thread (31,0,0) in block (1,0,0)
"""
OTHERS = OURS.replace("fsp_residual", "void at::native::reduce_kernel")
TO_HOST = """========= Host API uninitialized memory access at access by cudaMemcpy source
=========     Uninitialized access at 0x7f7fcdc01300 on access by cudaMemcpy source
"""
HEAD, SUMMARY = "========= COMPUTE-SANITIZER\n", "========= ERROR SUMMARY: 3 errors\n"


def log(*reports: str) -> str:
    return HEAD + "".join(reports) + SUMMARY


@pytest.mark.parametrize(
    ("reports", "clean"),
    [
        ((OTHERS,), True),
        ((OTHERS, OURS), False),
        ((OTHERS, TO_HOST), False),
        ((), False),  # an error exit that its log does not explain
    ],
)
def test_initcheck_fails_for_our_kernels_and_for_what_they_left_unwritten(
    reports: tuple[str, ...], clean: bool
) -> None:
    assert sanitize.clean("initcheck", sanitize.FOUND, log(*reports)) is clean


@pytest.mark.parametrize("tool", sanitize.TOOLS)
def test_a_failing_smoke_test_is_never_clean(tool: str) -> None:
    assert sanitize.clean(tool, 0, log())
    assert not sanitize.clean(tool, 1, log(OTHERS))


@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_whatever_the_other_tools_find_counts(tool: str) -> None:
    assert not sanitize.clean(tool, sanitize.FOUND, log(OTHERS))


def test_the_smoke_test_runs_in_this_interpreter() -> None:
    command = sanitize.command_of("/cuda/compute-sanitizer", "racecheck", Path("log"), "triton")
    assert command[:3] == ["/cuda/compute-sanitizer", "--tool", "racecheck"]
    assert command[command.index("--kernel-name") + 1] == "kns=fsp_"
    smoke = [sys.executable, "-m", "benchmarks.smoke", "--backend", "triton"]
    assert command[-len(smoke) :] == smoke


def test_the_sanitizer_is_found_beside_cuda(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "bin" / "compute-sanitizer"
    program.parent.mkdir()
    program.touch(mode=0o755)
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert sanitize.find_sanitizer() == str(program)


def test_without_one_a_sentence_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sanitize, "find_sanitizer", lambda: None)
    assert sanitize.main([]) == 1
    assert "compute-sanitizer is neither on PATH nor" in capsys.readouterr().out


def test_all_tools_run_also_after_one_found_something(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(command: list[str], **_: object) -> subprocess.CompletedProcess:
        tool = command[command.index("--tool") + 1]
        Path(command[command.index("--log-file") + 1]).write_text(f"log of {tool}")
        status = sanitize.FOUND if tool == "memcheck" else 0
        return subprocess.CompletedProcess(command, status)

    monkeypatch.setattr(sanitize, "find_sanitizer", lambda: "compute-sanitizer")
    monkeypatch.setattr(subprocess, "run", run)
    assert sanitize.main(["--backend", "triton", "cuda"]) == 1
    printed = capsys.readouterr().out
    for backend in ("triton", "cuda"):
        assert f"== memcheck, {backend}: FAILED, exit status 99" in printed
        assert f"log of initcheck\n== initcheck, {backend}: clean" in printed


def test_a_backend_that_does_not_work_here_is_left_out_with_the_reason(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def backend(reason: str | None) -> SimpleNamespace:
        return SimpleNamespace(why_unavailable=lambda: reason)

    registry = {"triton": backend(None), "cuda": backend("not built"), "torch": backend(None)}
    monkeypatch.setattr(sanitize, "registered_backends", lambda: registry)
    assert sanitize.working() == ["triton"]
    assert "== cuda is not available: not built" in capsys.readouterr().out


def test_nothing_to_check_is_no_success(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sanitize, "find_sanitizer", lambda: "compute-sanitizer")
    monkeypatch.setattr(sanitize, "working", list)
    assert sanitize.main([]) == 1
