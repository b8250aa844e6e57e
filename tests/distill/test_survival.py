"""Whatever stops a run, the run that goes on from there ends with the same bits."""

from __future__ import annotations

import errno
import io
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from processes import start_cli
from rich.console import Console
from studies import (
    STAGE_1,
    STAGE_2,
    STEPS,
    TEACHER,
    AfterSteps,
    checkpoints,
    files_under,
    interrupted,
    is_whole,
    leftovers,
    open_study,
    results,
    trained,
)
from torch import Tensor, nn

from fsp_kernels.distill import checkpoint, records, storage
from fsp_kernels.distill.evaluation import Evaluations
from fsp_kernels.distill.interruption import InterruptedRunError, Interruption
from fsp_kernels.distill.models import CifarResNet
from fsp_kernels.distill.monitor import Monitor
from fsp_kernels.errors import DistillError

STUDENT = ("two-stage", 0)


class AfterBatches(Interruption):
    """Asks to stop in the given one of the batches that are measured from now on."""

    def __init__(self, batches: int) -> None:
        super().__init__()
        self._left = batches

    def check(self) -> None:
        self._left -= 1
        if self._left == 0:
            self.requested = signal.SIGTERM
        super().check()


class DropoutResNet(CifarResNet):
    """Draws random numbers in every pass."""

    def __init__(self, in_channels: int, classes: int) -> None:
        super().__init__(8, 1, in_channels, classes)
        self.fc = nn.Sequential(nn.Dropout(0.5), self.fc)


class BreakingResNet(CifarResNet):
    """The maps of its sixth training pass are not finite."""

    def __init__(self, in_channels: int, classes: int) -> None:
        super().__init__(8, 1, in_channels, classes)
        self.passes = 0

    def forward(self, x: Tensor) -> Tensor:
        self.passes += self.training and torch.is_grad_enabled()
        return super().forward(x * torch.nan if self.passes == 6 else x)


def student_of(folder: Path) -> Path:
    return folder / "two-stage" / "seed-0"


