"""Several processes train what one does; two gloo processes on the CPU stand for two GPUs."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch
from distilled_steps import GroupNormResNet
from processes import environments, finish, run_group, start_cli, without_gpus
from studies import (
    GROUP_NORM_NET,
    TINY_RECIPE,
    interrupted,
    is_whole,
    leftovers,
    open_study,
    results,
    trained,
)
from torch import nn

from fsp_kernels.distill import checkpoint, records

# The same sums in another order: single precision rounds at 6e-8, and 20 steps of three trainings
# make little more of it, relative to the largest weight of each tensor. Weights of the wrong half
# of a batch make more than 0.01.
BOUND = 1e-5
ALL_AT_ONCE = (
    "data.augment=true",
    "fsp.beta=1e-5",
    "fsp.projection=true",
    "teacher.arguments={width: 2}",
    "stage2.clip=1",
    "execution.accumulation=2",
)
BATCH_NORM = ("student.model=cifar/resnet8", "teacher.model=cifar/resnet14")


class IdleResNet(GroupNormResNet):
    """Has a layer that its logits do not use."""

    def __init__(self, in_channels: int, classes: int) -> None:
        super().__init__(in_channels, classes)
        self.idle = nn.Linear(3, 3)


def distance(ours: Path, theirs: Path) -> float:
    """The largest difference of two runs' weights, relative to the largest weight of its tensor."""
    first, second = (checkpoint.load(run / records.MODEL).tensors for run in (ours, theirs))
    assert first.keys() == second.keys()
    return max(
        ((first[name] - x).abs().max() / x.abs().max().clamp_min(1e-30)).item()
        for name, x in second.items()
    )


def in_two_processes(recipe: Path, folder: Path, *overrides: str, arm: str = "two-stage") -> Path:
    command = ["train", recipe, *overrides, "--arm", arm, "--output", folder]
    log = folder.with_suffix(".log")
    group = [start_cli(command, log, environment) for environment in environments(2)]
    finish(group)
    assert [process.exitcode for process in group] == [0, 0], log.read_text()
    return folder / arm / "seed-0"


