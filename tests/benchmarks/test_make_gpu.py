"""``make gpu``, as far as make itself tells."""

from __future__ import annotations

import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PARTS = [
    "printf '%s\\n' tests/fused/test_*.py tests/triton/test_*.py tests/cuda/test_*.py "
    "tests/distill/test_gpu.py | "
    "xargs -P 8 -n 1 some-python -m pytest -m gpu -q -ra",
    "some-python -m benchmarks.sanitize",
    "some-python -m benchmarks  --device cuda --layout nchw --pass forward+backward "
    "--output some/results",
]


def dry_run(*arguments: str) -> list[str]:
    variables = ["GPU_PYTHON=some-python", "GPU_RESULTS=some/results"]
    command = ["make", "--dry-run", *arguments, *variables]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return [line for line in done.stdout.splitlines() if "some-python" in line]


def test_the_parts_run_in_order_benchmarks_last() -> None:
    assert dry_run("gpu") == PARTS


def test_each_part_can_be_called_alone() -> None:
    parts = dry_run("gpu-tests") + dry_run("gpu-sanitizer") + dry_run("gpu-bench")
    assert parts == PARTS


def test_parts_of_the_benchmarks_can_be_named() -> None:
    (command,) = dry_run("gpu-bench", "GPU_PARTS=loss plan")
    assert command.startswith("some-python -m benchmarks loss plan --device cuda")


def test_the_package_is_installed_first_where_asked() -> None:
    install = "some-python -m pip install --no-build-isolation --no-deps --editable ."
    assert dry_run("gpu", "INSTALL=1") == [install, *PARTS]


def test_a_failing_part_fails_the_whole_but_not_the_rest() -> None:
    command = ["make", "gpu", "GPU_PYTHON=false"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode != 0
    for part in ("gpu-tests", "gpu-sanitizer", "gpu-bench"):
        assert f"{part}] Error" in done.stderr
