"""``make gpu`` and its parts, as far as make itself tells."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FILES = (
    "tests/fused/test_*.py tests/triton/test_*.py tests/cuda/test_*.py tests/distill/test_gpu.py"
)
PARTS = [
    f"printf '%s\\n' {FILES} | xargs -P 8 -n 1 some-python -m pytest -m gpu -q -ra",
    "some-python -m tools.sanitize --jobs 8",
    "some-python -m benchmarks --device cuda --layout nchw --pass forward+backward "
    "--output some/results",
]


def make(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["make", *arguments], cwd=ROOT, capture_output=True, text=True)


def dry_run(*arguments: str) -> list[str]:
    variables = ["GPU_PYTHON=some-python", "GPU_RESULTS=some/results", "GPU_JOBS=8"]
    done = make("--dry-run", *arguments, *variables)
    assert done.returncode == 0, done.stderr
    lines = [" ".join(line.split()) for line in done.stdout.splitlines()]
    return [line for line in lines if "some-python" in line]


def test_the_parts_run_in_order_benchmarks_last() -> None:
    assert dry_run("gpu") == PARTS


@pytest.mark.parametrize(
    ("arguments", "command"),
    [
        (
            ["gpu-tests", "GPU_TESTS=tests/fused/test_loss.py", "GPU_PYTEST=-k 'cuda and loss'"],
            "printf '%s\\n' tests/fused/test_loss.py | xargs -P 8 -n 1 some-python -m pytest "
            "-m gpu -q -ra -k 'cuda and loss'",
        ),
        (
            ["gpu-sanitizer", "GPU_TOOLS=memcheck initcheck", "GPU_BACKENDS=cuda"],
            "some-python -m tools.sanitize --tool memcheck initcheck --backend cuda --jobs 8",
        ),
        (
            ["gpu-bench", "GPU_PARTS=loss plan"],
            PARTS[2].replace("benchmarks --device", "benchmarks loss plan --device"),
        ),
        (["gpu-tests"], PARTS[0]),
        (["gpu-sanitizer"], PARTS[1]),
        (["gpu-bench"], PARTS[2]),
        (["gpu-first"], "some-python -m tools.gpu_first --output some/results --jobs 8"),
        (["gpu-tune", "TUNE=--kind half"], "some-python -m tools.tune --jobs 8 --kind half"),
    ],
)
def test_a_part_can_be_called_alone_and_split(arguments: list[str], command: str) -> None:
    assert dry_run(*arguments) == [command]


def test_the_package_is_installed_first_where_asked() -> None:
    install = "some-python -m pip install --no-build-isolation --no-deps --editable ."
    assert dry_run("gpu", "INSTALL=1") == [install, *PARTS]


def test_a_failing_part_fails_the_whole_but_not_the_rest() -> None:
    done = make("gpu", "GPU_PYTHON=false")
    assert done.returncode != 0
    for part in ("gpu-tests", "gpu-sanitizer", "gpu-bench"):
        assert f"{part}] Error" in done.stderr


def test_every_file_of_tests_runs_by_itself_and_one_that_fails_fails_the_part(
    tmp_path: Path,
) -> None:
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\necho "ran $*"\ncase "$*" in *test_gram.py*) exit 1;; esac\n')
    python.chmod(0o755)
    done = make("gpu-tests", f"GPU_PYTHON={python}", "GPU_JOBS=2")
    assert done.returncode != 0
    ran = {line.split()[-1] for line in done.stdout.splitlines() if line.startswith("ran ")}
    assert ran == {
        str(path.relative_to(ROOT)) for pattern in FILES.split() for path in ROOT.glob(pattern)
    }


def test_help_has_a_line_for_each_target() -> None:
    text = (ROOT / "Makefile").read_text()
    targets = " ".join(re.findall(r"^\.PHONY: (.+)$", text, flags=re.MULTILINE)).split()
    lines = make("help").stdout.splitlines()
    told = [line.split()[1] for line in lines if line.startswith("make ")]
    assert sorted(told) == sorted(set(targets) - {"help"})
