"""What every test of the library shares."""

import pytest
import torch
from hypothesis import settings

# The same examples on every machine, and none of them timed: a busy machine is not a bug.
settings.register_profile("fsp_kernels", deadline=None, derandomize=True, database=None)
settings.load_profile("fsp_kernels")


@pytest.fixture(autouse=True)
def _same_numbers_every_time():
    torch.manual_seed(0)
