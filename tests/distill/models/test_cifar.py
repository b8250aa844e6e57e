"""The networks against the published facts.

He et al. 2016, table 6 and section 4.2; Zagoruyko and Komodakis 2016, table 4.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fsp_kernels.distill.models import CifarResNet, WideResNet, parameter_count
from fsp_kernels.distill.taps import FeatureTaps

PUBLISHED_PARAMETERS = {20: 0.27e6, 32: 0.46e6, 44: 0.66e6, 56: 0.85e6}
# (depth, width): the paper rounds to a tenth of a million.
PUBLISHED_WIDE = {(40, 1): 0.6e6, (40, 2): 2.2e6, (16, 8): 11.0e6, (28, 10): 36.5e6}


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


@pytest.mark.parametrize(
    ("depth", "width"), [(2, 1), (9, 1), (1208, 1), (8, 0), (8, 65), (1202, 6)]
)
def test_impossible_networks_are_refused(depth: int, width: int) -> None:
    with pytest.raises(ValueError, match="must be"):
        CifarResNet(depth, width)


def test_a_seed_gives_the_weights_it_always_gave() -> None:
    torch.manual_seed(0)
    model = CifarResNet(8, in_channels=1)
    assert model.stage3[0].conv2.weight.flatten()[:2].tolist() == pytest.approx(
        [-0.06205865740776062, 0.009365478530526161]
    )
    assert model.fc.weight.flatten()[:2].tolist() == pytest.approx(
        [-0.11849124729633331, 0.07862366735935211]
    )


@pytest.mark.parametrize(("size", "parameters"), PUBLISHED_WIDE.items())
def test_parameter_counts_of_wide_networks_are_the_published_ones(
    size: tuple[int, int], parameters: float
) -> None:
    with torch.device("meta"):
        assert parameter_count(WideResNet(*size)) == pytest.approx(parameters, abs=0.05e6)


@pytest.mark.parametrize("depth", [10, 16, 40])
def test_depth_of_wide_networks_counts_the_convolutions(depth: int) -> None:
    assert sum(isinstance(m, nn.Conv2d) for m in WideResNet(depth).modules()) == depth


def test_stages_of_wide_networks_double_channels_and_halve_the_resolution() -> None:
    model = WideResNet(10, 3).eval()
    with FeatureTaps(model, ["stage1", "stage2", "stage3"]) as taps:
        logits = model(torch.randn(2, 3, 32, 32))
        shapes = [tuple(x.shape[1:]) for x in taps.take()]
    assert shapes == [(48, 32, 32), (96, 16, 16), (192, 8, 8)]
    assert logits.shape == (2, 10)


def test_a_wide_block_adds_its_input_where_shapes_allow() -> None:
    block = WideResNet(16, 1).stage1[0].eval()
    nn.init.zeros_(block.conv2.weight)
    x = torch.randn(1, 16, 4, 4)
    assert torch.equal(block(x), x)


def test_a_wide_block_adds_a_convolution_of_the_activated_input_elsewhere() -> None:
    block = WideResNet(16, 1).stage2[0].eval()
    nn.init.zeros_(block.conv2.weight)
    x = torch.randn(1, 16, 4, 4)
    assert torch.equal(block(x), block.shortcut(block.bn1(x).relu()))


@pytest.mark.parametrize(("depth", "width"), [(4, 1), (17, 1), (99999994, 1), (16, 0), (10, 10**9)])
def test_impossible_wide_networks_are_refused(depth: int, width: int) -> None:
    with pytest.raises(ValueError, match="must be"):
        WideResNet(depth, width)
