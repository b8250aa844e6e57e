"""What is damaged, full or not finite is told, and nothing that was saved is lost."""

from __future__ import annotations

import errno
import io
import os
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import Tensor

from distill.studies import checkpoints, interrupted, open_study, results, speaking_study, trained
from fsp_kernels.distill import checkpoint
from fsp_kernels.distill.errors import DistillError
from fsp_kernels.distill.models import CifarResNet
from fsp_kernels.distill.monitor import Monitor

pytestmark = pytest.mark.usefixtures("_quick_collections")


class BreakingResNet(CifarResNet):
    """The maps of its sixth training pass are not finite."""

    def __init__(self, in_channels: int, classes: int) -> None:
        super().__init__(8, 1, in_channels, classes)
        self.passes = 0

    def forward(self, x: Tensor) -> Tensor:
        self.passes += self.training and torch.is_grad_enabled()
        return super().forward(x * torch.nan if self.passes == 6 else x)


@pytest.mark.parametrize("damage", ["flipped", "cut short"])
def test_a_damaged_newest_checkpoint_is_told_of_and_the_one_before_used(
    recipe: Path, unfinished: Path, plain: Path, heard: io.StringIO, damage: str
) -> None:
    newest = checkpoints(unfinished)[-1]
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1
    newest.write_bytes(content if damage == "flipped" else content[:-100])
    speaking_study(recipe, unfinished, heard, resume=True).student("two-stage", 0)
    assert f"{newest}: not a checkpoint of this program, or damaged" in heard.getvalue()
    assert "going on from the one before" in heard.getvalue()
    assert "going on from stage 2, step 3" in heard.getvalue()
    assert results(unfinished / "two-stage" / "seed-0") == results(plain)


def test_with_all_checkpoints_damaged_the_run_says_so_and_begins_again(
    recipe: Path, unfinished: Path, plain: Path, heard: io.StringIO
) -> None:
    for path in checkpoints(unfinished):
        path.write_bytes(path.read_bytes()[:-1])
    # Stopped once more: what is saved now must not be taken for older than what is damaged.
    interrupted(speaking_study(recipe, unfinished, heard, resume=True), 2)
    assert "; beginning again" in heard.getvalue()
    speaking_study(recipe, unfinished, heard, resume=True).student("two-stage", 0)
    assert "going on from stage 1, step 2" in heard.getvalue()
    assert results(unfinished / "two-stage" / "seed-0") == results(plain)


BROKEN = f"student.model={__name__}:BreakingResNet"


def test_a_loss_that_is_not_finite_is_told_with_all_that_is_known(
    recipe: Path, tmp_path: Path
) -> None:
    study = open_study(recipe, tmp_path / "run", BROKEN)
    with pytest.raises(DistillError) as caught:
        study.student("two-stage", 0)
    kept = checkpoints(tmp_path / "run")
    assert [checkpoint.load(path).note["step"] for path in kept] == [0, 3]
    assert str(caught.value) == (
        "two-stage seed 0, stage 1: the loss is nan in step 6: the FSP loss of stage1.0.relu1 -> "
        f"stage1 is nan; last good checkpoint: {kept[-1]}; try a smaller learning rate"
    )


def test_a_loss_that_is_not_finite_ends_a_run_without_results(recipe: Path, tmp_path: Path) -> None:
    study = open_study(recipe, tmp_path / "run", BROKEN)
    with pytest.raises(DistillError, match="the loss is nan"):
        study.student("two-stage", 0)
    assert [path.name for path in study.folder_of("two-stage", 0).iterdir()] == ["checkpoints"]


def test_weights_that_are_not_finite_make_no_checkpoint(recipe: Path, tmp_path: Path) -> None:
    study = open_study(
        recipe,
        tmp_path / "run",
        "stage1.learning_rate=1e3",
        "stage1.weight_decay=1e38",
        "checkpoints.every=1",
    )
    with pytest.raises(DistillError) as caught:
        study.student("two-stage", 0)
    [path] = checkpoints(tmp_path / "run")
    assert all(x.isfinite().all() for x in checkpoint.load(path).tensors.values())
    assert str(caught.value) == (
        "two-stage seed 0, stage 1: weights are not finite after step 1; last good checkpoint: "
        f"{path}; try a smaller learning rate"
    )


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_disk_that_is_too_full_for_tensorboard_is_an_error_that_names_its_folder(
    full_disk: Path,
) -> None:
    def log_on() -> None:
        with Monitor(Console(file=io.StringIO()), full_disk).watch("run", "stage", 99) as watch:
            for step in range(99):
                watch.log(step, {f"value {number}": 0.5 for number in range(99)})

    with pytest.raises(DistillError, match=r"/full/run-stage: cannot be written: No space left on"):
        log_on()


def test_a_disk_that_is_full_is_an_error_and_the_run_goes_on_once_there_is_space(
    recipe: Path, tmp_path: Path, plain: Path
) -> None:
    fsync, left = os.fsync, [12]  # two for each file: into stage 1

    def full_after_a_while(file: int) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(file)

    study = open_study(recipe, tmp_path / "run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", full_after_a_while)
        with pytest.raises(
            DistillError, match=r"checkpoints/\d+\.safetensors: cannot be written: No space left"
        ):
            study.student("two-stage", 0)
    kept = checkpoints(study.folder)
    assert kept
    assert all(checkpoint.is_whole(path) for path in kept)
    assert results(trained(recipe, tmp_path / "run", resume=True)) == results(plain)
