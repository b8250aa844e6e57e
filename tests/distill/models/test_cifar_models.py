"""The networks against the published facts.

He et al. 2016, table 6 and section 4.2; Zagoruyko and Komodakis 2016, table 4.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fsp_kernels.distill.models import CifarResNet, WideResNet, parameter_count
from fsp_kernels.features.taps import FeatureTaps

# The first paper rounds to a hundredth of a million, the second to a tenth.
PUBLISHED = {
    (CifarResNet, 20, 1): (0.27e6, 0.005e6),
    (CifarResNet, 32, 1): (0.46e6, 0.005e6),
    (CifarResNet, 44, 1): (0.66e6, 0.005e6),
    (CifarResNet, 56, 1): (0.85e6, 0.005e6),
    (WideResNet, 40, 1): (0.6e6, 0.05e6),
    (WideResNet, 40, 2): (2.2e6, 0.05e6),
    (WideResNet, 16, 8): (11.0e6, 0.05e6),
    (WideResNet, 28, 10): (36.5e6, 0.05e6),
}


@pytest.mark.parametrize(("network", "published"), PUBLISHED.items())
def test_parameter_counts_are_the_published_ones(
    network: tuple[type, int, int], published: tuple[float, float]
) -> None:
    kind, depth, width = network
    with torch.device("meta"):
        model = kind(depth, width)
    assert parameter_count(model) == pytest.approx(published[0], abs=published[1])


@pytest.mark.parametrize("depth", [8, 14, 20, 26, 32, 56])
def test_depth_counts_the_layers_with_weights(depth: int) -> None:
    layers = [m for m in CifarResNet(depth).modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    assert len(layers) == depth
    convolutions = [m for m in WideResNet(depth + 2).modules() if isinstance(m, nn.Conv2d)]
    assert len(convolutions) == depth + 2  # with those of the shortcuts, as in the paper


@pytest.mark.parametrize("model", [CifarResNet(8), CifarResNet(8, 3), WideResNet(10, 3)])
def test_stages_double_channels_and_halve_the_resolution(model: nn.Module) -> None:
    with FeatureTaps(model.eval(), ["stage1", "stage2", "stage3"]) as taps:
        logits = model(torch.randn(2, 3, 32, 32))
        shapes = [tuple(x.shape[1:]) for x in taps.take()]
    width = shapes[0][0] // 16
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


def test_a_wide_block_adds_its_input_or_a_convolution_of_the_activated_input() -> None:
    model, x = WideResNet(16, 1).eval(), torch.randn(1, 16, 4, 4)
    same, other = model.stage1[0], model.stage2[0]
    for block in (same, other):
        nn.init.zeros_(block.conv2.weight)
    assert torch.equal(same(x), x)
    assert torch.equal(other(x), other.shortcut(other.bn1(x).relu()))


@pytest.mark.parametrize(
    ("kind", "depth", "width", "message"),
    [
        *((CifarResNet, depth, 1, r"6n \+ 2 .*at most 1202$") for depth in (2, 9, 1208, 99999998)),
        *((WideResNet, depth, 1, r"6n \+ 4 .*at most 1202$") for depth in (4, 17, 99999994)),
        (CifarResNet, 8, 0, "width is 0, must be 1 to 64 at depth 8$"),
        (CifarResNet, 8, 65, "1 to 64 at depth 8$"),
        (CifarResNet, 1202, 6, "1 to 5 at depth 1202$"),
        (WideResNet, 16, 0, "1 to 45 at depth 16$"),
        (WideResNet, 10, 10**9, "1 to 57 at depth 10$"),
    ],
)
def test_impossible_networks_are_refused(kind: type, depth: int, width: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kind(depth, width)


def test_a_seed_gives_the_weights_it_always_gave() -> None:
    torch.manual_seed(0)
    model = CifarResNet(8, in_channels=1)
    assert model.stage3[0].conv2.weight.flatten()[:2].tolist() == pytest.approx(
        [-0.06205865740776062, 0.009365478530526161]
    )
    assert model.fc.weight.flatten()[:2].tolist() == pytest.approx(
        [-0.11849124729633331, 0.07862366735935211]
    )
