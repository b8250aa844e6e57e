"""Progress on terminals and in logs, and TensorBoard's files read back."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterable
from itertools import count
from pathlib import Path
from signal import SIGTERM
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.summary.writer import event_file_writer

from fsp_kernels.distill import monitor as module
from fsp_kernels.distill.config import load_config
from fsp_kernels.distill.interruption import InterruptedRunError, Interruption
from fsp_kernels.distill.monitor import Monitor, Watch, draw_side_by_side
from fsp_kernels.distill.study import Study


class Clock:
    """Stands still but for ``sleep``."""

    def __init__(self) -> None:
        self.now = 1000.0

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(module, "monotonic", lambda: clock.now)
    return clock


@pytest.fixture(autouse=True)
def files_of_different_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    """As those of two processes are: TensorBoard orders files by the second in their names."""
    seconds = count(1_000_000_000)
    monkeypatch.setattr(event_file_writer, "time", SimpleNamespace(time=lambda: next(seconds)))


def monitor_of(
    clock: Clock, *, terminal: bool, width: int = 160, folder: Path | None = None
) -> tuple[Monitor, io.StringIO]:
    """A monitor, all of whose time is the clock's, and what it prints."""
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=terminal, width=width, color_system=None)
    monitor = Monitor(console, folder)
    monitor.progress.get_time = lambda: clock.now
    return monitor, screen


def test_a_terminal_sees_run_stage_rate_time_left_and_scalars(clock: Clock) -> None:
    monitor, screen = monitor_of(clock, terminal=True)
    with monitor, monitor.watch("two-stage seed 0", "stage 1", 100) as watch:
        for _ in range(10):
            clock.sleep(0.5)
            watch.step()
        watch.log(10, {"step": 10, "train_loss": 0.25, "fsp_loss": 7.0, "fsp_loss/0": 3.0})
        monitor.progress.refresh()
    last = [frame for frame in re.split(r"[\r\n]", screen.getvalue()) if "two-stage" in frame][-1]
    for said in ("two-stage seed 0, stage 1", "10/100", "2 steps/s", "0:00:45"):
        assert said in last
    assert "train loss 0.25  fsp loss 7" in last
    assert "fsp loss/0" not in last


def test_a_line_is_printed_above_the_bar(clock: Clock) -> None:
    monitor, screen = monitor_of(clock, terminal=True)
    with monitor, monitor.watch("teacher", "task", 10):
        monitor.say("kept [as it is] " + "x" * 200)
    assert "kept [as it is] " + "x" * 200 in screen.getvalue()


def test_steps_of_an_earlier_process_are_done_but_not_in_the_rate(clock: Clock) -> None:
    monitor, screen = monitor_of(clock, terminal=True)
    with monitor, monitor.watch("teacher", "task", 100, first_step=80) as watch:
        for _ in range(3):
            clock.sleep(1)
            watch.step()
        monitor.progress.refresh()
    assert "83/100 1 steps/s 0:00:17" in screen.getvalue()


def test_a_log_has_a_line_each_thirty_seconds(clock: Clock) -> None:
    monitor, screen = monitor_of(clock, terminal=False)
    with monitor, monitor.watch("teacher", "task", 100) as watch:
        for step in range(1, 16):
            clock.sleep(5)
            watch.step()
            if step == 8:
                watch.log(8, {"step": 8, "accuracy": 0.5})
    assert screen.getvalue().splitlines() == [
        "teacher, task: step 6 of 100  0.2 steps/s  0:07:50 left",
        "teacher, task: step 12 of 100  0.2 steps/s  0:07:20 left  accuracy 0.5",
    ]


def test_a_log_has_no_line_of_quick_stages_and_long_lines_whole(clock: Clock) -> None:
    monitor, screen = monitor_of(clock, terminal=False, width=20)
    with monitor:
        for stage in ("stage 1", "stage 2"):
            with monitor.watch("two-stage-kd seed 12", stage, 20) as watch:
                for step in range(20):
                    clock.sleep(1)
                    watch.step()
                    watch.log(step, {"loss": 1.0})
        with monitor.watch("two-stage-kd seed 12", "stage 3", 3) as watch:
            clock.sleep(31)
            watch.step()
    assert screen.getvalue() == "two-stage-kd seed 12, stage 3: step 1 of 3\n"


@pytest.mark.parametrize(
    ("seconds", "said"), [(0.0001, "10000 steps/s"), (0.04, "25 steps/s"), (8, "0.125 steps/s")]
)
def test_a_rate_is_legible_at_any_speed(clock: Clock, seconds: float, said: str) -> None:
    monitor, screen = monitor_of(clock, terminal=True)
    with monitor, monitor.watch("teacher", "task", 100) as watch:
        for _ in range(3):
            clock.sleep(seconds)
            watch.step()
        monitor.progress.refresh()
    assert f" {said} " in screen.getvalue()


def events_of(folder: Path) -> EventAccumulator:
    return EventAccumulator(str(folder), size_guidance={"images": 0}).Reload()


def scalars(folder: Path, name: str) -> list[tuple[int, float]]:
    return [(event.step, event.value) for event in events_of(folder).Scalars(name)]


def log(monitor: Monitor, steps: Iterable[int], value: float, evaluated: int = -1) -> None:
    """A process that evaluates at ``steps``."""
    steps = list(steps)
    with monitor.watch("kd seed 0", "task", 100, max(steps[0], 0), evaluated) as watch:
        for step in steps:
            watch.log(step, {"step": step, "accuracy": value})
            watch.matrices(step, "pair 0", torch.ones(2, 2), torch.zeros(2, 2))


