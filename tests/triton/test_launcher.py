"""Triton's real launcher, over a stub of the CUDA driver: what a kernel is launched with.

A bound launch brings a compiled kernel its arguments past all checks of Triton. Here both ways of
launching arrive at a driver that only takes notes, and the notes have to agree.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from fsp_kernels.backends import triton as package

HERE = Path(__file__).parent
KERNELS = (
    "fsp_one_pass",
    "fsp_gram",
    "fsp_gram_combine",
    "fsp_gram_gradients",
    "fsp_residual",
    "fsp_combine",
    "fsp_gradients",
    "fsp_matrix_gradients",
    "fsp_finish",
    "fsp_scale",
    "fsp_product",
)


@pytest.fixture(scope="module")
def launches(libcuda, over_the_stub):
    """By kernel, alignment and path, what arrived."""
    result = subprocess.run(
        [sys.executable, HERE / "real_launches.py", libcuda],
        env=over_the_stub,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def test_every_kernel_of_the_backend_is_launched(launches):
    sources = [file.read_text() for file in Path(package.__file__).parent.glob("*.py")]
    written = {name for source in sources for name in re.findall(r"^def (fsp_\w+)\(", source, re.M)}
    assert written == set(KERNELS) == set(launches)


@pytest.mark.parametrize("alignment", ["aligned", "unaligned"])
@pytest.mark.parametrize("kernel", KERNELS)
def test_a_bound_launch_hands_the_driver_what_triton_would(launches, kernel, alignment):
    found = launches[kernel][alignment]
    assert found["bound"] == found["by triton"]


def test_more_than_2_to_the_31_elements_are_scaled_by_a_loop_of_64_bits(launches):
    for found in launches["fsp_scale"].values():
        loops = [line for line in found["ttir"].splitlines() if "scf.for" in line]
        assert loops
        assert all(re.search(r": i64\b", line) for line in loops)


@pytest.mark.parametrize("kernel", KERNELS)
def test_each_alignment_has_machine_code_of_its_own(launches, kernel):
    functions = {launches[kernel][a]["bound"]["function"] for a in ("aligned", "unaligned")}
    assert len(functions) == 2
