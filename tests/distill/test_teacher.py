"""The teacher's answers: without a graph, and the same from the cache."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from studies import open_study

from fsp_kernels import fsp_loss, fsp_matrix
from fsp_kernels.distill import teacher as teachers
from fsp_kernels.distill.data import Batch, EvaluationBatches
from fsp_kernels.distill.models import CifarResNet
from fsp_kernels.distill.study import Study
from fsp_kernels.distill.teacher import CachedTeacher, LiveTeacher, load_or_make_cache
from fsp_kernels.errors import DistillError


@pytest.fixture
def batch(study: Study) -> Batch:
    return next(iter(EvaluationBatches(study.splits.train, batch_size=16)))


@pytest.fixture
def cache(study: Study, teacher: LiveTeacher, tmp_path: Path) -> Callable[..., CachedTeacher]:
    def make(of: LiveTeacher = teacher) -> CachedTeacher:
        accelerator = study.runtime.accelerator
        return load_or_make_cache(
            of, study.splits.train, study.config, accelerator, tmp_path / "cache"
        )

    return make


def test_it_is_in_evaluation_mode_and_asks_for_no_gradient(teacher: LiveTeacher) -> None:
    assert not any(module.training for module in teacher.network.modules())
    assert not any(p.requires_grad for p in teacher.network.parameters())


def test_its_maps_are_the_networks_and_carry_no_graph(teacher: LiveTeacher, batch: Batch) -> None:
    found = teacher.targets(batch)
    network = teacher.network
    assert isinstance(network, CifarResNet)
    expected = network.stage1(network.relu(network.bn(network.conv(batch.images))))
    assert torch.equal(found.pairs[0][1], expected)
    assert all(x.is_inference() for pair in found.pairs for x in pair)
    assert found.logits is not None
    assert torch.equal(found.logits, network(batch.images))


def test_a_students_loss_against_it_has_gradients(teacher: LiveTeacher, batch: Batch) -> None:
    found = teacher.targets(batch)
    maps = [tuple((x + 0.1).requires_grad_() for x in pair) for pair in found.pairs]
    with torch.enable_grad():
        fsp_loss(maps, found.pairs).backward()
    assert all(x.grad is not None for pair in maps for x in pair)


def test_the_cache_says_what_the_teacher_says(
    teacher: LiveTeacher, batch: Batch, cache: Callable[..., CachedTeacher]
) -> None:
    order = torch.randperm(16)
    shuffled = Batch(batch.images[order], batch.labels[order], batch.indices[order])
    live, stored = teacher.targets(shuffled), cache().targets(shuffled)
    for maps, matrix in zip(live.pairs, stored.pairs, strict=True):
        torch.testing.assert_close(matrix, fsp_matrix(*maps))
    torch.testing.assert_close(stored.logits, live.logits)


def test_the_cache_is_mapped_into_memory_not_loaded(
    cache: Callable[..., CachedTeacher], tmp_path: Path
) -> None:
    stored = cache()
    [path] = (tmp_path / "cache").iterdir()
    assert str(path) in Path("/proc/self/maps").read_text()
    assert stored._logits.shape == (40, 10)


def test_the_cache_is_made_once(
    cache: Callable[..., CachedTeacher], monkeypatch: pytest.MonkeyPatch
) -> None:
    cache()

    def forbidden(*_: object) -> None:
        raise AssertionError("the cache was made again")

    monkeypatch.setattr(teachers, "_write", forbidden)
    cache()


def test_a_damaged_cache_is_made_again(
    cache: Callable[..., CachedTeacher], batch: Batch, tmp_path: Path
) -> None:
    before = cache().targets(batch)
    [path] = (tmp_path / "cache").iterdir()
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.unlink()  # the old file is mapped by ``before``
    path.write_bytes(content)
    after = cache().targets(batch)
    assert torch.equal(before.pairs[1], after.pairs[1])


@pytest.mark.parametrize("change", ["weights", "images", "pool"])
def test_a_cache_of_other_weights_images_or_pooling_is_not_found(
    recipe: Path, study: Study, teacher: LiveTeacher, tmp_path: Path, change: str
) -> None:
    folder, accelerator = tmp_path / "cache", study.runtime.accelerator
    load_or_make_cache(teacher, study.splits.train, study.config, accelerator, folder)
    split, config = study.splits.train, study.config
    if change == "weights":
        with torch.no_grad():
            teacher.network.get_parameter("fc.bias")[0] += 1e-3
    elif change == "images":
        split = study.splits.teacher_train
    else:
        config = open_study(recipe, tmp_path / "other", "fsp.pool=avg").config
    load_or_make_cache(teacher, split, config, accelerator, folder)
    assert len(list(folder.iterdir())) == 2


def test_a_cache_that_does_not_fit_the_disk_is_refused(
    cache: Callable[..., CachedTeacher], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Usage:
        free = 1000

    monkeypatch.setattr("shutil.disk_usage", lambda _path: Usage)
    with pytest.raises(DistillError, match="MiB free, the run needs about"):
        cache()
