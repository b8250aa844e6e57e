"""Exported files, loaded as someone would who has none of this package."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from sklearn.datasets import load_digits
from torch import Tensor, nn

from distill.report.made_up import run_of
from distill.studies import open_study
from fsp_kernels.distill import checkpoint, export, records
from fsp_kernels.distill.config import Network
from fsp_kernels.distill.errors import DistillError
from fsp_kernels.distill.export import export_run
from fsp_kernels.distill.models import build_model
from fsp_kernels.distill.study import Study

# No traced program can ask its input which way to go.
UNEXPORTABLE = """
from torch import nn

class Net(nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, padding=1)
        self.relu = nn.ReLU()
        self.conv2 = nn.Conv2d(4, 4, 3, padding=1)
        self.relu2 = nn.ReLU()
        self.fc = nn.Linear(4, classes)

    def forward(self, x):
        x = self.relu2(self.conv2(self.relu(self.conv(x))))
        x = x.mean((2, 3))
        return self.fc(x) if x.sum() > 0 else self.fc(-x)
"""


@pytest.fixture(scope="module")
def run(studied: Study) -> Path:
    return studied.folder_of("two-stage", 1)


@pytest.fixture(scope="module")
def exported(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exported")
    export_run(run, folder)
    return folder


def bare_network() -> nn.Module:
    network = Network(model="cifar/resnet8")
    return build_model(network, in_channels=1, classes=10).eval()


@pytest.fixture(scope="module")
def network(run: Path) -> nn.Module:
    """The run's."""
    model = bare_network()
    model.load_state_dict(checkpoint.load(run / records.MODEL).tensors)
    return model


def images(study: Study, count: int) -> Tensor:
    return torch.stack([study.splits.test[index].image for index in range(count)])


def test_three_files_are_written_and_told(run: Path, tmp_path: Path) -> None:
    paths = export_run(run, tmp_path / "new")
    names = ["model.safetensors", "model.pt2", "model.json"]
    assert paths == [tmp_path / "new" / name for name in names]
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == sorted(names)


@pytest.mark.parametrize("count", [1, 2, 7, 100])
@torch.no_grad()
def test_the_program_gives_the_networks_logits_for_any_batch(
    exported: Path, network: nn.Module, studied: Study, count: int
) -> None:
    program = torch.export.load(exported / "model.pt2").module()
    batch = images(studied, count)
    torch.testing.assert_close(program(batch), network(batch), rtol=1e-4, atol=1e-5)


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


@torch.no_grad()
def test_the_weights_are_a_state_dict_of_the_networks(
    exported: Path, network: nn.Module, studied: Study
) -> None:
    fresh = bare_network()
    fresh.load_state_dict(load_file(exported / "model.safetensors"))
    batch = images(studied, 5)
    assert torch.equal(fresh(batch), network(batch))


def test_the_note_tells_what_the_network_takes_and_gives(exported: Path, run: Path) -> None:
    note = json.loads((exported / "model.json").read_text())
    assert (note["network"], note["arm"], note["seed"]) == ("cifar/resnet8", "two-stage", 1)
    assert note["accuracy"] == {"validation": records.read(run).accuracy}
    assert note["input"]["shape"] == ["batch", 1, 8, 8]
    assert note["input"]["dtype"] == "float32"
    assert note["output"] == {"shape": ["batch", 10], "meaning": "logits"}
    assert note["environment"]["torch"] == torch.__version__.split("+")[0]


def test_the_notes_normalisation_makes_the_images_that_the_network_saw(
    exported: Path, studied: Study
) -> None:
    note = json.loads((exported / "model.json").read_text())["input"]
    pixels = torch.from_numpy(load_digits().images).float()
    assert (pixels.min(), pixels.max()) == tuple(note["pixel_range"])
    [mean], [std] = note["mean"], note["std"]
    seen = (pixels - mean) / std
    difference = (seen - studied.splits.test[0].image).abs().amax((1, 2))
    assert difference.min() < 1e-6


def test_a_teacher_can_be_exported(studied: Study, tmp_path: Path) -> None:
    export_run(studied.folder / "teacher", tmp_path)
    assert json.loads((tmp_path / "model.json").read_text())["network"] == "cifar/resnet14"
    assert torch.export.load(tmp_path / "model.pt2").module()(images(studied, 2)).shape == (2, 10)


def test_weights_that_the_network_started_from_are_not_needed(run: Path, tmp_path: Path) -> None:
    tree = records.read(run)
    tree.config["student"]["weights"] = "gone.safetensors"
    folder = tmp_path / "run"
    records.write(tree, folder)
    (folder / records.MODEL).write_bytes((run / records.MODEL).read_bytes())
    export_run(folder, tmp_path / "export")
    assert (tmp_path / "export" / "model.pt2").exists()


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DistillError, match=r"holds no finished run$"):
        export_run(tmp_path, tmp_path / "export")
    assert not (tmp_path / "export").exists()


def test_of_a_studys_folder_the_runs_are_named(studied: Study, tmp_path: Path) -> None:
    with pytest.raises(DistillError, match="is no run, but holds some; choose one of") as caught:
        export_run(studied.folder, tmp_path / "out")
    assert str(studied.folder_of("two-stage", 1)) in str(caught.value)
    assert str(studied.folder / "teacher") in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_damaged_weights_are_refused(run: Path, tmp_path: Path) -> None:
    records.write(records.read(run), tmp_path / "run")
    content = bytearray((run / records.MODEL).read_bytes())
    content[-5] ^= 1
    (tmp_path / "run" / records.MODEL).write_bytes(content)
    with pytest.raises(DistillError, match=r"model\.safetensors: .*damaged"):
        export_run(tmp_path / "run", tmp_path / "export")
    assert not (tmp_path / "export").exists()


def test_weights_of_another_network_are_refused(studied: Study, tmp_path: Path) -> None:
    records.write(run_of("kd"), tmp_path / "run")
    teachers = (studied.folder / "teacher" / records.MODEL).read_bytes()
    (tmp_path / "run" / records.MODEL).write_bytes(teachers)
    with pytest.raises(DistillError, match="its weights do not fit the network"):
        export_run(tmp_path / "run", tmp_path / "export")


def test_a_network_that_torch_cannot_export_is_refused_and_nothing_written(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "unexportable.py").write_text(UNEXPORTABLE)
    monkeypatch.syspath_prepend(tmp_path)
    networks = [f"{role}={{model: 'unexportable:Net'}}" for role in ("student", "teacher")]
    pairs = "pairs=[{student: [relu, relu2], teacher: [relu, relu2]}]"
    study = open_study(recipe, tmp_path / "study", *networks, pairs, "stage2.steps=1")
    study.student("baseline", 0)
    with pytest.raises(DistillError, match=r"the network can't be exported by torch\.export: "):
        export_run(study.folder_of("baseline", 0), tmp_path / "export")
    assert not list((tmp_path / "export").iterdir())


def test_a_program_of_other_logits_is_refused(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = torch.export.load

    class Off:
        """A program as ``torch.export.load`` gives it, a little off."""

        def __init__(self, file: object) -> None:
            self._program = load(file).module()

        def module(self) -> object:
            return lambda batch: self._program(batch) + 0.01

    monkeypatch.setattr(export.torch.export, "load", Off)
    with pytest.raises(DistillError, match=r"logits differ from the network's by 0\.0"):
        export_run(run, tmp_path)
    assert not list(tmp_path.iterdir())
