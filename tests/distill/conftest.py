"""Studies that take a second or two, in all their states; small data sets in folders."""

from __future__ import annotations

import hashlib
import io
import os
import pickle
import subprocess
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from accelerate.state import AcceleratorState
from image_data import CLASSES, TRAIN_IMAGES, VAL_IMAGES, WriteCifar
from PIL import Image, ImageOps
from sklearn.datasets import load_digits
from studies import STAGE_1, TEACHER, TINY_RECIPE, interrupted, open_study, trained
from torchvision.datasets import CIFAR10, CIFAR100

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


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """``train/CLASS/*`` and ``val/CLASS/*``: digits 40 x 50, PNG and JPEG, of several modes."""
    digits = load_digits()
    formats = (("L", "png"), ("RGB", "JPEG"), ("RGBA", "png"), ("P", "png"))
    for name, digit in zip(CLASSES, (8, 4, 1), strict=True):
        images = digits.images[digits.target == digit]
        for number, pixels in enumerate(images[: TRAIN_IMAGES + VAL_IMAGES]):
            mode, suffix = formats[number % len(formats)]
            part = "train" if number < TRAIN_IMAGES else "val"
            path = tmp_path / "folder" / part / name / f"{number}.{suffix}"
            path.parent.mkdir(parents=True, exist_ok=True)
            image = Image.fromarray((pixels * 15).astype(np.uint8)).resize((40, 50))
            image = ImageOps.colorize(image, "navy", "orange") if mode == "RGB" else image
            image.convert(mode).save(path)
    return tmp_path / "folder"


@pytest.fixture
def write_cifar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> WriteCifar:
    """Writes what torchvision would fetch, random and small, and has it expect the checksums."""

    def pickled(path: Path, content: object) -> str:
        path.write_bytes(pickle.dumps(content, protocol=2))
        return hashlib.md5(path.read_bytes()).hexdigest()

    def write(name: str = "cifar10", images: int = 40, *, unpack: bool = True) -> Path:
        kind, key = {"cifar10": (CIFAR10, "labels"), "cifar100": (CIFAR100, "fine_labels")}[name]
        classes, random = int(name[5:]), np.random.default_rng(0)
        inside = tmp_path / "made" / kind.base_folder
        inside.mkdir(parents=True)
        for table in ("train_list", "test_list"):
            lines = []
            for file, _ in getattr(kind, table):
                data = random.integers(0, 256, (images, 3 * 32 * 32), dtype=np.uint8)
                labels = random.permutation(np.arange(images) % classes).tolist()
                lines.append([file, pickled(inside / file, {"data": data, key: labels})])
            monkeypatch.setattr(kind, table, lines)
        meta = {kind.meta["key"]: [f"class {number}" for number in range(classes)]}
        checksum = pickled(inside / kind.meta["filename"], meta)
        monkeypatch.setattr(kind, "meta", kind.meta | {"md5": checksum})
        if unpack:
            return inside.parent
        archive = tmp_path / "published" / kind.filename
        archive.parent.mkdir()
        with tarfile.open(archive, "w:gz") as tar:
            tar.add(inside, kind.base_folder)
        monkeypatch.setattr(kind, "tgz_md5", hashlib.md5(archive.read_bytes()).hexdigest())
        return archive.parent

    return write
