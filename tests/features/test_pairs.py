"""Pairs: found, known by family or given; whether they fit; and the projection where they don't."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fsp_kernels.distill.models import CifarResNet, WideResNet
from fsp_kernels.errors import DistillError
from fsp_kernels.features.pairs import (
    PairShapes,
    PathPair,
    Projection,
    channels_first,
    check_pairs,
    find_pairs,
)

IMAGE = torch.zeros(1, 3, 32, 32)
CIFAR_AUTO = [("relu", "stage1"), ("stage2.0.relu1", "stage2"), ("stage3.0.relu1", "stage3")]
CIFAR_FAMILY = [(f"stage{i}.0.relu1", f"stage{i}") for i in (1, 2, 3)]
WIDE_FAMILY = [(f"stage{i}.0.relu2", f"stage{i}") for i in (1, 2, 3)]
TORCHVISION_AUTO = [("maxpool", "layer1"), *((f"layer{i}.0", f"layer{i}") for i in (2, 3, 4))]
IMAGENET_FAMILY = [
    ("layer1:input", "layer1"),
    *((f"layer{i}.1:input", f"layer{i}") for i in (2, 3, 4)),
]


def pair(*paths: str, channel_dim: int | None = None) -> PathPair:
    """The same two paths in both networks, or the student's and then the teacher's."""
    first, second, third, fourth = (*paths, *paths)[:4]
    return PathPair((first, second), (third, fourth), channel_dim)


def conv(channels: int, wanted: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(channels, wanted, 3, stride, padding=1), nn.ReLU())


def net(*widths: int) -> nn.Sequential:
    """For each width, two blocks of one more halving: ``0``, ``1``, ``2``, ``3``, ..."""
    blocks, channels = [], 3
    for width in widths:
        blocks += [conv(channels, width, stride=2), conv(width, width)]
        channels = width
    return nn.Sequential(*blocks)


def resolved(student: nn.Module, teacher: nn.Module, pairs: Any = "auto") -> list[tuple[Any, Any]]:
    found = find_pairs(pairs, student, teacher, IMAGE)
    return [(pair.student, pair.teacher) for pair in found]


def both(paths: list[tuple[str, str]]) -> list[tuple[Any, Any]]:
    return [(two, two) for two in paths]


class Tokens(nn.Module):
    """A transformer's shapes: an image to (B, 5, C)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.embed = nn.Linear(4, channels)
        self.block = nn.Linear(channels, channels)

    def forward(self, image: Tensor) -> Tensor:
        return self.block(self.embed(image.flatten(1)[:, :20].unflatten(1, (5, 4))))


def test_auto_finds_the_first_and_last_map_of_each_stage() -> None:
    assert resolved(CifarResNet(8), CifarResNet(26)) == both(CIFAR_AUTO)
    models = pytest.importorskip("torchvision.models")
    image = torch.zeros(1, 3, 64, 64)
    found = find_pairs("auto", models.resnet18(), models.resnet34(), image)
    assert [(pair.student, pair.teacher) for pair in found] == both(TORCHVISION_AUTO)


def test_auto_ends_a_stage_before_the_next_ones_first_block() -> None:
    # Before its stride, the first block of a stage still has maps of the stage before.
    timm = pytest.importorskip("timm")
    [_, second, *_] = resolved(*[timm.create_model("resnet50")] * 2)
    assert second == both([("layer2.0.act2", "layer2")])[0]
    [first, *_] = resolved(*[WideResNet(10)] * 2)
    assert first == both([("stage1.0.relu1", "stage1")])[0]


def test_networks_are_left_as_they_were() -> None:
    student, teacher = CifarResNet(8), CifarResNet(8).eval()
    student.stage2.eval()
    before = {name: x.clone() for name, x in student.state_dict().items()}
    pairs = find_pairs("auto", student, teacher, IMAGE)
    check_pairs(pairs, student, teacher, IMAGE, projection=False)
    assert student.training
    assert student.stage3[0].bn1.training
    assert not student.stage2[0].bn1.training
    assert not any(module.training for module in teacher.modules())
    assert all(torch.equal(x, before[name]) for name, x in student.state_dict().items())
    assert not any(module._forward_hooks for module in student.modules())


