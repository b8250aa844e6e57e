"""The kernels under AddressSanitizer and UndefinedBehaviorSanitizer, compiled for the host.

Every tensor is an allocation of its own, so that whoever reads or writes beyond one is seen.
"""

import os
import re
import subprocess
import sys

import pytest
import torch
from cuda_on_host.build import ROOT, build, sanitizer_environment
from cuda_on_host.module import HOST_BUILDS

pytestmark = [
    pytest.mark.thorough,
    pytest.mark.skipif(torch.cuda.is_available(), reason="compute-sanitizer watches the kernels"),
]

# Every operation, by compute-sanitizer's cases but for those that are split along positions, whose
# million elements take as long as all others together; and every layout by every road, parts too.
TESTS = [
    "tests/cuda/test_smoke_cases.py",
    *(
        f"tests/fused/test_loss.py::{name}"
        for name in (
            "test_maps_may_lie_in_memory_in_any_way",
            "test_tiles_of_maps_may_lie_in_memory_in_any_way",
            "test_half_precision_maps_may_lie_in_memory_in_any_way",
        )
    ),
]
CHOSEN = "cuda and not split"

# One map's storage is an element short of what its shape says. A process ends with the first error,
# so that each call has its own.
ONE_SHORT = """
import os, sys
import torch
import fsp_kernels as fsp
from cuda_on_host.module import HOST_BUILDS, extension_is, host_cuda_module

def call(dtype, positions):
    student, teacher = ([tuple(torch.randn(2, 2, 7, positions, 1).to(dtype))] for _ in range(2))
    teacher = [tuple(x.clone() for x in teacher[0])]
    fsp.fsp_loss(student, teacher, backend="cuda")
    print("clean", end=" ", flush=True)
    storage = teacher[0][1].untyped_storage()
    storage.resize_(storage.nbytes() - teacher[0][1].element_size())
    fsp.fsp_loss(student, teacher, backend="cuda")
    print("done", end=" ", flush=True)

with extension_is(host_cuda_module(*HOST_BUILDS["{name}"])):
    for dtype in (torch.float32, torch.bfloat16):
        for positions in (5, 8):  # which are read one at a time, and 16 bytes at a time
            if os.fork() == 0:
                os.dup2(1, 2)
                call(dtype, positions)
                os._exit(0)
            os.wait()
            print(flush=True)
"""


@pytest.fixture(scope="module", params=["80-sanitized", "75-sanitized"])
def sanitized(request):
    """The name of a build, which is there."""
    build(*HOST_BUILDS[request.param])  # no compiler should run under a sanitizer
    return request.param


def run(*arguments):
    """Python in a process that is ready for sanitized code."""
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env={**os.environ, **sanitizer_environment(), "PYTHONPATH": str(ROOT / "tests")},
        capture_output=True,
        text=True,
        check=False,
    )


def test_kernels_stay_within_their_maps_and_do_nothing_undefined(sanitized):
    options = [f"--host-cuda={sanitized}", "--crosses=all", "-k", CHOSEN]
    result = run("-m", "pytest", "-q", *options, *TESTS)
    assert result.returncode == 0, result.stdout + result.stderr


def test_an_element_beyond_the_end_is_seen(sanitized):
    result = run("-c", ONE_SHORT.format(name=sanitized))
    seen = re.findall(r"^clean .*?(done|heap-buffer-overflow)", result.stdout, re.M | re.S)
    assert seen == ["heap-buffer-overflow"] * 4, result.stdout + result.stderr
