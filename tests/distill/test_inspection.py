"""The tables of ``fsp-distill inspect``, and that what is to be pasted can be read back."""

from __future__ import annotations

import io

import pytest
import torch
import yaml
from rich.console import Console
from torch import Tensor, nn

from fsp_kernels.distill import pairs
from fsp_kernels.distill.config import Pair
from fsp_kernels.distill.errors import DistillError
from fsp_kernels.distill.inspection import (
    Row,
    module_table,
    pair_table,
    pairs_yaml,
    parse_input_shape,
    print_inspection,
)
from fsp_kernels.distill.models import CifarResNet, WideResNet
from fsp_kernels.distill.settings import read

IMAGE = torch.zeros(1, 3, 32, 32)


class Odd(nn.Module):
    """One module of each kind that cannot be tapped, or is no map."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(3)
        self.relu = nn.ReLU(inplace=True)
        self.twice = nn.Tanh()
        self.often = nn.Tanh()
        self.idle = nn.Identity()
        self.split = Splitter()

    def forward(self, image: Tensor) -> Tensor:
        x = self.twice(self.twice(self.relu(self.norm(image))))
        for _ in range(4):
            x = self.often(x)
        return self.split(x)[0]


class Splitter(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, x


class Family(CifarResNet):
    """An architecture that a test can name pairs for."""


def printed(*models: nn.Module, modules: bool = False) -> str:
    stream = io.StringIO()
    console = Console(file=stream, width=100)
    print_inspection(console, (3, 32, 32), *models, modules=modules)
    return stream.getvalue()


def test_an_input_shape_is_channels_height_and_width() -> None:
    assert parse_input_shape("3x32x48") == (3, 32, 48)


@pytest.mark.parametrize(
    "text", ["", "32x32", "3x32x32x1", "3x32x0", "3x32x-1", "3 x 32 x 32", "3x32x1025", "9" * 5000]
)
def test_another_input_shape_is_refused(text: str) -> None:
    with pytest.raises(DistillError, match=f"--input: is {text!r}, must be channels, height and"):
        parse_input_shape(text)


def test_a_row_has_path_type_and_output_of_each_module() -> None:
    rows = {row.path: row for row in module_table(CifarResNet(8), IMAGE)}
    assert list(rows) == [path for path, _ in CifarResNet(8).named_modules() if path]
    assert rows["conv"] == Row("conv", "Conv2d", "16x32x32", "", "")
    assert rows["fc"] == Row("fc", "Linear", "10", "", "")


def test_first_and_last_maps_of_stages_are_marked() -> None:
    marks = {row.path: row.stage for row in module_table(CifarResNet(8), IMAGE) if row.stage}
    assert marks == {
        "relu": "1 first",
        "stage1": "1 last",
        "stage2.0.relu1": "2 first",
        "stage2": "2 last",
        "stage3.0.relu1": "3 first",
        "stage3": "3 last",
    }


def test_what_cannot_be_tapped_is_noted() -> None:
    notes = {row.path: row.note for row in module_table(Odd(), IMAGE)}
    assert notes == {
        "norm": "overwritten in place",
        "relu": "",
        "twice": "runs twice",
        "often": "runs 4 times",
        "idle": "did not run",
        "split": "tuple; [0] is 3x32x32; [1] is 3x32x32",
    }


def test_pairs_of_auto_and_family_are_listed() -> None:
    rows = pair_table(CifarResNet(8), CifarResNet(14), IMAGE)
    assert [row.source for row in rows] == ["auto"] * 3 + ["family"] * 3
    assert rows[0].pair == Pair(student=("relu", "stage1"), teacher=("relu", "stage1"))
    assert rows[1].shapes.student_sizes == ((16, 16), (16, 16))
    assert {row.verdict for row in rows} == {"fits"}


def test_channels_that_differ_need_a_projection() -> None:
    rows = pair_table(WideResNet(10, 2), CifarResNet(8), IMAGE)
    assert rows[0].verdict == "needs fsp.projection (32 -> 16)"  # the first maps both have 16


def test_maps_that_differ_in_size_are_pooled(monkeypatch: pytest.MonkeyPatch) -> None:
    name = f"{Family.__module__}.{Family.__qualname__}"
    monkeypatch.setitem(pairs.FAMILIES, name, (("stage1", "stage2"), ("stage2", "stage3")))
    rows = pair_table(Family(8), Family(8), IMAGE)
    verdicts = [row.verdict for row in rows if row.source == "family"]
    assert verdicts == ["pooled to 16x16", "pooled to 8x8"]


def test_pooling_of_one_network_alone_is_said_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    name = f"{Family.__module__}.{Family.__qualname__}"
    monkeypatch.setitem(pairs.FAMILIES, name, (("stage1", "stage2"),) * 3)
    rows = pair_table(Family(8), CifarResNet(8), IMAGE)
    first = next(row for row in rows if row.source == "family")
    assert first.verdict == "student pooled to 16x16, needs fsp.projection (32 -> 16)"


def test_networks_without_stages_or_family_have_no_pairs() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(3072, 2))
    assert pair_table(model, CifarResNet(8), IMAGE) == []


def test_a_network_that_cannot_take_the_input_is_refused() -> None:
    with pytest.raises(DistillError, match=r"^student\.model: cannot take images of 3 x 32 x 32"):
        module_table(nn.Sequential(nn.Conv2d(1, 4, 3)), IMAGE)


def test_pasted_pairs_read_back_as_they_were() -> None:
    given = [
        Pair(student=("layer1:input", "layer1"), teacher=("a" * 60, "b" * 60)),
        Pair(student=("0", "1"), teacher=("2", "3")),
    ]
    tree = yaml.safe_load(pairs_yaml(given))
    assert [read(Pair, item) for item in tree["pairs"]] == given


def test_everything_is_printed_within_a_hundred_columns() -> None:
    models = pytest.importorskip("torchvision.models")
    text = printed(models.mobilenet_v3_small(), models.resnet18(), modules=True)
    assert max(map(len, text.splitlines())) <= 100
    assert "Student: MobileNetV3 on 3x32x32" in text
    assert "Teacher: ResNet on 3x32x32" in text


def test_what_is_printed_ends_in_pairs_to_paste() -> None:
    text = printed(CifarResNet(8), CifarResNet(14))
    tree = yaml.safe_load(text[text.index("\npairs:") :])
    assert tree["pairs"][0] == {"student": ["relu", "stage1"], "teacher": ["relu", "stage1"]}
    assert len(tree["pairs"]) == 3


def test_a_network_alone_is_paired_with_its_like() -> None:
    assert "teacher: [stage3.0.relu1, stage3]" in printed(CifarResNet(8))


def test_without_stages_a_hint_is_printed() -> None:
    text = printed(nn.Sequential(nn.Flatten(), nn.Linear(3072, 2)))
    assert "auto finds no stage in the student" in text
    assert "fsp-distill inspect --modules" in text


def test_maps_within_tuples_are_named_where_there_are_no_others() -> None:
    class Tuples(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return self[1](self[0](x)[0])[1]

    text = " ".join(printed(Tuples(Splitter(), Splitter())).split())
    assert "maps that auto does not look at are 0:output[0], 0:output[1], 1:output[0]" in text


def test_modules_come_after_the_pairs_and_where_asked_for() -> None:
    text = printed(CifarResNet(8), modules=True)
    assert text.startswith(printed(CifarResNet(8)))
    assert text.index("pairs:") < text.index("Student: CifarResNet on 3x32x32")
