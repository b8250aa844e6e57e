"""What is about Triton alone; tests that are not about its kernels ask for no ``backend``."""

import pytest
from fused_fixtures import (  # noqa: F401
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
def backend():
    with in_force("triton") as name:
        yield name
