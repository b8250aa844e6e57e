"""What every test of the library shares."""

import os

import pytest
import torch
from hypothesis import settings

# Without a GPU the Triton kernels run in Triton's interpreter, which is asked for before they are
# imported.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# The same examples on every machine, and none of them timed: a busy machine is not a bug.
settings.register_profile("fsp_kernels", deadline=None, derandomize=True, database=None)
settings.load_profile("fsp_kernels")


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no NVIDIA GPU"))


@pytest.fixture(autouse=True)
def _same_numbers_every_time():
    torch.manual_seed(0)
