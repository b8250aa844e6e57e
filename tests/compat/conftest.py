"""What the tests of the drop-in classes share: random maps, and one comparison."""

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

# Both sides sum at most some hundred float64 terms, in another order: they agree to about 1e-14 of
# the largest term. The margin is for gradient entries that nearly cancel.
FP64 = {"rtol": 1e-10, "atol": 1e-12}


def random_maps(shapes: Sequence[Sequence[int]]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(len(shapes))
    return [
        torch.randn(*shape, dtype=torch.float64, generator=generator).requires_grad_()
        for shape in shapes
    ]


def same_values_and_gradients(
    actual: Callable[..., Tensor], expected: Callable[..., Tensor], maps: Sequence[Tensor]
) -> None:
    """Hold ``actual(*maps)``, and its gradient in every map, to ``expected``."""
    loss, formula = actual(*maps), expected(*maps)
    torch.testing.assert_close(loss, formula, **FP64)
    gradients = torch.autograd.grad(loss.sum(), maps)
    for gradient, wanted in zip(gradients, torch.autograd.grad(formula.sum(), maps), strict=True):
        torch.testing.assert_close(gradient, wanted, **FP64)


@pytest.fixture
def maps_of() -> Callable[..., list[Tensor]]:
    return random_maps


@pytest.fixture
def assert_same() -> Callable[..., None]:
    return same_values_and_gradients