AUGMENTED = "data.augment=true"
WEAK = "fsp.beta=1e-5"  # or the untrained student of one stage diverges
SETTINGS: dict[str, tuple[str, ...]] = {
    "two-stage-kd, augmented, adam": (
        AUGMENTED,
        "stage1={steps: 8, optimizer: adam, learning_rate: 0.01}",
    ),
    "two-stage-kd, adamw, warm-up, clipped": (
        "stage2.optimizer=adamw",
        "stage2.schedule=cosine",
        "stage2.warmup=0.5",
        "stage2.clip=0.5",
    ),
    "one-stage-kd, projection": (
        AUGMENTED,
        WEAK,
        "fsp.projection=true",
        "teacher.arguments={width: 2}",
    ),
    "one-stage-kd, stopping rule": (
        WEAK,
        "evaluation.every=2",
        "stage2.stop={patience: 2}",
        "stage2.learning_rate=1e-12",
    ),
    "one-stage-kd, accumulation": (
        AUGMENTED,
        WEAK,
        "execution.accumulation=2",
        "checkpoints.every=1",
    ),
    "one-stage-kd, cached teacher": (WEAK, "fsp.cache_teacher=true"),
    "one-stage-kd, dropout": (WEAK, f"student.model={__name__}:DropoutResNet"),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_a_run_that_is_stopped_and_resumed_ends_with_the_same_bits(
    recipe: Path, tmp_path: Path, name: str
) -> None:
    arm, overrides = name.partition(",")[0], SETTINGS[name]
    whole = results(trained(recipe, tmp_path / "whole", *overrides, arm=arm))
    stops = (TEACHER + 3, 2)  # in the student's first stage
    again = results(trained(recipe, tmp_path / "again", *overrides, arm=arm, stops=stops))
    assert again == whole
    assert not leftovers(tmp_path / "again")


def test_a_stopping_rule_counts_on_where_a_run_was_stopped(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Evaluations, "stopping_loss", lambda *_: 1.0)
    overrides = (WEAK, "evaluation.every=2", "stage2.stop.patience=3")
    for name, stops in (("whole", ()), ("again", (TEACHER + 3, 2))):
        folder = trained(recipe, tmp_path / name, *overrides, arm="one-stage-kd", stops=stops)
        [phase] = records.read(folder).phases
        assert (phase.stopped, phase.steps) == (True, 6)


def test_a_run_that_is_stopped_where_it_is_evaluated_last_ends_with_the_same_bits(
    recipe: Path, tmp_path: Path, plain: Path
) -> None:
    stops = (TEACHER + STAGE_1, STAGE_2)
    assert results(trained(recipe, tmp_path / "run", stops=stops)) == results(plain)


def test_a_run_that_is_stopped_after_every_step_ends_with_the_same_bits(
    recipe: Path, tmp_path: Path, plain: Path
) -> None:
    for life in range(STEPS):
        interrupted(open_study(recipe, tmp_path / "run", resume=life > 0 or None), 1)
    study = open_study(recipe, tmp_path / "run", resume=True)
    study.runtime.interruption = AfterSteps(1)  # there is none left to be stopped in
    study.student(*STUDENT)
    assert results(student_of(study.folder)) == results(plain)


def test_a_stopped_run_says_how_to_go_on_and_takes_no_further_step(
    recipe: Path, tmp_path: Path
) -> None:
    study = open_study(recipe, tmp_path / "run")
    error = interrupted(study, TEACHER + 5)
    assert str(error).startswith("two-stage seed 0, stage 1: stopped in step 5 of 8, saved")
    assert "--resume" in str(error)
    assert error.exit_code == 143
    state = checkpoint.load(checkpoints(study.folder)[-1]).note
    assert (state["step"], len(state["phases"])) == (5, 0)


def run_until(signal_number: int, recipe: Path, folder: Path, *options: str) -> tuple[int, str]:
    """``fsp-distill train``, whose processes all get a signal when there is a checkpoint."""
    command = [sys.executable, "-m", "fsp_kernels.distill", "train", recipe, *options]
    with subprocess.Popen(
        [*map(str, command), "--output", str(folder)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as process:
        deadline = time.monotonic() + 120
        while not list(folder.glob("two-stage/seed-0/checkpoints/0*")):
            assert process.poll() is None, process.communicate()[0]
            assert time.monotonic() < deadline
            time.sleep(0.01)
        os.killpg(process.pid, signal_number)
        output, _ = process.communicate(timeout=120)
    return process.returncode, output


@pytest.mark.slow
@pytest.mark.usefixtures("heeding_ctrl_c")
@pytest.mark.parametrize(
    ("number", "code", "workers"),
    [
        (signal.SIGTERM, 143, 0),
        (signal.SIGINT, 130, 1),
        pytest.param(signal.SIGTERM, 143, 1, marks=pytest.mark.thorough),
        pytest.param(signal.SIGINT, 130, 0, marks=pytest.mark.thorough),
    ],
)
def test_the_command_line_obeys_a_signal_with_a_shells_exit_code_and_resumes(
    recipe: Path, tmp_path: Path, number: signal.Signals, code: int, workers: int
) -> None:
    long = ("stage1.steps=80", "stage1.learning_rate=1e-6", "evaluation.every=40")
    long += (f"data.workers={workers}",)
    status, output = run_until(number, recipe, tmp_path / "run", *long)
    assert status == code
    assert "saved; --resume goes on from there" in output
    assert "Traceback" not in output
    [newest] = checkpoints(tmp_path / "run")[-1:]
    assert 0 < checkpoint.load(newest).note["step"] < 80
    resumed = start_cli(
        ["train", recipe, *long, "--resume", "--output", tmp_path / "run"], tmp_path / "log"
    )
    resumed.join(120)
    assert resumed.exitcode == 0, (tmp_path / "log").read_text()
    whole = trained(recipe, tmp_path / "whole", *long)
    assert results(student_of(tmp_path / "run")) == results(whole)


# Each evaluation is one batch. The teacher is measured 3 times; stage 1 first measures the
# teacher's matrices, then 3 times the loss and the student's, and those once more at its end;
# stage 2 is measured 3 times.
@pytest.mark.parametrize("batch", [1, 4, 6, 9, 12, 14])
def test_a_signal_during_an_evaluation_is_obeyed_at_the_next_batch(
    plain: Path, recipe: Path, tmp_path: Path, batch: int
) -> None:
    folder = tmp_path / "run"
    study = open_study(recipe, folder)
    study.runtime.interruption = AfterBatches(batch)
    with pytest.raises(InterruptedRunError, match="--resume goes on from there") as caught:
        study.student(*STUDENT)
    assert caught.value.exit_code == 143
    assert results(trained(recipe, folder, resume=True)) == results(plain)


@pytest.mark.parametrize("override", ["stage2.learning_rate=0.04", AUGMENTED])
def test_an_unfinished_run_is_not_resumed_under_other_settings(
    recipe: Path, unfinished: Path, override: str
) -> None:
    kept = checkpoints(unfinished)
    key = override.partition("=")[0]
    with pytest.raises(DistillError, match=f"other settings than these: {key}.*; --restart begins"):
        open_study(recipe, unfinished, override, resume=True).student(*STUDENT)
    assert all(map(is_whole, kept))


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["checkpoints.every=1"], ""),
        (
            ["evaluation.every=5", "evaluation.targets=[0.5]"],
            ", with other settings of evaluation.every, evaluation.targets",
        ),
        (
            ["execution.threads=2", "data.workers=1"],
            ", with other settings of data.workers, execution.threads",
        ),
    ],
)
def test_settings_that_do_not_change_what_is_learnt_may_change_and_are_reported(
    recipe: Path,
    unfinished: Path,
    plain: Path,
    heard: io.StringIO,
    overrides: list[str],
    told: str,
) -> None:
    open_study(recipe, unfinished, *overrides, resume=True, heard=heard).student(*STUDENT)
    assert f"stage 2, step 4{told}\n" in heard.getvalue()
    ours = checkpoint.load(student_of(unfinished) / records.MODEL).tensors
    for name, tensor in checkpoint.load(plain / records.MODEL).tensors.items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("stopped_in", [4, STAGE_2])
