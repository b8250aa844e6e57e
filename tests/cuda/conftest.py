"""What is about CUDA C++ alone; tests that are not about its kernels ask for no ``backend``."""

import pytest
from fused_fixtures import (  # noqa: F401
    chip_with_tf32,
    cuda_extension,
    in_force,
    limits,
    programs,
    regime,
    regimes,
    small,
    tf32,
    tile,
)


@pytest.fixture
def backend(cuda_extension):  # noqa: F811, ARG001
    with in_force("cuda") as name:
        yield name
