"""Exported files, used by someone who does not have this package."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from sklearn.datasets import load_digits
from studies import open_study
from torch import Tensor, nn

from fsp_kernels.distill import checkpoint, export, records
from fsp_kernels.distill.config import Network
from fsp_kernels.distill.export import export_run
from fsp_kernels.distill.models import build_model
from fsp_kernels.distill.study import Study
from fsp_kernels.errors import DistillError

NAMES = ["model.safetensors", "model.pt2", "model.json"]
# torch.export cannot follow a branch on the input.
UNEXPORTABLE = """
from torch import nn

class Net(nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, padding=1)
        self.relu = nn.ReLU()
        self.fc = nn.Linear(4, classes)

    def forward(self, x):
        x = self.relu(self.conv(x)).mean((2, 3))
        return self.fc(x) if x.sum() > 0 else self.fc(-x)
"""


@pytest.fixture(scope="module")
def run(studied: Study) -> Path:
    return studied.folder_of("two-stage", 1)


@pytest.fixture(scope="module")
def exported(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that did not exist."""
    folder = tmp_path_factory.mktemp("exported") / "new"
    assert export_run(run, folder) == [folder / name for name in NAMES]
    return folder


def network_of(weights: dict[str, Tensor]) -> nn.Module:
    model = build_model(Network(model="cifar/resnet8"), in_channels=1, classes=10).eval()
    model.load_state_dict(weights)
    return model


@pytest.fixture(scope="module")
def network(run: Path) -> nn.Module:
    """The network of the run."""
    return network_of(checkpoint.load(run / records.MODEL).tensors)


def images(study: Study, count: int) -> Tensor:
    return torch.stack([study.splits.test[index].image for index in range(count)])


@pytest.mark.parametrize("count", [1, 2, 7, 100])
@torch.no_grad()
def test_program_and_weights_give_the_networks_logits_for_any_batch(
    exported: Path, network: nn.Module, studied: Study, count: int
) -> None:
    batch = images(studied, count)
    program = torch.export.load(exported / "model.pt2").module()
    torch.testing.assert_close(program(batch), network(batch), rtol=1e-4, atol=1e-5)
    weights = load_file(exported / "model.safetensors")
    assert torch.equal(network_of(weights)(batch), network(batch))
    assert {path.name for path in exported.iterdir()} == set(NAMES)


@torch.no_grad()
def test_the_program_needs_nothing_but_torch(
    exported: Path, network: nn.Module, studied: Study, tmp_path: Path
) -> None:
    batch = images(studied, 3)
    torch.save(batch, tmp_path / "batch.pt")
    code = """
import sys
sys.modules["fsp_kernels"] = None
import torch
program, batch, logits = sys.argv[1:]
torch.save(torch.export.load(program).module()(torch.load(batch)), logits)
"""
    paths = [exported / "model.pt2", tmp_path / "batch.pt", tmp_path / "logits.pt"]
    subprocess.run([sys.executable, "-c", code, *map(str, paths)], check=True, cwd=tmp_path)
    logits = torch.load(tmp_path / "logits.pt")
    torch.testing.assert_close(logits, network(batch), rtol=1e-4, atol=1e-5)


def test_the_note_tells_what_the_network_takes_and_gives(
    exported: Path, run: Path, studied: Study
) -> None:
    note = json.loads((exported / "model.json").read_text())
    assert (note["network"], note["arm"], note["seed"]) == ("cifar/resnet8", "two-stage", 1)
    assert note["accuracy"] == {"validation": records.read(run).accuracy}
    assert note["input"]["shape"] == ["batch", 1, 8, 8]
    assert note["input"]["dtype"] == "float32"
    assert note["output"] == {"shape": ["batch", 10], "meaning": "logits"}
    assert note["environment"]["torch"] == torch.__version__.split("+")[0]
    # Its normalisation makes the images that the network saw.
    pixels = torch.from_numpy(load_digits().images).float()
    assert (pixels.min(), pixels.max()) == tuple(note["input"]["pixel_range"])
    [mean], [std] = note["input"]["mean"], note["input"]["std"]
    difference = ((pixels - mean) / std - studied.splits.test[0].image).abs().amax((1, 2))
    assert difference.min() < 1e-6


def test_a_teacher_can_be_exported(studied: Study, tmp_path: Path) -> None:
    export_run(studied.folder / "teacher", tmp_path)
    assert json.loads((tmp_path / "model.json").read_text())["network"] == "cifar/resnet14"
    assert torch.export.load(tmp_path / "model.pt2").module()(images(studied, 2)).shape == (2, 10)


def copied(run: Path, folder: Path, content: bytes, **student: str) -> Path:
    """A run's record in another folder, with other weights and settings of its student."""
    record = records.read(run)
    record.config["student"] |= student
    records.write(record, folder)
    (folder / records.MODEL).write_bytes(content)
    return folder


def test_weights_that_the_network_started_from_are_not_needed(run: Path, tmp_path: Path) -> None:
    content = (run / records.MODEL).read_bytes()
    folder = copied(run, tmp_path / "run", content, weights="gone.safetensors")
    assert export_run(folder, tmp_path / "export")[1].exists()


def test_a_folder_without_a_run_is_refused(studied: Study, tmp_path: Path) -> None:
    with pytest.raises(DistillError, match=r"holds no finished run$"):
        export_run(tmp_path, tmp_path / "export")
    with pytest.raises(DistillError, match="is not a run, but contains some; choose") as caught:
        export_run(studied.folder, tmp_path / "export")
    for folder in (studied.folder_of("two-stage", 1), studied.folder / "teacher"):
        assert str(folder) in str(caught.value)
    assert not (tmp_path / "export").exists()


def test_weights_that_are_damaged_or_of_another_network_are_refused(
    run: Path, studied: Study, tmp_path: Path
) -> None:
    content = bytearray((run / records.MODEL).read_bytes())
    content[-5] ^= 1
    with pytest.raises(DistillError, match=r"model\.safetensors: .*damaged"):
        export_run(copied(run, tmp_path / "damaged", content), tmp_path / "export")
    teachers = (studied.folder / "teacher" / records.MODEL).read_bytes()
    with pytest.raises(DistillError, match="its weights do not fit the network"):
        export_run(copied(run, tmp_path / "other", teachers), tmp_path / "export")
    assert not (tmp_path / "export").exists()


def test_a_network_that_torch_cannot_export_is_refused_and_nothing_written(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "unexportable.py").write_text(UNEXPORTABLE)
    monkeypatch.syspath_prepend(tmp_path)
    networks = [f"{role}={{model: 'unexportable:Net'}}" for role in ("student", "teacher")]
    pairs = "pairs=[{student: [conv, relu], teacher: [conv, relu]}]"
    study = open_study(recipe, tmp_path / "study", *networks, pairs, "stage2.steps=1")
    study.student("baseline", 0)
    with pytest.raises(DistillError, match=r"the network can't be exported by torch\.export: "):
        export_run(study.folder_of("baseline", 0), tmp_path / "export")
    assert not list((tmp_path / "export").iterdir())


def test_a_program_of_other_logits_is_refused(
    run: Path, network: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Off:
        def module(self) -> object:
            return lambda batch: network(batch) + 0.01

    monkeypatch.setattr(export.torch.export, "load", lambda _file: Off())
    with pytest.raises(DistillError, match=r"logits differ from the network's by 0\.0"):
        export_run(run, tmp_path)
    assert not list(tmp_path.iterdir())