def test_a_stage_can_be_lengthened_where_its_rates_stay(
    recipe: Path, tmp_path: Path, heard: io.StringIO, stopped_in: int
) -> None:
    constant = "stage2={steps: 6, learning_rate: 0.05, schedule: constant}"
    longer = constant.replace("6", "11")
    interrupted(open_study(recipe, tmp_path / "run", constant), TEACHER + STAGE_1 + stopped_in)
    study = open_study(recipe, tmp_path / "run", longer, resume=True, heard=heard)
    run = study.student(*STUDENT)
    assert f"stage 2, step {stopped_in}, with other settings of stage2.steps\n" in heard.getvalue()
    assert run.task.steps == 11
    whole = results(trained(recipe, tmp_path / "whole", longer))
    ours = results(student_of(tmp_path / "run"))
    weights = [name for name in whole if name.startswith(records.MODEL)]
    assert weights
    assert all(ours[name] == whole[name] for name in weights)


def test_a_stage_that_has_not_begun_may_be_changed_at_will(recipe: Path, tmp_path: Path) -> None:
    interrupted(open_study(recipe, tmp_path / "run"), TEACHER + 5)
    other = "stage2={steps: 7, optimizer: adam, learning_rate: 0.01, clip: 1}"
    resumed = trained(recipe, tmp_path / "run", other, resume=True)
    assert results(resumed) == results(trained(recipe, tmp_path / "whole", other))


def test_an_unfinished_run_needs_resume_or_restart(recipe: Path, unfinished: Path) -> None:
    with pytest.raises(DistillError, match=r"unfinished run; --resume .*, --restart begins again"):
        open_study(recipe, unfinished)
    assert len(checkpoints(unfinished)) == 2


def test_restart_begins_again_but_keeps_the_teacher(
    recipe: Path, unfinished: Path, plain: Path, heard: io.StringIO
) -> None:
    open_study(recipe, unfinished, resume=False, heard=heard).student(*STUDENT)
    told = heard.getvalue().splitlines()
    assert [line.partition(":")[0] for line in told] == ["teacher", "two-stage seed 0"]
    assert ["finished earlier" in line for line in told] == [True, False]
    assert results(student_of(unfinished)) == results(plain)
    assert not leftovers(unfinished)


