"""Progress and TensorBoard."""

from __future__ import annotations

import io
from pathlib import Path

from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fsp_kernels.distill.monitor import Monitor


def test_scalars_reach_tensorboard_under_their_run_and_step(tmp_path: Path) -> None:
    monitor = Monitor(Console(file=io.StringIO()), tmp_path)
    for value in (0.25, 0.75):  # the second run of the same name replaces the first
        with monitor.watch("distilled seed 0", "stage 1", 10) as watch:
            watch.log(5, {"step": 5, "accuracy": value})
    events = EventAccumulator(str(tmp_path / "distilled-seed-0-stage-1")).Reload()
    assert events.Tags()["scalars"] == ["accuracy"]
    assert [(e.step, e.value) for e in events.Scalars("accuracy")] == [(5, 0.75)]


def test_a_terminal_sees_run_phase_and_scalars() -> None:
    screen = io.StringIO()
    monitor = Monitor(Console(file=screen, force_terminal=True, width=120))
    with monitor, monitor.watch("teacher", "task", 10) as watch:
        watch.step()
        watch.log(1, {"step": 1, "train_loss": 0.5})
        monitor._progress.refresh()
    assert "teacher, task" in screen.getvalue()
    assert "train loss 0.5" in screen.getvalue()
