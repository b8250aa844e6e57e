"""Sizes that CUDA C++ kernels are quick enough for, on a CPU too: more than one block's worth."""

from __future__ import annotations

import pytest
import torch
from calls import DEVICE, Regime, check, four_of, scaling_of, tensor

from fsp_kernels.backends import get_backend
from fsp_kernels.backends.cuda.extension import module


@pytest.mark.usefixtures("backend")
def test_the_sum_takes_every_partial_loss():
    regime = Regime((2, 3), (2,), "one pass")
    check(*four_of(regime, batch=600), regime)  # one each; a block has 256 threads


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("size", [(1 << 20) + 4096, (1 << 20) + 5], ids=["fours", "and a rest"])
def test_a_gradient_is_scaled_that_has_more_elements_than_a_launch_has_threads(size):
    gradient = tensor(size, grad=False)
    factor = torch.tensor(3.0, device=DEVICE)
    (found,) = get_backend("cuda").scale([gradient], scaling_of([gradient]), factor, False)
    assert torch.equal(found, 3 * gradient)


@pytest.mark.usefixtures("backend")
def test_every_chip_can_store_tiles():
    # Where a kernel's memory does not fit, that is what it falls back to: 64 KB on the least chip.
    needed = {
        name: one_stage
        for name, _, _, one_stage, _ in module().shared_bytes()
        if name in ("fsp_residual", "fsp_gradients", "fsp_combine")
    }
    assert set(needed) == {"fsp_residual", "fsp_gradients", "fsp_combine"}
    assert max(needed.values()) <= 64 << 10