def test_a_finished_run_is_kept_or_refused_but_never_replaced(
    recipe: Path, tmp_path: Path, heard: io.StringIO
) -> None:
    trained(recipe, tmp_path / "run")
    before = files_under(tmp_path / "run")
    other = ("stage2.learning_rate=0.04", "arms=[two-stage]")
    for resume in (None, True):
        with pytest.raises(
            DistillError, match=r"settings than these: stage2\.learning_rate; --restart"
        ):
            open_study(recipe, tmp_path / "run", *other, resume=resume)
    assert files_under(tmp_path / "run") == before
    open_study(recipe, tmp_path / "run", resume=True, heard=heard).student(*STUDENT)
    assert files_under(tmp_path / "run") == before
    assert ["finished earlier" in line for line in heard.getvalue().splitlines()] == [True] * 2


def test_checkpoints_of_a_process_killed_at_its_end_are_deleted(
    recipe: Path, tmp_path: Path, unfinished: Path
) -> None:
    run = trained(recipe, tmp_path / "run")
    shutil.copytree(checkpoints(unfinished)[0].parent, run / "checkpoints")
    open_study(recipe, tmp_path / "run", resume=True).student(*STUDENT)
    assert not leftovers(tmp_path / "run")


def test_a_file_of_a_process_killed_at_its_start_does_not_hinder(
    recipe: Path, tmp_path: Path
) -> None:
    with storage.replacing(tmp_path / "run" / "config.yaml") as path:
        path.write_text("nam")
        open_study(recipe, tmp_path / "run")
        assert not path.exists()
        path.touch()


@pytest.mark.parametrize("damage", ["flipped", "cut short", "empty"])
def test_a_damaged_newest_checkpoint_is_reported_and_the_one_before_used(
    recipe: Path, unfinished: Path, plain: Path, heard: io.StringIO, damage: str
) -> None:
    newest = checkpoints(unfinished)[-1]
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1
    newest.write_bytes({"flipped": content, "cut short": content[:-100], "empty": b""}[damage])
    open_study(recipe, unfinished, resume=True, heard=heard).student(*STUDENT)
    assert f"{newest}: not a checkpoint of this program, or damaged" in heard.getvalue()
    assert "going on from the one before" in heard.getvalue()
    assert "going on from stage 2, step 3" in heard.getvalue()
    assert results(student_of(unfinished)) == results(plain)


def test_a_run_whose_checkpoints_are_all_damaged_begins_again_and_says_so(
    recipe: Path, unfinished: Path, plain: Path, heard: io.StringIO
) -> None:
    for path in checkpoints(unfinished):
        path.write_bytes(path.read_bytes()[:-1])
    # Stopped once more: what is saved now must not be taken for older than what is damaged.
    interrupted(open_study(recipe, unfinished, resume=True, heard=heard), 2)
    assert "; beginning again" in heard.getvalue()
    open_study(recipe, unfinished, resume=True, heard=heard).student(*STUDENT)
    assert "going on from stage 1, step 2" in heard.getvalue()
    assert results(student_of(unfinished)) == results(plain)


def test_a_loss_that_is_not_finite_names_step_pair_and_checkpoint_and_leaves_no_results(
    recipe: Path, tmp_path: Path
) -> None:
    study = open_study(recipe, tmp_path / "run", f"student.model={__name__}:BreakingResNet")
    with pytest.raises(DistillError) as caught:
        study.student(*STUDENT)
    kept = checkpoints(tmp_path / "run")
    assert [checkpoint.load(path).note["step"] for path in kept] == [0, 3]
    assert str(caught.value) == (
        "two-stage seed 0, stage 1: the loss is nan in step 6: the FSP loss of stage1.0.relu1 -> "
        f"stage1 is nan; last good checkpoint: {kept[-1]}; try a smaller learning rate"
    )
    assert [path.name for path in student_of(study.folder).iterdir()] == ["checkpoints"]


def test_weights_that_are_not_finite_make_no_checkpoint(recipe: Path, tmp_path: Path) -> None:
    ruinous = ("stage1.learning_rate=1e3", "stage1.weight_decay=1e38", "checkpoints.every=1")
    study = open_study(recipe, tmp_path / "run", *ruinous)
    with pytest.raises(DistillError) as caught:
        study.student(*STUDENT)
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
            study.student(*STUDENT)
    kept = checkpoints(study.folder)
    assert kept
    assert all(map(is_whole, kept))
    assert results(trained(recipe, tmp_path / "run", resume=True)) == results(plain)
