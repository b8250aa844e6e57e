"""compute-sanitizer: how it is called and how its log is read."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import sanitizer_logs

from tools import sanitize

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
    assert sanitize.Run("initcheck", sanitize.FOUND, "", log(*reports)).clean is clean


@pytest.mark.parametrize("tool", sanitize.TOOLS)
def test_a_failing_smoke_test_is_never_clean(tool: str) -> None:
    assert sanitize.Run(tool, 0, "", log()).clean
    assert not sanitize.Run(tool, 1, "", log(OTHERS)).clean


@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_whatever_the_other_tools_find_counts(tool: str) -> None:
    assert not sanitize.Run(tool, sanitize.FOUND, "", log(OTHERS)).clean


def test_the_sanitizer_is_found_beside_cuda(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "bin" / "compute-sanitizer"
    program.parent.mkdir()
    program.touch(mode=0o755)
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert sanitize.find("compute-sanitizer") == str(program)


def test_without_one_a_sentence_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sanitize, "find", lambda _: None)
    assert sanitize.main([]) == 1
    assert "compute-sanitizer is neither on PATH nor" in capsys.readouterr().out


SANITIZER = """#!{python}
import os, sys
from pathlib import Path
if sys.argv[1:] == ["--version"]:
    sys.exit(print("Version {version}.1.0 (build 1) (public-release)"))
options = dict(zip(sys.argv[1::2], sys.argv[2::2]))
print("cases", sys.argv[-1], flush=True)
tool = options["--tool"]
text = "log of " + tool
if tool == "racecheck":
    kernels = Path(os.environ["TRITON_CACHE_DIR"]) / "a hash"
    kernels.mkdir()
    (kernels / "fsp_residual.cubin").touch()
    text = {log!r}
Path(options["--log-file"]).write_text(text)
sys.exit({status} if tool in {failing} else 0)
"""


@pytest.fixture
def sanitizer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Stands in for NVIDIA's programs: what they print, and which tools find something."""
    sass = f"""#!/bin/sh
cat <<'END'
{sanitizer_logs.SASS}
END
"""

    def install(
        failing: tuple[str, ...] = (),
        log: str = sanitizer_logs.log(),
        status: int = sanitize.FOUND,
        version: str = "2025.3",
    ) -> None:
        program = SANITIZER.format(
            python=sys.executable, version=version, log=log, status=status, failing=failing
        )
        for name, text in (("compute-sanitizer", program), ("cuobjdump", sass)):
            (tmp_path / name).write_text(text)
            (tmp_path / name).chmod(0o755)

    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    return install


def test_all_tools_run_also_after_one_found_something(
    sanitizer, capsys: pytest.CaptureFixture[str]
) -> None:
    sanitizer(failing=("memcheck",))
    assert sanitize.main(["--backend", "triton", "cuda"]) == 1
    printed = capsys.readouterr().out
    for backend in ("triton", "cuda"):
        assert f"== memcheck, {backend}: FAILED, exit status 99" in printed
        assert f"log of initcheck\n== initcheck, {backend}: clean" in printed


def test_tools_can_be_chosen_and_shares_run_side_by_side(
    sanitizer, capsys: pytest.CaptureFixture[str]
) -> None:
    sanitizer()
    assert sanitize.main(["--backend", "cuda", "--tool", "memcheck", "--jobs", "3"]) == 0
    printed = capsys.readouterr().out
    assert [line for line in printed.splitlines() if line.startswith("cases")] == [
        f"cases {i}/3" for i in (1, 2, 3)
    ]
    assert "initcheck" not in printed
    assert "racecheck" not in printed


UNCLEAR = sanitizer_logs.report(("Write", sanitizer_logs.LDGSTS), ("Read", sanitizer_logs.WGMMA))
TRUE = sanitizer_logs.report(("Write", sanitizer_logs.STS), ("Read", sanitizer_logs.LDS))


def test_unclear_hazards_are_printed_and_do_not_fail(
    sanitizer, capsys: pytest.CaptureFixture[str]
) -> None:
    sanitizer(failing=("racecheck",), log=sanitizer_logs.log(UNCLEAR))
    assert sanitize.main(["--backend", "triton", "--tool", "racecheck"]) == 0
    printed = capsys.readouterr().out
    assert "unclear, this version also reports what is no race: Error: Race reported" in printed
    assert "== racecheck, triton: clean; unclear hazards: 1" in printed


@pytest.mark.parametrize(
    ("log", "status", "version"),
    [
        (sanitizer_logs.log(UNCLEAR, TRUE), sanitize.FOUND, "2025.3"),
        (sanitizer_logs.log(UNCLEAR), 1, "2025.3"),  # the smoke test failed, too
        (sanitizer_logs.log(UNCLEAR), sanitize.FOUND, "2026.1"),
        (sanitizer_logs.log(UNCLEAR).replace("1 hazard ", "2 hazards "), 99, "2025.3"),
        ("", sanitize.FOUND, "2025.3"),  # an error exit that its log does not explain
    ],
)
def test_anything_else_that_racecheck_finds_fails(
    sanitizer, log: str, status: int, version: str
) -> None:
    sanitizer(("racecheck",), log, status, version)
    assert sanitize.main(["--backend", "triton", "--tool", "racecheck"]) == 1


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
    monkeypatch.setattr(sanitize, "find", lambda program: program)
    monkeypatch.setattr(sanitize, "working", list)
    assert sanitize.main([]) == 1