POOLED = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.ReLU(), nn.ReLU())
RAW = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)))
TWICE = nn.ReLU()


@pytest.mark.parametrize(
    ("modules", "expected"),
    [
        # Maps of convolutions and normalisations alone are raw.
        ([RAW, nn.ReLU(), conv(4, 4)], ("1", "2")),
        # Maps that are overwritten in place.
        ([conv(3, 4), nn.Tanh(), nn.ReLU(inplace=True), conv(4, 4)], ("0", "3")),
        ([nn.Tanh(), nn.ReLU(inplace=True), conv(3, 4)], ("1", "2")),
        # Modules that run twice.
        ([TWICE, nn.Conv2d(3, 4, 1), TWICE, conv(4, 4), conv(4, 4)], ("3", "4")),
        # Single maps of a size, and single positions.
        ([net(4), nn.MaxPool2d(2), POOLED], ("0.0", "0")),
    ],
)
def test_auto_leaves_out_maps_that_are_no_features(
    modules: list[nn.Module], expected: tuple[str, str]
) -> None:
    model = nn.Sequential(*modules)
    assert resolved(model, model) == both([expected])


@pytest.mark.parametrize(
    ("student", "teacher", "expected"),
    [
        # As many stages: in order.
        (
            net(4, 8),
            nn.Sequential(nn.MaxPool2d(2), net(4, 8)),
            [(("0", "1"), ("1.0", "1.1")), (("2", "3"), ("1.2", "1"))],
        ),
        # Other numbers: those of equal size, or from the last backwards if there are none.
        (net(4, 8), net(4, 8, 16), both([("0", "1"), ("2", "3")])),
        (nn.Sequential(nn.MaxPool2d(3), net(4)), net(4, 8), [(("1.0", "1"), ("2", "3"))]),
    ],
)
def test_auto_matches_the_stages_of_both_networks(
    student: nn.Module, teacher: nn.Module, expected: list[tuple[Any, Any]]
) -> None:
    assert resolved(student, teacher) == expected


