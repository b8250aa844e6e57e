"""A recipe that takes a second or two, and the networks and data it speaks of."""

from __future__ import annotations

import io
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState
from rich.console import Console

from fsp_kernels.distill.config import Config, load_config
from fsp_kernels.distill.interruption import Interruption
from fsp_kernels.distill.monitor import Monitor
from fsp_kernels.distill.study import Study
from fsp_kernels.distill.teacher import LiveTeacher

TINY_RECIPE = """\
seeds: [0, 1]
data: {dataset: digits, train_images: 40, teacher_images: 60, augment: false, batch_size: 20}
teacher: {model: cifar/resnet14}
teacher_training: {steps: 6, learning_rate: 0.05}
student: {model: cifar/resnet8}
pairs:
  - {student: [stage1.0.relu1, stage1], teacher: [stage1.0.relu1, stage1]}
  - {student: ["stage3.0.conv2:input", stage3], teacher: ["stage3.0.conv2:input", stage3]}
fsp: {beta: 1e-5}
stage1: {steps: 8, learning_rate: 1e-4}
stage2: {steps: 6, learning_rate: 0.05}
execution: {threads: 1}
evaluation: {split: validation, every: 4, targets: [0.05, 1.0]}
checkpoints: {every: 3}
"""


def silent_monitor() -> Monitor:
    """Prints nothing, and writes nothing for TensorBoard."""
    return Monitor(Console(file=io.StringIO()))


def open_study(recipe: Path, folder: Path, *overrides: str, resume: bool | None = None) -> Study:
    """The study of a recipe in a folder, which tells nobody of what it does."""
    config = load_config(recipe, overrides)
    return Study(config, folder, silent_monitor(), Interruption(), resume)


@pytest.fixture(autouse=True)
def _a_process_of_its_own() -> None:
    """Accelerate remembers the first precision of a process; a trainer's process has but one."""
    AcceleratorState._reset_state()


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(TINY_RECIPE)
    return path


@pytest.fixture
def config(recipe: Path) -> Config:
    return load_config(recipe)


@pytest.fixture
def study(recipe: Path, tmp_path: Path) -> Study:
    return open_study(recipe, tmp_path / "run")


@pytest.fixture
def teacher(study: Study) -> LiveTeacher:
    """An untrained teacher of that study."""
    network = study.trainer.new_network(study.config.teacher, study.splits, 7, "teacher")
    return LiveTeacher(network, study.pairs, study.trainer.accelerator, compiled=False)


@pytest.fixture(scope="session")
def studied(tmp_path_factory: pytest.TempPathFactory) -> Study:
    """A whole study, all arms of two seeds, for tests that only look."""
    folder = tmp_path_factory.mktemp("studied")
    (folder / "tiny.yaml").write_text(TINY_RECIPE)
    study = open_study(folder / "tiny.yaml", folder / "run")
    study.all()
    return study


@pytest.fixture
def full_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 KiB."""
    folder = tmp_path / "full"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64k", "none", str(folder)]
    if os.geteuid() or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("may not mount a file system")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)
