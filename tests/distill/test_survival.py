"""Whatever stops a run, the run that goes on from there ends with the same bits."""

from __future__ import annotations

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
from torch import nn

from distill.processes import start_cli
from distill.studies import (
    STAGE_1,
    STAGE_2,
    STEPS,
    TEACHER,
    AfterSteps,
    checkpoints,
    files_under,
    interrupted,
    leftovers,
    open_study,
    results,
    trained,
)
from fsp_kernels.distill import checkpoint, records, storage
from fsp_kernels.distill.errors import DistillError
from fsp_kernels.distill.interruption import InterruptedRunError, Interruption
from fsp_kernels.distill.models import CifarResNet


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


pytestmark = pytest.mark.usefixtures("_quick_collections")

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
        "stage2.stop={patience: 3, min_delta: 1e9}",
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


def test_a_run_that_its_stopping_rule_ended_says_so(recipe: Path, tmp_path: Path) -> None:
    overrides = SETTINGS["one-stage-kd, stopping rule"]
    folder = trained(recipe, tmp_path / "run", *overrides, arm="one-stage-kd")
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
    study.student("two-stage", 0)
    assert results(study.folder_of("two-stage", 0)) == results(plain)


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
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
@pytest.mark.parametrize("workers", [0, 1])
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
    assert results(tmp_path / "run" / "two-stage" / "seed-0") == results(whole)


@pytest.mark.parametrize("override", ["stage2.learning_rate=0.04", "data.augment=true"])
def test_an_unfinished_run_is_not_resumed_under_other_settings(
    recipe: Path, unfinished: Path, override: str
) -> None:
    kept = checkpoints(unfinished)
    key = override.partition("=")[0]
    with pytest.raises(DistillError, match=f"other settings than these: {key}.*; --restart begins"):
        open_study(recipe, unfinished, override, resume=True).student("two-stage", 0)
    assert all(checkpoint.is_whole(path) for path in kept)


CONSTANT = "stage2={steps: 6, learning_rate: 0.05, schedule: constant}"
LONGER = CONSTANT.replace("6", "11")


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (
            ["evaluation.every=5", "evaluation.targets=[0.5]"],
            "evaluation.every, evaluation.targets",
        ),
        (["execution.threads=2", "data.workers=1"], "data.workers, execution.threads"),
    ],
)
def test_what_does_not_change_what_is_learnt_may_change_and_is_told(
    recipe: Path,
    unfinished: Path,
    plain: Path,
    heard: io.StringIO,
    overrides: list[str],
    told: str,
) -> None:
    open_study(recipe, unfinished, *overrides, resume=True, heard=heard).student("two-stage", 0)
    assert f"stage 2, step 4, with other settings of {told}\n" in heard.getvalue()
    ours, theirs = (
        checkpoint.load(run / records.MODEL).tensors
        for run in (unfinished / "two-stage" / "seed-0", plain)
    )
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("stopped_in", [4, STAGE_2])
def test_a_stage_can_be_lengthened_where_its_rates_stay(
    recipe: Path, tmp_path: Path, heard: io.StringIO, stopped_in: int
) -> None:
    interrupted(open_study(recipe, tmp_path / "run", CONSTANT), TEACHER + STAGE_1 + stopped_in)
    study = open_study(recipe, tmp_path / "run", LONGER, resume=True, heard=heard)
    run = study.student("two-stage", 0)
    assert f"stage 2, step {stopped_in}, with other settings of stage2.steps\n" in heard.getvalue()
    assert run.task.steps == 11
    whole = results(trained(recipe, tmp_path / "whole", LONGER))
    ours = results(tmp_path / "run" / "two-stage" / "seed-0")
    weights = [name for name in whole if name.startswith(records.MODEL)]
    assert weights
    assert all(ours[name] == whole[name] for name in weights)


def test_a_stage_that_has_not_begun_may_be_changed_at_will(recipe: Path, tmp_path: Path) -> None:
    interrupted(open_study(recipe, tmp_path / "run"), TEACHER + 5)
    other = "stage2={steps: 7, optimizer: adam, learning_rate: 0.01, clip: 1}"
    resumed = trained(recipe, tmp_path / "run", other, resume=True)
    assert results(resumed) == results(trained(recipe, tmp_path / "whole", other))


