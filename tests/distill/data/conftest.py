"""Data sets in folders: small, and laid out as the published ones are."""

from __future__ import annotations

import hashlib
import pickle
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps
from sklearn.datasets import load_digits
from torchvision.datasets import CIFAR10, CIFAR100

CLASSES = ("eight", "four", "one")
TRAIN_IMAGES, VAL_IMAGES = 12, 4  # of each class

WriteCifar = Callable[..., Path]


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
