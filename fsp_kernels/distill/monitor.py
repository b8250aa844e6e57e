"""What can be watched while networks train: progress, and TensorBoard."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from time import monotonic

import torch
from matplotlib import colormaps
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from fsp_kernels.distill.errors import DistillError

_SECONDS_BETWEEN_LINES = 30.0  # in a log, which has no bars
_LEAST_HEIGHT = 128  # pixels of a picture, which TensorBoard shows as it is


class Watch:
    """One stage of one network's training, as ``Monitor.watch`` hands it out."""

    def __init__(self, monitor: Monitor, task: TaskID, writer: SummaryWriter | None) -> None:
        self._monitor, self._task, self._writer = monitor, task, writer

    def step(self) -> None:
        """One optimiser step is done."""
        self._monitor.advance(self._task)

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        """Show ``scalars`` beside the bar and write them to TensorBoard at ``step``."""
        values = {name: value for name, value in scalars.items() if name != "step"}
        # A pair's own loss is for TensorBoard; a line has no room for it.
        shown = {name: value for name, value in values.items() if "/" not in name}
        text = "  ".join(f"{name.replace('_', ' ')} {value:.4g}" for name, value in shown.items())
        self._monitor.show(self._task, text)
        if self._writer is not None:
            with _named(self._writer.log_dir):
                for name, value in values.items():
                    self._writer.add_scalar(name, value, step)
                self._writer.flush()

    def matrices(self, step: int, name: str, student: Tensor, teacher: Tensor) -> None:
        """To TensorBoard: the student's FSP matrix (m, n), the teacher's, and their difference."""
        if self._writer is not None:
            picture = side_by_side([student, teacher, student - teacher])
            with _named(self._writer.log_dir):
                self._writer.add_image(f"{name}: student, teacher, difference", picture, step)


def side_by_side(matrices: list[Tensor]) -> Tensor:
    """Matrices (m, n) as one picture (3, height, width) of values 0 to 1, on one colour scale.

    An entry is a square of as many pixels as make the picture high enough to be looked at.
    """
    m, n = matrices[0].shape
    white = torch.zeros(m, max(1, n // 16))
    parts = [part for matrix in matrices for part in (matrix.float(), white)][:-1]
    joined = torch.cat(parts, dim=1)
    limit = joined.abs().max().clamp_min(torch.finfo(torch.float32).tiny)
    colours = torch.from_numpy(colormaps["RdBu_r"]((joined / limit + 1).numpy() / 2)[..., :3])
    pixels = -(-_LEAST_HEIGHT // m)
    return colours.permute(2, 0, 1).repeat_interleave(pixels, 1).repeat_interleave(pixels, 2)


class _Rate(ProgressColumn):
    """Steps a second."""

    def render(self, task: Task) -> Text:
        return Text(_rate(task), style="progress.data.speed")


def _rate(task: Task) -> str:
    speed = task.finished_speed or task.speed
    if speed is None:
        return ""
    return f"{speed:.3g} steps/s" if speed < 1000 else f"{speed:.0f} steps/s"


class Monitor:
    """Progress on ``console``; TensorBoard event files in ``folder``, if one is given.

    A terminal has a live bar for the stage at hand; a log, which is no terminal, a line now and
    then. Both tell rate, time left and the last evaluation. The time that evaluations take is in
    the rate.
    """

    def __init__(self, console: Console, folder: Path | None = None) -> None:
        self._folder, self._console = folder, console
        self._last_line = 0.0
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            _Rate(),
            TimeRemainingColumn(),
            TextColumn("[dim]{task.fields[scalars]}"),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )

    @contextmanager
    def watch(
        self, run: str, stage: str, steps: int, first_step: int = 0, evaluated: int = -1
    ) -> Iterator[Watch]:
        """Follow one stage of one network's training.

        Args:
            run: "two-stage seed 0".
            stage: "stage 1".
            steps: of the stage.
            first_step: how many of them are done, where an earlier process did some.
            evaluated: the step of its last evaluation that counts, or -1. What TensorBoard has of
                later ones is hidden: they will be made again.
        """
        name = f"{run}, {stage}"
        task = self.progress.add_task(name, total=steps, completed=first_step, scalars="")
        writer = None
        if self._folder is not None:
            writer = _writer(self._folder / f"{run} {stage}".replace(" ", "-"), evaluated)
        self._last_line = monotonic()
        try:
            yield Watch(self, task, writer)
        finally:
            self.progress.remove_task(task)
            if writer is not None:
                with suppress(OSError):  # all that matters was flushed before
                    writer.close()

    def advance(self, task: TaskID) -> None:
        """A step further."""
        self.progress.advance(task)
        now = monotonic()
        if not self._console.is_terminal and now - self._last_line >= _SECONDS_BETWEEN_LINES:
            self._last_line = now
            self.say(_line(next(t for t in self.progress.tasks if t.id == task)))

    def show(self, task: TaskID, text: str) -> None:
        """``text`` beside a task's bar, or in its next lines."""
        self.progress.update(task, scalars=text)

    def say(self, text: str) -> None:
        """Print a line, above the bar if there is one."""
        self.progress.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def __enter__(self) -> Monitor:
        self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.stop()


def _line(task: Task) -> str:
    """What a bar shows, for a log."""
    left = "" if task.time_remaining is None else f"{timedelta(seconds=task.time_remaining)} left"
    done = f"step {task.completed:.0f} of {task.total:.0f}"
    parts = [done, _rate(task), left, task.fields["scalars"]]
    return f"{task.description}: {'  '.join(part for part in parts if part)}"


def _writer(folder: Path, evaluated: int) -> SummaryWriter:
    with _named(folder):
        if evaluated < 0:
            shutil.rmtree(folder, ignore_errors=True)  # or two runs would share one curve
            return SummaryWriter(folder)
        return SummaryWriter(folder, purge_step=evaluated + 1)


@contextmanager
def _named(folder: Path | str) -> Iterator[None]:
    """What stops TensorBoard's own thread is raised at a later call, and names no file."""
    try:
        yield
    except OSError as error:
        raise DistillError(f"{folder}: cannot be written: {error.strerror or error}") from error
