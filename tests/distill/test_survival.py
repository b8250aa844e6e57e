"""Whatever stops a run, the run that goes on from there ends with the same bits."""

from __future__ import annotations

import errno
import gc
import io
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

from distill.conftest import TINY_RECIPE, open_study
from distill.processes import start_cli
from fsp_kernels.distill import checkpoint, records, storage
from fsp_kernels.distill.errors import DistillError
from fsp_kernels.distill.interruption import InterruptedRunError, Interruption
from fsp_kernels.distill.models import CifarResNet
from fsp_kernels.distill.monitor import Monitor
from fsp_kernels.distill.study import Study

TEACHER, STAGE_1, STAGE_2 = 6, 8, 6  # steps of the tiny recipe
STEPS = TEACHER + STAGE_1 + STAGE_2


class AfterSteps(Interruption):
    """Asks to stop in the given one of the steps that are taken from now on."""

    def __init__(self, steps: int, number: int = signal.SIGTERM) -> None:
        self._left, self._number = steps, number

    @property
    def requested(self) -> int:  # is asked for once a step
        self._left -= 1
        return self._number if self._left <= 0 else 0

    def check(self) -> None:
        """Evaluations are not counted."""


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


@pytest.fixture(scope="module", autouse=True)
def _quick_collections() -> Iterator[None]:
    """The trainer collects garbage after each stage: not all that the tests have ever imported."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def heard() -> io.StringIO:
    """All that a study says to ``speaking_study``'s monitor."""
    return io.StringIO()


def speaking_study(
    recipe: Path, folder: Path, heard: io.StringIO, *overrides: str, resume: bool | None = None
) -> Study:
    study = open_study(recipe, folder, *overrides, resume=resume)
    study.monitor = study.trainer.monitor = Monitor(Console(file=heard, width=1000))
    return study


def interrupted(study: Study, steps: int, arm: str = "two-stage") -> InterruptedRunError:
    """Train until a signal in the given step."""
    study.trainer.interruption = AfterSteps(steps)
    with pytest.raises(InterruptedRunError) as caught:
        study.student(arm, 0)
    return caught.value


def trained(
    recipe: Path,
    folder: Path,
    *overrides: str,
    arm: str = "two-stage",
    stops: Sequence[int] = (),
    resume: bool | None = None,
) -> Path:
    """The folder of a student; ``stops`` are the steps that each process before the last lives."""
    for steps in stops:
        interrupted(open_study(recipe, folder, *overrides, resume=resume), steps, arm)
        resume = True
    study = open_study(recipe, folder, *overrides, resume=resume)
    study.student(arm, 0)
    return study.folder_of(arm, 0)


def results(folder: Path) -> dict[str, Any]:
    """All that is kept of a run but how long it took."""
    run = records.read(folder)
    found: dict[str, Any] = {
        f"{phase.name} {what}": getattr(phase, what)
        for phase in run.phases
        for what in ("losses", "history", "stopped")
    }
    for name in (records.MODEL, records.MATRICES):
        if (folder / name).exists():
            found |= {
                f"{name}: {key}": bits(x)
                for key, x in checkpoint.load(folder / name).tensors.items()
            }
    return found | {"fingerprint": run.fingerprint}