@pytest.mark.parametrize("resume", [None, True])
def test_a_finished_run_is_not_taken_for_one_of_other_settings_nor_replaced(
    recipe: Path, tmp_path: Path, resume: bool | None
) -> None:
    trained(recipe, tmp_path / "run")
    before = files_under(tmp_path / "run")
    other = "stage2.learning_rate=0.04"
    with pytest.raises(
        DistillError, match=r"settings than these: stage2\.learning_rate; --restart"
    ):
        open_study(recipe, tmp_path / "run", other, "arms=[two-stage]", resume=resume)
    assert files_under(tmp_path / "run") == before


def test_how_often_checkpoints_are_written_may_change(
    recipe: Path, unfinished: Path, plain: Path
) -> None:
    study = open_study(recipe, unfinished, "checkpoints={every: 1, keep: 5}", resume=True)
    study.student("two-stage", 0)
    assert results(unfinished / "two-stage" / "seed-0") == results(plain)


def test_an_unfinished_run_needs_to_be_told_whether_to_resume(
    recipe: Path, unfinished: Path
) -> None:
    with pytest.raises(DistillError, match=r"unfinished run; --resume .*, --restart begins again"):
        open_study(recipe, unfinished)
    assert len(checkpoints(unfinished)) == 2


def test_restart_begins_again(
    recipe: Path, unfinished: Path, plain: Path, heard: io.StringIO
) -> None:
    open_study(recipe, unfinished, resume=False, heard=heard).student("two-stage", 0)
    assert "going on" not in heard.getvalue()
    assert results(unfinished / "two-stage" / "seed-0") == results(plain)
    assert not leftovers(unfinished)


def test_what_is_finished_is_reused_on_resuming(
    recipe: Path, tmp_path: Path, heard: io.StringIO
) -> None:
    run = trained(recipe, tmp_path / "run")
    before = {path: path.stat().st_mtime_ns for path in run.parents[1].rglob("*.safetensors")}
    open_study(recipe, tmp_path / "run", resume=True, heard=heard).student("two-stage", 0)
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert ["finished earlier" in line for line in heard.getvalue().splitlines()] == [True] * 2


def test_the_teacher_is_reused_where_its_student_begins_again(
    recipe: Path, tmp_path: Path, heard: io.StringIO
) -> None:
    trained(recipe, tmp_path / "run")
    open_study(recipe, tmp_path / "run", resume=False, heard=heard).student("two-stage", 0)
    told = heard.getvalue().splitlines()
    assert [line.partition(":")[0] for line in told] == ["teacher", "two-stage seed 0"]
    assert ["finished earlier" in line for line in told] == [True, False]


def test_what_a_process_left_that_was_killed_at_its_very_end_is_cleared(
    recipe: Path, tmp_path: Path, unfinished: Path
) -> None:
    run = trained(recipe, tmp_path / "run")
    shutil.copytree(checkpoints(unfinished)[0].parent, run / "checkpoints")
    open_study(recipe, tmp_path / "run", resume=True).student("two-stage", 0)
    assert not leftovers(tmp_path / "run")


def test_what_a_process_left_that_was_killed_at_its_very_start_is_no_hindrance(
    recipe: Path, tmp_path: Path
) -> None:
    with storage.replacing(tmp_path / "run" / "config.yaml") as path:
        path.write_text("nam")
        open_study(recipe, tmp_path / "run")
        assert not path.exists()
        path.touch()


# The teacher measures 3 times, stage 1 first the teacher's matrices, then 3 times with a look at
# the student's, and in the end those; stage 2 measures 3 times. Each time it is one batch.
@pytest.mark.parametrize("batch", [1, 3, 4, 6, 9, 12, 13, 15])
def test_a_signal_during_an_evaluation_is_obeyed_at_the_next_batch(
    plain: Path, recipe: Path, tmp_path: Path, batch: int
) -> None:
    folder = tmp_path / "run"
    study = open_study(recipe, folder)
    study.runtime.interruption = AfterBatches(batch)
    with pytest.raises(InterruptedRunError, match="--resume goes on from there") as caught:
        study.student("two-stage", 0)
    assert caught.value.exit_code == 143
    assert results(trained(recipe, folder, resume=True)) == results(plain)
