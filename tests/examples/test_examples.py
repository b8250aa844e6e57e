"""The scripts of ``examples/`` run as users run them, and do to the networks what they say."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn

from fsp_kernels.distill.models import CifarResNet

ROOT = Path(__file__).parents[2]
SCRIPTS = ["plain_pytorch", "lightning_module"]
STEPS = 3


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # networks this small gain nothing from more
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=SCRIPTS)
def script(request: pytest.FixtureRequest) -> str:
    if request.param == "lightning_module":
        pytest.importorskip("lightning")
    return request.param


def run(script: str, steps: int, cwd: Path) -> str:
    path = os.path.relpath(ROOT / "examples" / f"{script}.py", cwd)
    command = [sys.executable, path, "--steps", str(steps)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def before_and_after(what: str, output: str) -> list[float]:
    [line] = re.findall(rf"^{what}: (\S+) -> (\S+)$", output, flags=re.MULTILINE)
    return [float(number) for number in line]


def load(script: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(script, ROOT / "examples" / f"{script}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def weights(network: nn.Module) -> dict[str, Tensor]:
    """Buffers, too: the statistics of batch normalisation move in a teacher left to train."""
    return {name: x.detach().cpu().clone() for name, x in network.state_dict().items()}


def changed(network: nn.Module, before: dict[str, Tensor]) -> set[str]:
    return {name for name, x in weights(network).items() if not torch.equal(x, before[name])}


def hooks(network: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in network.modules())


def first_stage(script: str, student: nn.Module, teacher: nn.Module) -> list[float]:
    """The FSP loss of each step, as the script's own code takes it."""
    module = load(script)
    images, labels = torch.rand(192, 1, 8, 8), torch.zeros(192, dtype=torch.long)
    if script == "plain_pytorch":
        data = images.to(module.DEVICE), labels.to(module.DEVICE)
        networks = student.to(module.DEVICE), teacher.to(module.DEVICE)
        return module.distil(*networks, *data, STEPS)
    stage = module.FspDistillation(student, teacher, module.PAIRS)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(images, labels), 64)
    module.trainer(STEPS).fit(stage, loader)
    return [float(loss) for loss in stage.losses]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "elsewhere"),
    [
        ("plain_pytorch", False),
        ("plain_pytorch", True),
        ("lightning_module", True),
        pytest.param("lightning_module", False, marks=pytest.mark.thorough),
    ],
    indirect=["script"],
)
def test_the_script_distils_and_then_learns_the_task(
    script: str, elsewhere: bool, tmp_path: Path
) -> None:
    # Ten classes. At 20 steps the student gets over 80 % of the digits; that many are enough to
    # tell learning from luck on any machine.
    output = run(script, steps=20, cwd=tmp_path if elsewhere else ROOT)
    start, end = before_and_after("FSP loss", output)
    assert 0 < end < 0.6 * start  # batches alone differ by less
    untrained, trained = before_and_after("accuracy of the student", output)
    assert untrained < 0.3
    assert 0.5 < trained <= 1
    assert not list(tmp_path.iterdir())


def test_importing_the_script_does_nothing(
    script: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    state = torch.get_rng_state()
    load(script)
    assert capfd.readouterr().out == ""
    assert not list(tmp_path.iterdir())
    assert torch.equal(torch.get_rng_state(), state)


def test_the_first_stage_changes_the_student_alone(script: str) -> None:
    student, teacher = CifarResNet(8, in_channels=1), CifarResNet(14, in_channels=1)
    before = weights(student), weights(teacher)
    assert len(first_stage(script, student, teacher)) == STEPS
    assert not changed(teacher, before[1])
    # The FSP loss ends at the last map: the classifier is for the second stage.
    unchanged = weights(student).keys() - changed(student, before[0])
    assert unchanged == {"fc.weight", "fc.bias"}


def test_a_student_equal_to_its_teacher_has_no_loss(script: str) -> None:
    # Without batch normalisation, which takes the batch's statistics in the student and its own in
    # the teacher. On a GPU a convolution that is trained may round in another way.
    student, teacher, other = (_plain_network() for _ in range(3))
    student.load_state_dict(teacher.state_dict())
    assert first_stage(script, student, teacher)[0] <= 1e-4 * first_stage(script, other, teacher)[0]


def _plain_network() -> nn.Module:
    network = CifarResNet(8, in_channels=1)
    for module in list(network.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.BatchNorm2d):
                setattr(module, name, nn.Identity())
    return network


def test_the_first_stage_leaves_no_hooks(script: str) -> None:
    networks = CifarResNet(8, in_channels=1), CifarResNet(8, in_channels=1)
    first_stage(script, *networks)
    assert [hooks(network) for network in networks] == [0, 0]


def test_lightning_saves_and_optimises_the_student_alone() -> None:
    pytest.importorskip("lightning")
    module = load("lightning_module")
    student, teacher = CifarResNet(8, in_channels=1), CifarResNet(14, in_channels=1)
    stage = module.FspDistillation(student, teacher, module.PAIRS)
    own = {f"distiller.student.{name}" for name in student.state_dict()}
    assert stage.state_dict().keys() == own
    [group] = stage.configure_optimizers().param_groups
    assert [id(x) for x in group["params"]] == [id(x) for x in student.parameters()]


@pytest.fixture
def huggingface(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the example and the recipe that its docstring shows."""
    pytest.importorskip("datasets")
    monkeypatch.chdir(tmp_path)
    source = shutil.copy(ROOT / "examples" / "huggingface_dataset.py", tmp_path)
    docstring = load("huggingface_dataset").__doc__
    [recipe] = re.findall(r"yaml is\n\n((?:    .+\n)+)", docstring)
    Path(source).with_suffix(".yaml").write_text(textwrap.dedent(recipe))
    return tmp_path


def test_the_trainer_takes_a_hugging_face_data_set(huggingface: Path) -> None:
    from fsp_kernels.distill.config import load_config
    from fsp_kernels.distill.data import load_splits

    assignments = ["data.arguments={test_images: 300}", "data.validation_images=97"]
    config = load_config(huggingface / "huggingface_dataset.yaml", assignments)
    splits = load_splits(config.data)
    assert splits.validation is not None
    assert [len(split) for split in splits] == [1400, 1400, 97, 300]
    assert splits.image_shape == (3, 8, 8)
    assert splits.classes == 10
    unchecked = load_config(huggingface / "huggingface_dataset.yaml", ["data.corrupt=unchecked"])
    assert len(load_splits(unchecked.data).test) == 360


@pytest.mark.slow
def test_a_hugging_face_data_set_is_distilled_by_the_recipe_of_its_docstring(
    huggingface: Path,
) -> None:
    steps = ["teacher_training.steps=40", "stage1.steps=10", "stage2.steps=40", "data.workers=1"]
    command = [sys.executable, "-m", "fsp_kernels.distill", "train", "huggingface_dataset.yaml"]
    done = subprocess.run(
        [*command, *steps],
        cwd=huggingface,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    [accuracy] = re.findall(r"two-stage seed 0: test accuracy (\S+)%", done.stdout)
    assert float(accuracy) > 50  # of ten classes
