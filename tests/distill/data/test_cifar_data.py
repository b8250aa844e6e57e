"""CIFAR-10 and CIFAR-100, from the files that torchvision keeps."""

from __future__ import annotations

import functools
import pickle
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from image_data import WriteCifar, all_images, pixels
from torch import Tensor
from torchvision.datasets import CIFAR10
from torchvision.transforms import v2

from fsp_kernels.distill.config import Data
from fsp_kernels.distill.data import Splits, load_splits
from fsp_kernels.errors import DistillError


def load(root: Path, dataset: str = "cifar10", **settings: object) -> Splits:
    return load_splits(Data(dataset=dataset, root=str(root), **settings))


def published(root: Path, name: str) -> tuple[Tensor, list[int]]:
    """The images of one file, (N, 3, 32, 32) uint8, and their labels."""
    content = pickle.loads((root / CIFAR10.base_folder / name).read_bytes(), encoding="latin1")
    return torch.from_numpy(content["data"]).view(-1, 3, 32, 32), content["labels"]


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch, write_cifar: WriteCifar) -> Iterator[None]:
    """A server from which torchvision fetches."""

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None: ...

    folder = str(write_cifar(unpack=False))
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=folder))
    monkeypatch.setattr(CIFAR10, "url", f"http://127.0.0.1:{server.server_port}/{CIFAR10.filename}")
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(
    ("dataset", "classes", "train_images"), [("cifar10", 10, 500), ("cifar100", 100, 100)]
)
def test_the_published_parts_are_the_splits(
    write_cifar: WriteCifar, dataset: str, classes: int, train_images: int
) -> None:
    splits = load(write_cifar(dataset, images=100), dataset)
    assert [len(splits.train), len(splits.test)] == [train_images, 100]
    assert splits.validation is None
    assert splits.test.labels.unique().tolist() == list(range(classes))
    assert splits.classes == classes
    assert splits.image_shape == splits.train[0].image.shape == (3, 32, 32)


def test_images_are_standardised_by_the_published_moments(write_cifar: WriteCifar) -> None:
    root = write_cifar()
    test = load(root).test
    scaled = v2.functional.to_dtype(published(root, "test_batch")[0], torch.float32, scale=True)
    expected = v2.functional.normalize(scaled, [0.4914, 0.4822, 0.4465], [0.2470, 0.2435, 0.2616])
    torch.testing.assert_close(all_images(test), expected)
    assert test.pixel_range == (0, 1)
    small = pixels(load(root, image_size=8).test).float()
    torch.testing.assert_close(small, F.avg_pool2d(scaled, 4), atol=0.51 / 255, rtol=0)  # rounded


def test_draws_are_stratified_and_keep_labels_with_their_images(write_cifar: WriteCifar) -> None:
    root = write_cifar()
    splits = load(root, validation_images=50, train_images=60)
    assert [*map(len, splits)] == [60, 150, 50, 40]
    assert torch.bincount(splits.validation.labels).tolist() == [5] * 10
    known = {}
    for number in range(1, 6):
        images, labels = published(root, f"data_batch_{number}")
        known |= dict(zip(map(np.ndarray.tobytes, images.numpy()), labels, strict=True))
    whole = (pixels(splits.train) * 255).round().to(torch.uint8)
    assert [known[image.numpy().tobytes()] for image in whole] == splits.train.labels.tolist()


def test_an_augmented_image_is_a_crop_of_the_padded_one_or_of_its_mirror_image(
    write_cifar: WriteCifar,
) -> None:
    split = load(write_cifar()).train
    black = (torch.zeros(3) - torch.tensor(split.mean)) / torch.tensor(split.std)
    padded = black[:, None, None].repeat(1, 40, 40)
    padded[:, 4:36, 4:36] = split[0].image
    crops = {
        (mirrored, top, left): image[:, top : top + 32, left : left + 32]
        for mirrored, image in ((False, padded), (True, padded.flip(-1)))
        for top in range(9)
        for left in range(9)
    }
    found = []
    for seed in range(60):
        image = split[0, seed].image
        found += [place for place, crop in crops.items() if torch.allclose(image, crop, atol=1e-5)]
    assert len(found) == 60
    assert {mirrored for mirrored, _, _ in found} == {False, True}
    assert {top for _, top, _ in found} == {left for _, _, left in found} == set(range(9))


@pytest.mark.parametrize("damaged", [None, "data_batch_3", "test_batch", "batches.meta"])
def test_missing_and_damaged_files_are_an_error_that_says_how_to_get_them(
    tmp_path: Path, write_cifar: WriteCifar, damaged: str | None
) -> None:
    root = write_cifar() if damaged else tmp_path / "nowhere"
    if damaged:
        path = root / CIFAR10.base_folder / damaged
        path.write_bytes(path.read_bytes()[:-1])
    message = rf"^data\.root: {root}/cifar-10-batches-py is missing or damaged .*data\.download=tru"
    with pytest.raises(DistillError, match=message):
        load(root)


@pytest.mark.usefixtures("site")
def test_download_fetches_the_set_into_a_new_folder(tmp_path: Path) -> None:
    assert len(load(tmp_path / "new" / "root", download=True).train) == 200


def test_download_fetches_only_what_is_not_there_and_says_why_it_failed(
    tmp_path: Path, write_cifar: WriteCifar, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(CIFAR10, "url", "http://127.0.0.1:1/nothing")
    assert len(load(write_cifar(), download=True).test) == 40
    message = r"^data\.download: cifar10 could not be fetched: .*refused"
    with pytest.raises(DistillError, match=message):
        load(tmp_path, download=True)