def test_scalars_reach_tensorboard_under_their_run_and_step(tmp_path: Path, clock: Clock) -> None:
    monitor, _ = monitor_of(clock, terminal=False, folder=tmp_path)
    with monitor.watch("two-stage seed 0", "stage 1", 10) as watch:
        for step, loss in ((0, 4.0), (5, 2.0)):
            watch.log(step, {"step": step, "fsp_loss": loss, "fsp_loss/1": loss / 4})
        folder = tmp_path / "two-stage-seed-0-stage-1"  # to be read while training goes on
        assert sorted(events_of(folder).Tags()["scalars"]) == ["fsp_loss", "fsp_loss/1"]
        assert scalars(folder, "fsp_loss/1") == [(0, 1.0), (5, 0.5)]


def test_a_run_from_the_start_replaces_one_of_the_same_name(tmp_path: Path, clock: Clock) -> None:
    monitor, _ = monitor_of(clock, terminal=False, folder=tmp_path)
    log(monitor, (0, 5, 10), 0.25)
    log(monitor, (0, 5), 0.75)
    assert scalars(tmp_path / "kd-seed-0-task", "accuracy") == [(0, 0.75), (5, 0.75)]


def test_a_resumed_run_keeps_what_counts_and_repeats_no_step(tmp_path: Path, clock: Clock) -> None:
    monitor, _ = monitor_of(clock, terminal=False, folder=tmp_path)
    log(monitor, (0, 5, 10, 15), 0.25)
    log(monitor, (10, 15, 20), 0.75, evaluated=5)  # killed before a checkpoint knew of step 10
    log(monitor, (20, 25), 1.0, evaluated=15)
    folder = tmp_path / "kd-seed-0-task"
    assert scalars(folder, "accuracy") == [
        (0, 0.25),
        (5, 0.25),
        (10, 0.75),
        (15, 0.75),
        (20, 1.0),
        (25, 1.0),
    ]
    [tag] = events_of(folder).Tags()["images"]
    assert [event.step for event in events_of(folder).Images(tag)] == [0, 5, 10, 15, 20, 25]


def test_matrices_reach_tensorboard_as_pictures(tmp_path: Path, clock: Clock) -> None:
    monitor, _ = monitor_of(clock, terminal=False, folder=tmp_path)
    student, teacher = torch.tensor([[1.0, 0.0]]), torch.tensor([[-1.0, 0.0]])
    with monitor.watch("two-stage seed 0", "stage 1", 10) as watch:
        watch.matrices(3, "pair 1", student, teacher)
    events = events_of(tmp_path / "two-stage-seed-0-stage-1")
    assert events.Tags()["images"] == ["pair 1: student, teacher, difference"]
    [event] = events.Images("pair 1: student, teacher, difference")
    pixels = np.asarray(Image.open(io.BytesIO(event.encoded_image_string)))
    assert (event.step, pixels.shape) == (3, (128, 8 * 128, 3))
    reds, blues = (pixels[64, 64::128, colour].astype(int) for colour in (0, 2))
    # Student 1 0, white, teacher -1 0, white, difference 2 0: red above zero, blue below.
    signs = np.where(abs(reds - blues) < 10, 0, np.sign(reds - blues))
    assert signs.tolist() == [1, 0, 0, -1, 0, 0, 1, 0]
    assert pixels[64, 6 * 128, 1] < pixels[64, 0, 1]  # on one scale the difference is the deepest


def test_pictures_of_nothing_but_zeros_are_white() -> None:
    picture = draw_side_by_side([torch.zeros(200, 20)] * 2)
    assert picture.shape == (3, 200, 20 + 1 + 20)
    assert picture.min() > 0.95


def test_training_that_was_stopped_and_killed_has_each_evaluation_once(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = load_config(recipe, ["seeds=[0]", "evaluation.every=1", "checkpoints.every=4"])
    board, signal = tmp_path / "board", Interruption()
    monitor = Monitor(Console(file=io.StringIO()), board)

    def train(ends: Callable[[int], object], error: type[BaseException]) -> None:
        """One process; ``ends`` is told how many steps it did, and sees to it that it ends."""
        study, steps = Study(config, tmp_path / "run", monitor, signal, resume=True), count(1)
        study.train_teacher()
        with monkeypatch.context() as patch:
            patch.setattr(Watch, "step", lambda _: ends(next(steps)))
            with pytest.raises(error):
                study.student("two-stage", 0)
        signal.requested = 0

    def stop(step: int) -> None:
        signal.requested = SIGTERM if step == 2 else 0

    def kill(step: int) -> None:
        if step == 3:
            raise KeyboardInterrupt

    train(stop, InterruptedRunError)  # saved in step 3, before its evaluation
    train(lambda _: kill(3), KeyboardInterrupt)  # in step 4, after the evaluation of 3
    train(kill, KeyboardInterrupt)  # in step 6, after those of 3, 4 (saved) and 5
    Study(config, tmp_path / "run", monitor, signal, resume=True).student("two-stage", 0)
    stage1, stage2 = (board / f"two-stage-seed-0-stage-{n}" for n in (1, 2))
    assert [step for step, _ in scalars(stage1, "fsp_loss")] == list(range(9))
    assert [step for step, _ in scalars(stage2, "accuracy")] == list(range(7))
    assert {"fsp_loss/0", "fsp_loss/1"} <= set(events_of(stage1).Tags()["scalars"])
    assert len(events_of(stage1).Tags()["images"]) == 2
