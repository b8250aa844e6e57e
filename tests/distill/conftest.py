"""Studies that take a second or two, in all their states."""

from __future__ import annotations

import gc
import io
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState

from distill.studies import STAGE_1, TEACHER, TINY_RECIPE, interrupted, open_study, trained
from fsp_kernels.distill.config import Config, load_config
from fsp_kernels.distill.study import Study
from fsp_kernels.distill.teacher import LiveTeacher


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
    network = study.runtime.new_network(study.config.teacher, study.splits, 7, "teacher")
    return LiveTeacher(network, study.pairs, study.runtime.accelerator, compiled=False)


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


@pytest.fixture
def heard() -> io.StringIO:
    """All that a study says, if ``open_study`` is given it."""
    return io.StringIO()


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny recipe's student of two stages, never interrupted."""
    folder = tmp_path_factory.mktemp("plain")
    recipe = folder / "tiny.yaml"
    recipe.write_text(TINY_RECIPE)
    return trained(recipe, folder / "run")


@pytest.fixture
def unfinished(recipe: Path, tmp_path: Path) -> Path:
    """The same run, stopped in stage 2 with checkpoints of its steps 3 and 4."""
    folder = tmp_path / "unfinished"
    interrupted(open_study(recipe, folder), TEACHER + STAGE_1 + 4)
    return folder


@pytest.fixture(scope="module")
def _quick_collections() -> Iterator[None]:
    """The trainer collects garbage after each stage: not all that the tests have ever imported."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()
