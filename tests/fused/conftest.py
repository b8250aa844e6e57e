"""Every test runs for each backend with fused kernels, which is the one that its calls get."""

import pytest
import torch
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


@pytest.fixture(params=["triton", "cuda"], autouse=True)
def backend(request):
    if request.param == "cuda":
        request.getfixturevalue("cuda_extension")
    with in_force(request.param) as name:
        yield name


@pytest.fixture(autouse=True)
def _what_is_never_written_shows():
    """``torch.empty`` is full of NaN; but not on a GPU, where to fill it is a launch of its own."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(before or not torch.cuda.is_available())
    yield
    torch.use_deterministic_algorithms(before)
