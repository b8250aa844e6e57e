"""Every Triton kernel compiles for every family of chips in every configuration that is shipped."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fsp_kernels.backends.triton import configurations
from fsp_kernels.backends.triton.configurations import FAMILIES, Configuration, Row

pytest.importorskip("triton")

import triton

from tools.compile_triton import DTYPES, MOST_STACK, TABLE_TRITON, Case, Usage, complaints

ROOT = Path(__file__).resolve().parents[2]
ROW = Row("sm_89", "one_pass", "tf32x3", "aligned", 64, Configuration(64, 64, 32, 4, 1), None)


def _python(*arguments):
    """Run Python without the interpreter of Triton that the tests use."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, *arguments], env=environment, capture_output=True, text=True, check=False
    )


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_every_configuration_compiles_without_a_stack_and_fits_the_chip(family):
    result = _python("-m", "tools.compile_triton", "--family", family, "--jobs", "1")
    assert result.returncode == 0, result.stdout + result.stderr
    shipped = [row for row in configurations.rows() if row.family == family]
    printed = [line.split() for line in result.stdout.splitlines()[1:]]
    for row in shipped:
        for dtype in DTYPES[row.kind]:
            expected = [
                row.family,
                row.kernel,
                row.kind,
                str(row.limit),
                str(dtype).removeprefix("torch."),
                row.access,
            ]
            assert expected in [words[:6] for words in printed]


def test_a_kernel_that_spills_is_refused():
    script = (
        "import torch\n"
        "from tools.compile_triton import Case, compile_case, complaints\n"
        "from fsp_kernels.backends.triton.configurations import Configuration, Row, using\n"
        "row = Row('sm_80', 'one_pass', 'half', 'odd', 64, Configuration(64, 64, 32, 1, 1), None)\n"
        "case = Case(row, torch.bfloat16)\n"
        "with using([row]):\n"
        "    print([c for u in compile_case(case) for c in complaints(case, u)])\n"
    )
    result = _python("-c", script)
    assert "to the stack" in result.stdout, result.stderr


def test_nothing_is_allowed_to_the_triton_that_is_pinned():
    pinned = (ROOT / "constraints.txt").read_text()
    assert f"triton=={TABLE_TRITON}." in pinned
    assert MOST_STACK == 0 or f"triton=={triton.__version__}" not in pinned


def test_a_stack_and_too_much_shared_memory_are_complaints():
    case = Case(ROW, torch.float32)
    assert complaints(case, Usage("fsp_one_pass", 255, MOST_STACK, 99 << 10)) == []
    spills = MOST_STACK + 8
    assert f"spills {spills} bytes" in complaints(case, Usage("fsp_one_pass", 255, spills, 0))[0]
    assert "shared memory" in complaints(case, Usage("fsp_one_pass", 32, 0, (99 << 10) + 1))[0]
