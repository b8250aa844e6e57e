"""Every kernel of csrc/ compiles for every generation of chips, spills nothing and fits them."""

from __future__ import annotations

import itertools
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from tools.compile_cuda import SHARED_MEMORY, Usage, described

ROOT = Path(__file__).resolve().parents[2]
SETUP = runpy.run_path(str(ROOT / "setup.py"), run_name="setup")
ONE_PASS = Usage(80, "fsp_one_pass", "bf16", 128, 200, 0, 2, 107 << 10)
OF_EACH_OPERAND = ("fsp_one_pass", "fsp_residual", "fsp_gradients")
OF_ANY_OPERAND = (*("fsp_gram", "fsp_combine", "fsp_matrix_gradients", "fsp_finish", "fsp_scale"),)


@pytest.mark.slow
@pytest.mark.skipif(
    not (SETUP["find_nvcc"]() and SETUP["is_recent"](SETUP["find_nvcc"]())),
    reason="needs nvcc 12.0 or newer",
)
def test_every_kernel_compiles_without_a_stack_and_fits_the_chip():
    environment = {name: value for name, value in os.environ.items() if name != "CUDAARCHS"}
    command = [sys.executable, "-m", "tools.compile_cuda"]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    rows = [line.split() for line in result.stdout.splitlines()[1:]]
    chips = {row[0] for row in rows}
    assert chips <= {f"sm_{chip}" for chip in SHARED_MEMORY}
    assert {"sm_80", "sm_90"} <= chips  # others depend on nvcc
    operands = ("fp32", "fp16", "bf16")
    for chip, kernel, operand in itertools.product(chips, OF_EACH_OPERAND, operands):
        assert [chip, kernel, operand] in [row[:3] for row in rows]
    for chip, kernel in itertools.product(chips, OF_ANY_OPERAND):
        assert [chip, kernel] in [row[:2] for row in rows]


def test_a_stack_is_a_complaint():
    assert ONE_PASS.complaints() == []
    assert ONE_PASS._replace(stack=8).complaints() == ["spills 8 bytes to the stack"]


def test_too_much_shared_memory_is_a_complaint_unless_tiles_stand_in():
    on_turing = ONE_PASS._replace(architecture=75)
    assert not on_turing.fits
    assert on_turing.complaints() == []
    (complaint,) = on_turing._replace(kernel="fsp_residual").complaints()
    assert complaint == f"wants {107 << 10} bytes of shared memory, the chip has 64 KiB"


@pytest.mark.parametrize(
    ("symbol", "wanted"),
    [
        ("_ZN3fsp12fsp_residualIfEEvNS_5GroupINS_4PairELi6EEE", ("fsp_residual", "fp32", 0)),
        (
            "_ZN3fsp12fsp_one_passI6__halfLb1EEEvNS_5GroupINS_4PairELi6EEE",
            ("fsp_one_pass", "fp16", 128),
        ),
        ("_ZN3fsp8fsp_gramILi64EEEvNS_5GroupINS_4PairELi6EEE", ("fsp_gram", "", 64)),
        ("_ZN3fsp10fsp_finishENS_3SumE", ("fsp_finish", "", 0)),
    ],
)
def test_a_symbol_tells_its_kernel(symbol, wanted):
    assert described(symbol) == wanted