@pytest.mark.parametrize("channels", [9, 96])
def test_auto_finds_nothing_in_maps_whose_channels_are_last(channels: int) -> None:
    class ChannelsLast(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.Sequential(nn.GELU(), nn.GELU())

        def forward(self, image: Tensor) -> Tensor:
            half = image[..., ::2, ::2].movedim(1, -1)
            return self.blocks(half.repeat(1, 1, 1, channels // 3))

    with pytest.raises(DistillError, match=r"^pairs: auto finds no stage in the student, .*inspec"):
        resolved(ChannelsLast(), net(4))


def test_auto_finds_nothing_in_a_transformer() -> None:
    with pytest.raises(DistillError, match="auto finds no stage in the teacher"):
        resolved(net(4), Tokens(8))


def test_the_pairs_of_families() -> None:
    assert resolved(CifarResNet(8), CifarResNet(26), "family") == both(CIFAR_FAMILY)
    assert resolved(WideResNet(10), WideResNet(16), "family") == both(WIDE_FAMILY)
    mixed = resolved(WideResNet(10), CifarResNet(8), "family")
    assert mixed == list(zip(WIDE_FAMILY, CIFAR_FAMILY, strict=True))
    torchvision, timm = map(pytest.importorskip, ("torchvision.models", "timm"))
    found = resolved(torchvision.resnet18(), timm.create_model("resnet18"), "family")
    assert found == both(IMAGENET_FAMILY)


def test_pairs_of_a_family_fit_the_networks_they_are_named_for() -> None:
    student, teacher = CifarResNet(8), WideResNet(10, 1)
    pairs = find_pairs("family", student, teacher, IMAGE)
    check_pairs(pairs, student, teacher, IMAGE, projection=False)


def test_networks_without_pairs_of_a_family_are_refused() -> None:
    message = r"^pairs: family knows no pairs of the teacher's Sequential; it knows .*CifarResNet"
    with pytest.raises(DistillError, match=message):
        resolved(CifarResNet(8), net(4), "family")
    torchvision, timm = map(pytest.importorskip, ("torchvision.models", "timm"))
    shallow = timm.create_model("resnet10t")
    with pytest.raises(DistillError, match="family knows no pairs of the student's ResNet"):
        resolved(shallow, timm.create_model("resnet18"), "family")
    with pytest.raises(DistillError, match="family has 3 of the student and 4 of the teacher"):
        resolved(CifarResNet(8), torchvision.resnet18(), "family")


def test_checking_gives_channels_and_sizes_of_both_networks() -> None:
    [shapes] = check_pairs([pair("1", "3", "0", "1")], net(4, 8), net(4), IMAGE, projection=True)
    assert shapes == PairShapes((4, 8), (4, 4), ((16, 16), (8, 8)), ((16, 16), (16, 16)))


def test_a_map_of_one_position_is_fine() -> None:
    model = nn.Sequential(net(4), nn.AdaptiveAvgPool2d(1))
    [shapes] = check_pairs([pair("0", "1")], model, model, IMAGE, projection=False)
    assert shapes.student_sizes == ((16, 16), (1, 1))


def test_other_channels_are_refused_unless_projected() -> None:
    pairs = [pair("0", "1")]
    message = (
        r"^pairs\.0: the student's FSP matrix is 8 x 8, the teacher's 4 x 4; their feature maps "
        r"must have equal channels, or projection must be true$"
    )
    with pytest.raises(DistillError, match=message):
        check_pairs(pairs, net(8), net(4), IMAGE, projection=False)
    [shapes] = check_pairs(pairs, net(8), net(4), IMAGE, projection=True)
    assert (shapes.student, shapes.teacher) == ((8, 8), (4, 4))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (pair("0", "zzz", "0", "1"), r"^pairs\.1\.student: zzz: Sequential has no module 'zzz'"),
        (pair("0", "1", "0", "zzz"), r"^pairs\.1\.teacher: zzz: Sequential has no module 'zzz'"),
        (pair("0", "2", "0", "1"), r"^pairs\.1\.student: second: has shape \(1, 1024\), expected"),
    ],
)
def test_a_pair_that_is_none_is_named(wrong: PathPair, message: str) -> None:
    student = nn.Sequential(*net(4), nn.Flatten())
    with pytest.raises(DistillError, match=message):
        check_pairs([pair("0", "1"), wrong], student, net(4), IMAGE, projection=False)


def test_a_value_that_is_no_tensor_is_named() -> None:
    class Both(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x, x

    model = nn.Sequential(conv(3, 4), Both())
    message = r"^pairs\.0\.student: 1: is a tuple of 2, not a tensor; choose :output\[0\] or"
    with pytest.raises(DistillError, match=message):
        check_pairs([pair("0", "1")], model, model, IMAGE, projection=False)
    [shapes] = check_pairs([pair("0", "1:output[1]")], model, model, IMAGE, projection=False)
    assert shapes.student == (4, 4)


def test_a_map_that_is_overwritten_is_named() -> None:
    model = nn.Sequential(nn.Tanh(), nn.BatchNorm2d(3), nn.ReLU(inplace=True))
    with pytest.raises(DistillError, match=r"^pairs\.0\.student: 1: was overwritten in place"):
        check_pairs([pair("0", "1")], model, model, IMAGE, projection=False)


def test_maps_of_other_ranks_or_batches_make_no_pair() -> None:
    model = nn.Sequential(*net(4), nn.Flatten(2), nn.Flatten(0, 1), nn.Unflatten(0, (2, 2)))
    with pytest.raises(DistillError, match=r"pairs\.0\.student: second: has 1 spatial axes"):
        check_pairs([pair("1", "2")], model, model, IMAGE, projection=False)
    with pytest.raises(DistillError, match=r"pairs\.0\.student: second: has batch size 2"):
        check_pairs([pair("2", "4", channel_dim=1)], model, model, IMAGE, projection=False)


def test_a_network_that_cannot_take_the_images_is_named() -> None:
    with pytest.raises(DistillError, match=r"^teacher: cannot take images of 3 x 32 x 32: "):
        check_pairs([], net(4), nn.Conv2d(1, 4, 3), IMAGE, projection=False)


def test_any_error_of_a_forward_pass_is_shown_with_the_users_own_lines() -> None:
    class Looks(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return {}[x.shape]

    message = r"^student: cannot take images of .*: KeyError: .*\n  \S+test_pairs\.py:\d+, in f"
    with pytest.raises(DistillError, match=message):
        check_pairs([], Looks(), net(4), IMAGE, projection=False)


def test_tokens_are_read_with_their_channels_last() -> None:
    pairs = [pair("embed", "block", channel_dim=-1)]
    [shapes] = check_pairs(pairs, Tokens(8), Tokens(8), IMAGE, projection=False)
    assert shapes == PairShapes((8, 8), (8, 8), ((5,), (5,)), ((5,), (5,)))


def test_tokens_must_say_where_their_channels_are() -> None:
    message = (
        r"^pairs\.0\.student: first: has three axes, shape \(1, 5, 8\), .*channel_dim=-1 for "
        r"\(B, T, C\)"
    )
    with pytest.raises(DistillError, match=message):
        check_pairs([pair("embed", "block")], Tokens(8), Tokens(8), IMAGE, projection=True)


def test_channels_are_not_tokens() -> None:
    message = r"^pairs\.0: the student's FSP matrix is 4 x 4, the teacher's 8 x 8;"
    pairs = [pair("embed", "block", channel_dim=-1)]
    with pytest.raises(DistillError, match=message):
        check_pairs(pairs, Tokens(4), Tokens(8), IMAGE, projection=False)


def test_a_vision_transformers_tokens_can_be_distilled() -> None:
    timm = pytest.importorskip("timm")
    settings = {"img_size": 32, "patch_size": 8, "depth": 2}
    student = timm.create_model("vit_tiny_patch16_224", **settings)
    teacher = timm.create_model("vit_tiny_patch16_224", embed_dim=96, **settings)
    pairs = [pair("blocks.0", "blocks.1", channel_dim=-1)]
    [shapes] = check_pairs(pairs, student, teacher, IMAGE, projection=True)
    assert shapes == PairShapes((192, 192), (96, 96), ((17,), (17,)), ((17,), (17,)))


def test_channels_that_are_last_move_in_views_and_others_stay() -> None:
    x, y, tokens, image = (
        torch.randn(2, *shape) for shape in ((3, 4, 5), (6, 4, 5), (7, 3), (4, 5, 3))
    )
    pairs = channels_first([(x, y), (tokens, tokens), (image, image)], [None, -1, -1])
    assert pairs[0][0] is x
    assert pairs[0][1] is y
    assert torch.equal(pairs[1][1], tokens.transpose(1, 2))
    assert pairs[1][0].data_ptr() == tokens.data_ptr()
    assert torch.equal(pairs[2][0], image.permute(0, 3, 1, 2))


def shapes_of(student: tuple[int, int], teacher: tuple[int, int], rank: int = 2) -> PairShapes:
    sizes = ((4,) * rank, (2,) * rank)
    return PairShapes(student, teacher, sizes, sizes)


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_a_projection_gives_the_teachers_channels_and_learns(rank: int) -> None:
    projection = Projection([shapes_of((3, 5), (4, 6), rank)])
    pair = torch.randn(2, 3, *(4,) * rank), torch.randn(2, 5, *(2,) * rank)
    [(first, second)] = projection([pair])
    assert first.shape == (2, 4, *(4,) * rank)
    assert second.shape == (2, 6, *(2,) * rank)
    (first.square().sum() + second.square().sum()).backward()
    assert all(parameter.grad is not None for parameter in projection.parameters())


def test_a_projection_is_linear_in_the_channels_and_leaves_maps_that_fit() -> None:
    projection = Projection([shapes_of((3, 5), (4, 5))])
    x, y = torch.randn(2, 3, 4, 4), torch.randn(2, 5, 2, 2)
    [(first, second)] = projection([(x, y)])
    [weight] = projection.parameters()
    torch.testing.assert_close(first, torch.einsum("oc,bchw->bohw", weight[:, :, 0, 0], x))
    assert second is y
