"""A recipe that takes a second or two, and the networks and data it speaks of."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from fsp_kernels.distill.compare import Comparison, Laboratory
from fsp_kernels.distill.config import Config, load_config
from fsp_kernels.distill.data import load_splits
from fsp_kernels.distill.monitor import Monitor
from fsp_kernels.distill.train import Trainer

TINY_RECIPE = """\
seeds: [0, 1]
data: {train_images: 40, teacher_images: 60, batch_size: 20}
teacher: {depth: 14}
teacher_training: {steps: 6, learning_rate: 0.05}
student: {depth: 8}
pairs:
  - {student: [stage1.0.relu1, stage1], teacher: [stage1.0.relu1, stage1]}
  - {student: ["stage3.0.conv2:input", stage3], teacher: ["stage3.0.conv2:input", stage3]}
stage1: {steps: 8, learning_rate: 1e-4}
stage2: {steps: 6, learning_rate: 0.05}
evaluation: {split: validation, every: 4, targets: [0.05, 1.0]}
"""


def silent_monitor() -> Monitor:
    """Prints nothing, and writes nothing for TensorBoard."""
    return Monitor(Console(file=io.StringIO()))


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(TINY_RECIPE)
    return path


@pytest.fixture
def config(recipe: Path) -> Config:
    return load_config(recipe)


@pytest.fixture
def monitor() -> Monitor:
    return silent_monitor()


@pytest.fixture
def trainer(config: Config, monitor: Monitor) -> Trainer:
    return Trainer(config, load_splits(config.data), monitor)


@pytest.fixture(scope="session")
def compared(tmp_path_factory: pytest.TempPathFactory) -> tuple[Comparison, Path]:
    """A whole comparison and its run folder, for tests that only look."""
    folder = tmp_path_factory.mktemp("compared")
    (folder / "tiny.yaml").write_text(TINY_RECIPE)
    laboratory = Laboratory(load_config(folder / "tiny.yaml"), folder / "run", silent_monitor())
    return laboratory.compare(), laboratory.folder
