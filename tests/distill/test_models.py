"""The residual networks against the published facts (He et al. 2016, table 6 and section 4.2)."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fsp_kernels.distill.models import CifarResNet, parameter_count

PUBLISHED_PARAMETERS = {20: 0.27e6, 32: 0.46e6, 44: 0.66e6, 56: 0.85e6}


@pytest.mark.parametrize(("depth", "parameters"), PUBLISHED_PARAMETERS.items())
def test_parameter_counts_are_the_published_ones(depth: int, parameters: float) -> None:
    assert parameter_count(CifarResNet(depth)) == pytest.approx(parameters, abs=0.005e6)


@pytest.mark.parametrize("depth", [8, 14, 20, 26, 32, 56])
def test_depth_counts_the_layers_with_weights(depth: int) -> None:
    layers = [m for m in CifarResNet(depth).modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    assert len(layers) == depth


@pytest.mark.parametrize("width", [1, 2])
def test_stages_double_channels_and_halve_the_resolution(width: int) -> None:
    model = CifarResNet(8, width).eval()
    shapes = []
    for stage in (model.stage1, model.stage2, model.stage3):
        stage.register_forward_hook(lambda _m, _x, y: shapes.append(tuple(y.shape[1:])))
    logits = model(torch.randn(2, 3, 32, 32))
    assert shapes == [(16 * width, 32, 32), (32 * width, 16, 16), (64 * width, 8, 8)]
    assert logits.shape == (2, 10)


def test_shortcuts_have_no_parameters_and_pass_every_second_position() -> None:
    block = CifarResNet(8).stage2[0]
    assert parameter_count(block.shortcut) == 0
    x = torch.randn(1, 16, 4, 4)
    y = block.shortcut(x)
    assert torch.equal(y[:, 8:24], x[:, :, ::2, ::2])
    assert not y[:, :8].any()
    assert not y[:, 24:].any()


@pytest.mark.parametrize(("depth", "width"), [(2, 1), (9, 1), (8, 0)])
def test_impossible_networks_are_refused(depth: int, width: int) -> None:
    with pytest.raises(ValueError, match="must be"):
        CifarResNet(depth, width)