def launch(recipe: Path, folder: Path, *options: str) -> subprocess.Popen[str]:
    """``torchrun`` with two processes of ``fsp-distill train``."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = ["-m", "fsp_kernels.distill", "train", recipe, *options, "--output", folder]
    return subprocess.Popen(
        [sys.executable, *torchrun, *map(str, command)],
        # The models are in a module of the tests; but for that, no variable that users don't set.
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)} | without_gpus(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def output_of(process: subprocess.Popen[str]) -> str:
    """All that it printed, once it has ended; or it is killed with all its processes."""
    family = [process, *psutil.Process(process.pid).children(recursive=True)]
    try:
        return process.communicate(timeout=300)[0]
    finally:
        for member in family:
            if isinstance(member, subprocess.Popen) or member.is_running():
                member.kill()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("distributed") / "tiny.yaml"
    path.write_text(re.sub(r"cifar/resnet\d+", GROUP_NORM_NET, TINY_RECIPE) + "name: tiny\n")
    return path


@pytest.fixture(scope="module")
def launched(tiny: Path) -> Path:
    """A student of two stages, trained by ``torchrun``."""
    process = launch(tiny, tiny.parent / "launched")
    output = output_of(process)
    assert process.returncode == 0, output
    return tiny.parent / "launched" / "two-stage" / "seed-0"


@pytest.fixture(scope="module")
def alone(tiny: Path) -> Path:
    """The same, trained by one process."""
    return trained(tiny, tiny.parent / "alone")


@pytest.mark.slow
def test_two_processes_end_with_weights_figures_and_matrices_of_one(
    launched: Path, alone: Path
) -> None:
    assert distance(launched, alone) < BOUND
    for ours, theirs in zip(records.read(launched).phases, records.read(alone).phases, strict=True):
        for row, expected in zip(ours.history, theirs.history, strict=True):
            assert row == pytest.approx(expected, rel=BOUND)
    found, wanted = (checkpoint.load(run / records.MATRICES).tensors for run in (launched, alone))
    assert found.keys() == wanted.keys()
    for name, matrix in wanted.items():
        torch.testing.assert_close(found[name], matrix, rtol=0, atol=BOUND * matrix.abs().max())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arm", "overrides"),
    [
        ("one-stage-kd", ALL_AT_ONCE),
        ("two-stage", [f"student.model={__name__}:IdleResNet"]),
    ],
    ids=["everything at once", "a weight that no stage uses"],
)
def test_two_processes_train_what_one_does(
    tiny: Path, tmp_path: Path, arm: str, overrides: list[str]
) -> None:
    two = in_two_processes(tiny, tmp_path / "two", *overrides, arm=arm)
    one = trained(tiny, tmp_path / "one", *overrides, arm=arm)
    assert distance(two, one) < BOUND


@pytest.mark.slow
def test_statistics_of_parts_of_a_batch_would_be_told_from_those_of_the_whole(
    tiny: Path, tmp_path: Path
) -> None:
    two = in_two_processes(tiny, tmp_path / "two", *BATCH_NORM)
    one = trained(tiny, tmp_path / "one", *BATCH_NORM)
    assert distance(two, one) > 1000 * BOUND


def test_two_passes_for_each_step_end_with_the_weights_of_one(tiny: Path) -> None:
    once = trained(tiny, tiny.parent / "once", "data.augment=true")
    twice = trained(tiny, tiny.parent / "twice", "data.augment=true", "execution.accumulation=2")
    assert 0 < distance(twice, once) < BOUND


def digest(rank: int, recipe: Path) -> None:
    teacher = open_study(recipe, recipe.parent / "digests", *BATCH_NORM).train_teacher()
    text = checkpoint.digest_of(teacher.network.state_dict())
    recipe.with_suffix(f".{rank}").write_text(text)


@pytest.mark.slow
def test_all_processes_have_the_same_teacher(tiny: Path) -> None:
    run_group(2, digest, tiny)
    first, second = (tiny.with_suffix(f".{rank}").read_text() for rank in range(2))
    assert first == second


@pytest.mark.slow
@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.batch_size=21"], "must be a multiple of 2.* processes"),
        (["execution.accumulation=4"], "must be a multiple of 8.* processes"),
        (["execution.sync_batch_norm=true"], "execution.sync_batch_norm: is true, must be false"),
    ],
)
def test_what_the_processes_cannot_do_is_an_error_of_each(
    tiny: Path, tmp_path: Path, overrides: list[str], message: str
) -> None:
    command = ["train", tiny, *overrides, "--output", tmp_path / "run"]
    group = [start_cli(command, tmp_path / "log", environment) for environment in environments(2)]
    finish(group)
    assert [process.exitcode for process in group] == [2, 2]
    output = (tmp_path / "log").read_text()
    assert len(re.findall(message, output)) == 2
    assert "Traceback" not in output
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize("unshared", [".", "two-stage"])
def test_a_run_that_not_all_machines_have_is_an_error_of_each(
    tiny: Path, tmp_path: Path, unshared: str
) -> None:
    stopped = open_study(tiny, tmp_path / "stopped")
    interrupted(stopped, 10)  # the teacher is finished, stage 1 is not
    folders = [shutil.copytree(stopped.folder, tmp_path / name) for name in ("here", "there")]
    shutil.rmtree(folders[1] / unshared)
    group = [
        start_cli(["train", tiny, "--resume", "--output", folder], tmp_path / "log", environment)
        for folder, environment in zip(folders, environments(2), strict=True)
    ]
    finish(group)
    output = (tmp_path / "log").read_text()
    assert [process.exitcode for process in group] == [2, 2], output
    assert output.count("several machines need a folder on a disk that they share") == 2
    assert "Traceback" not in output
    assert newest(folders[0])


def newest(folder: Path) -> str:
    """The name of the student's newest checkpoint."""
    paths = sorted(folder.glob("two-stage/seed-0/checkpoints/0*"))
    return paths[-1].name if paths else ""


def stop_after(
    last: str, process: subprocess.Popen[str], folder: Path, stop: Callable[[psutil.Process], None]
) -> tuple[str, list[psutil.Process]]:
    """``stop`` the processes once there is a checkpoint newer than ``last``; output, processes."""
    deadline = time.monotonic() + 300
    while newest(folder) <= last:
        assert process.poll() is None, output_of(process)
        assert time.monotonic() < deadline, output_of(process)
        time.sleep(0.01)
    launcher = psutil.Process(process.pid)
    workers = launcher.children()
    stop(launcher)
    return output_of(process), workers


@pytest.mark.slow
def test_a_signal_to_the_launcher_or_to_one_process_stops_all_and_the_run_can_be_resumed(
    tiny: Path, tmp_path: Path, launched: Path
) -> None:
    often = "checkpoints.every=1"
    folder, last = tmp_path / "run", ""
    stops = (
        lambda launcher: launcher.send_signal(signal.SIGTERM),
        lambda launcher: launcher.children()[1].send_signal(signal.SIGTERM),
    )
    for resume, stop in zip(([], ["--resume"]), stops, strict=True):
        process = launch(tiny, folder, often, *resume)
        output, workers = stop_after(last, process, folder, stop)
        assert process.returncode != 0
        assert len(workers) == 2
        assert not [worker for worker in workers if worker.is_running()]
        assert "saved; --resume goes on from there" in output
        assert newest(folder) > last
        last = newest(folder)
        assert is_whole(folder / "two-stage" / "seed-0" / "checkpoints" / last)
    in_two_processes(tiny, folder, often, "--resume")
    assert "going on from" in folder.with_suffix(".log").read_text()
    assert results(folder / "two-stage" / "seed-0") == results(launched)
    assert not leftovers(folder)