def bits(tensor: Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def leftovers(folder: Path) -> list[Path]:
    """What only an unfinished run has."""
    return [path for pattern in (".unfinished-*", "checkpoints") for path in folder.rglob(pattern)]


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


def checkpoints(folder: Path) -> list[Path]:
    return sorted((folder / "two-stage" / "seed-0" / "checkpoints").iterdir())


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
    study.trainer.interruption = AfterSteps(1)  # there is none left to be stopped in
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
    """``fsp-distill train`` in a process, which is sent a signal when it has a checkpoint."""
    command = [sys.executable, "-m", "fsp_kernels.distill", "train", recipe, *options]
    environment = os.environ | {"COLUMNS": "500"}
    with subprocess.Popen(
        [*map(str, command), "--output", str(folder)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
    ) as process:
        deadline = time.monotonic() + 120
        while not list(folder.glob("two-stage/seed-0/checkpoints/0*")):
            assert process.poll() is None, process.communicate()[0]
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(signal_number)
        output, _ = process.communicate(timeout=120)
    return process.returncode, output


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_the_command_line_obeys_a_signal_with_a_shells_exit_code_and_resumes(
    recipe: Path, tmp_path: Path, number: signal.Signals, code: int
) -> None:
    long = ("stage1.steps=80", "stage1.learning_rate=1e-6", "evaluation.every=40")
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


@pytest.mark.slow
def test_a_run_that_is_killed_at_twenty_random_moments_ends_with_the_same_bits(
    recipe: Path, tmp_path: Path
) -> None:
    log = tmp_path / "log"
    settings = (AUGMENTED, "checkpoints.every=1", "evaluation.every=2", "teacher_training.steps=12")
    command = ["train", recipe, *settings, "stage1.steps=16", "stage2.steps=12"]

    def start(folder: Path) -> Any:
        resume = ["--resume"] if folder.exists() else []
        return start_cli([*command, *resume, "--output", folder], log)

    start(tmp_path / "warm").join(300)  # the first process also waits for the imports
    began = time.monotonic()
    whole = start(tmp_path / "whole")
    whole.join(300)
    seconds = time.monotonic() - began
    assert whole.exitcode == 0, log.read_text()
    expected = results(tmp_path / "whole" / "two-stage" / "seed-0")

    # The moment of a kill is drawn from more than half of a whole run, so that each life may get
    # through any part of it, and no machine is too slow for the run to get on.
    generator, kills, folders = random.Random(0), 0, 0
    while kills < 20:
        folder = tmp_path / f"run {folders}"
        folders += 1
        while True:
            process = start(folder)
            process.join(generator.uniform(0, 0.6 * seconds) if kills < 20 else 300)
            process.kill()
            process.join()
            if process.exitcode != -signal.SIGKILL:
                break
            kills += 1
        assert process.exitcode == 0, log.read_text()
        run = folder / "two-stage" / "seed-0"
        assert results(run) == expected
        assert not leftovers(folder)
        assert all(checkpoint.is_whole(path) for path in folder.rglob("*.safetensors"))
    assert "going on from" in log.read_text()
    assert "damaged" not in log.read_text()  # a kill is no reason to lose a checkpoint


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


@pytest.mark.parametrize("override", ["stage2.learning_rate=0.04", "data.augment=true"])
def test_an_unfinished_run_is_not_resumed_under_other_settings(
    recipe: Path, unfinished: Path, override: str
) -> None:
    kept = checkpoints(unfinished)
    study = open_study(recipe, unfinished, override, resume=True)
    with pytest.raises(DistillError, match=r"other settings than these, .* --restart begins again"):
        study.student("two-stage", 0)
    assert all(checkpoint.is_whole(path) for path in kept)


def test_a_finished_run_is_not_taken_for_one_of_other_settings(
    recipe: Path, tmp_path: Path
) -> None:
    trained(recipe, tmp_path / "run")
    study = open_study(recipe, tmp_path / "run", "stage2.learning_rate=0.04", resume=True)
    with pytest.raises(DistillError, match=r"other settings than these, .* --restart begins again"):
        study.student("two-stage", 0)


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
    speaking_study(recipe, unfinished, heard, resume=False).student("two-stage", 0)
    assert "going on" not in heard.getvalue()
    assert results(unfinished / "two-stage" / "seed-0") == results(plain)
    assert not leftovers(unfinished)


def test_what_is_finished_is_reused_on_resuming(
    recipe: Path, tmp_path: Path, heard: io.StringIO
) -> None:
    run = trained(recipe, tmp_path / "run")
    before = {path: path.stat().st_mtime_ns for path in run.parents[1].rglob("*.safetensors")}
    speaking_study(recipe, tmp_path / "run", heard, resume=True).student("two-stage", 0)
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert [line.rpartition(", ")[2] for line in heard.getvalue().splitlines()] == ["reused"] * 2


@pytest.mark.parametrize("resume", [None, False])
def test_the_teacher_is_reused_where_its_student_begins_again(
    recipe: Path, tmp_path: Path, heard: io.StringIO, resume: bool | None
) -> None:
    trained(recipe, tmp_path / "run")
    speaking_study(recipe, tmp_path / "run", heard, resume=resume).student("two-stage", 0)
    told = heard.getvalue().splitlines()
    assert [line.partition(":")[0] for line in told] == ["teacher", "two-stage seed 0"]
    assert [line.endswith("reused") for line in told] == [True, False]


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


# The teacher measures 3 times, stage 1 first the teacher's matrices, then 3 times with a look at
# the student's, and in the end those; stage 2 measures 3 times. Each time it is one batch.
@pytest.mark.parametrize("batch", [1, 3, 4, 6, 9, 12, 13, 15])
def test_a_signal_during_an_evaluation_is_obeyed_at_the_next_batch(
    plain: Path, recipe: Path, tmp_path: Path, batch: int
) -> None:
    folder = tmp_path / "run"
    study = open_study(recipe, folder)
    study.trainer.interruption = AfterBatches(batch)
    with pytest.raises(InterruptedRunError, match="--resume goes on from there") as caught:
        study.student("two-stage", 0)
    assert caught.value.exit_code == 143
    assert results(trained(recipe, folder, resume=True)) == results(plain)
