"""What ``fsp-distill inspect`` prints, and that its pairs can be pasted into a recipe."""

from __future__ import annotations

import io
import re

import pytest
import torch
import yaml
from rich.console import Console
from torch import Tensor, nn

from fsp_kernels.distill.config import Pair
from fsp_kernels.distill.inspection import blank_image, pairs_yaml, print_inspection
from fsp_kernels.distill.models import CifarResNet, WideResNet
from fsp_kernels.distill.settings import read
from fsp_kernels.errors import DistillError
from fsp_kernels.features import pairs


class Splitter(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, x


class Odd(nn.Module):
    """One module of each kind that cannot be tapped, or is no map."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(3)
        self.relu = nn.ReLU(inplace=True)
        self.often = nn.Tanh()
        self.idle = nn.Identity()
        self.split = Splitter()

    def forward(self, image: Tensor) -> Tensor:
        x = self.relu(self.norm(image))
        for _ in range(4):
            x = self.often(x)
        return self.split(x)[0]


class Family(CifarResNet):
    """An architecture that a test can name pairs for."""


FLAT = nn.Sequential(nn.Flatten(), nn.Linear(3072, 2))


def printed(*models: nn.Module, modules: bool = False, width: int = 100) -> str:
    stream = io.StringIO()
    console = Console(file=stream, width=width)
    print_inspection(console, torch.zeros(1, 3, 32, 32), *models, modules=modules)
    return stream.getvalue()


def cells(text: str) -> list[list[str]]:
    """The rows of printed tables."""
    return [re.split(r"  +", line.strip()) for line in text.splitlines()]


def test_an_input_shape_is_channels_height_and_width() -> None:
    assert blank_image("3x32x48").shape == (1, 3, 32, 48)


@pytest.mark.parametrize(
    "text", ["", "32x32", "3x32x32x1", "3x32x0", "3x32x-1", "3 x 32 x 32", "3x32x1025", "9" * 5000]
)
def test_another_input_shape_is_refused(text: str) -> None:
    with pytest.raises(DistillError, match=f"--input: is {text!r}, must be channels, height and"):
        blank_image(text)


def test_modules_come_in_order_after_the_pairs_with_type_output_and_stage() -> None:
    text = printed(CifarResNet(8), modules=True)
    pairs, _, listing = text.partition("Student: CifarResNet on 3x32x32")
    assert pairs.strip() == printed(CifarResNet(8)).strip()
    rows = [row for row in cells(listing) if len(row) > 1][1:]
    assert [row[0] for row in rows] == [path for path, _ in CifarResNet(8).named_modules() if path]
    assert ["conv", "Conv2d", "16x32x32"] in rows
    assert ["fc", "Linear", "10"] in rows
    assert {row[0]: row[3] for row in rows if len(row) > 3} == {
        "relu": "1 first",
        "stage1": "1 last",
        "stage2.0.relu1": "2 first",
        "stage2": "2 last",
        "stage3.0.relu1": "3 first",
        "stage3": "3 last",
    }


@pytest.mark.parametrize(
    ("path", "note"),
    [
        ("norm", "overwritten in place"),
        ("often", "runs 4 times"),
        ("idle", "did not run"),
        ("split", "tuple; [0] is 3x32x32; [1] is 3x32x32"),
    ],
)
def test_what_cannot_be_tapped_is_noted(path: str, note: str) -> None:
    [row] = [row for row in cells(printed(Odd(), modules=True)) if row[0] == path]
    assert row[-1] == note


def test_pairs_of_auto_and_family_are_listed_and_those_of_auto_can_be_pasted() -> None:
    text = printed(CifarResNet(8), CifarResNet(14))
    rows = cells(text)
    assert [row[0] for row in rows if row[-1] == "fits"] == ["auto"] * 3 + ["family"] * 3
    assert ["auto", "relu 16x32x32", "relu 16x32x32", "fits"] in rows
    pasted = yaml.safe_load(text[text.index("\npairs:") :])["pairs"]
    assert pasted[0] == {"student": ["relu", "stage1"], "teacher": ["relu", "stage1"]}
    assert len(pasted) == 3


def test_pasted_pairs_read_back_as_they_were() -> None:
    given = [
        Pair(student=("layer1:input", "layer1"), teacher=("a" * 60, "b" * 60)),
        Pair(student=("0", "1"), teacher=("2", "3")),
    ]
    tree = yaml.safe_load(pairs_yaml(given))
    assert [read(Pair, item) for item in tree["pairs"]] == given


def test_channels_that_differ_need_a_projection_and_sizes_that_differ_pooling(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # The first maps both have 16 channels.
    assert "needs fsp.projection (32 -> 16)" in printed(WideResNet(10, 2), CifarResNet(8))
    name = f"{Family.__module__}.{Family.__qualname__}"
    monkeypatch.setitem(pairs.FAMILIES, name, (("stage1", "stage2"),) * 3)
    text = printed(Family(8), Family(8), width=200)
    assert text.count("student pooled to 16x16, teacher pooled to 16x16") == 3
    text = printed(Family(8), CifarResNet(8), width=200)
    assert "student pooled to 16x16, needs fsp.projection (32 -> 16)" in text


def test_a_network_alone_is_paired_with_its_like() -> None:
    assert "teacher: [stage3.0.relu1, stage3]" in printed(CifarResNet(8))


def test_without_stages_a_hint_is_printed() -> None:
    text = printed(FLAT, CifarResNet(8))
    assert text.startswith("pairs: auto finds no stage in the student")
    assert "fsp-distill inspect --modules" in text


def test_maps_within_tuples_are_named_where_there_are_no_others() -> None:
    class Tuples(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return self[1](self[0](x)[0])[1]

    text = " ".join(printed(Tuples(Splitter(), Splitter())).split())
    assert "maps that auto does not look at are 0:output[0], 0:output[1], 1:output[0]" in text


def test_a_network_that_cannot_take_the_input_is_refused() -> None:
    with pytest.raises(DistillError, match=r"^student: cannot take images of 3 x 32 x 32"):
        printed(nn.Sequential(nn.Conv2d(1, 4, 3)))


def test_everything_is_printed_within_a_hundred_columns() -> None:
    models = pytest.importorskip("torchvision.models")
    text = printed(models.mobilenet_v3_small(), models.resnet18(), modules=True)
    assert max(map(len, text.splitlines())) <= 100
    assert "Student: MobileNetV3 on 3x32x32" in text
    assert "Teacher: ResNet on 3x32x32" in text
