"""Progress of training on a console, and TensorBoard's event files."""

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
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from fsp_kernels.errors import DistillError

_SECONDS_BETWEEN_LINES = 30.0  # in a log, which has no bars
_LEAST_HEIGHT = 128  # pixels of a picture, which TensorBoard does not enlarge


class _Rate(ProgressColumn):
    """Steps per second."""

    def render(self, task: Task) -> Text:
        return Text(_rate(task), style="progress.data.speed")


class Monitor:
    """Shows progress on ``console``, and writes for TensorBoard to ``folder`` if there is one.

    A terminal has a live bar for the current stage; a log has a line now and then. Both show rate,
    time left and the last evaluation. The rate includes the time of evaluations.
    """

    def __init__(self, console: Console, folder: Path | None = None) -> None:
        self._folder = folder
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
            run: such as "two-stage seed 0".
            stage: such as "stage 1".
            steps: of the stage.
            first_step: the steps that an earlier process took.
            evaluated: the step of the last evaluation that counts, or -1. Later ones will be made
                again, so TensorBoard hides what it has of them.
        """
        writer = None
        if self._folder is not None:
            folder = self._folder / f"{run} {stage}".replace(" ", "-")
            with _name_folder_in_errors(folder):
                if evaluated < 0:
                    shutil.rmtree(folder, ignore_errors=True)  # or two runs would share one curve
                writer = SummaryWriter(folder, purge_step=evaluated + 1)
        watch = Watch(self, f"{run}, {stage}", steps, first_step, writer)
        try:
            yield watch
        finally:
            self.progress.remove_task(watch.task.id)
            if writer is not None:
                with suppress(OSError):  # all that counts was flushed before
                    writer.close()

    def say(self, text: str) -> None:
        """Print a line, above the bar if there is one."""
        self.progress.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def __enter__(self) -> Monitor:
        self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.stop()


class Watch:
    """One stage of one network's training, as ``Monitor.watch`` gives it."""

    def __init__(
        self, monitor: Monitor, name: str, steps: int, done: int, writer: SummaryWriter | None
    ) -> None:
        self._monitor, self._progress, self._writer = monitor, monitor.progress, writer
        number = self._progress.add_task(name, total=steps, completed=done, scalars="")
        self.task = next(task for task in self._progress.tasks if task.id == number)
        self._last_line = monotonic()

    def step(self) -> None:
        """Count one optimiser step."""
        self._progress.advance(self.task.id)
        now = monotonic()
        terminal = self._progress.console.is_terminal
        if not terminal and now - self._last_line >= _SECONDS_BETWEEN_LINES:
            self._last_line = now
            self._monitor.say(_line(self.task))

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        """Show ``scalars`` beside the bar, and write them for TensorBoard at ``step``."""
        values = {name: value for name, value in scalars.items() if name != "step"}
        # A line has no room for the losses of single pairs.
        shown = {name: value for name, value in values.items() if "/" not in name}
        text = "  ".join(f"{name.replace('_', ' ')} {value:.4g}" for name, value in shown.items())
        self._progress.update(self.task.id, scalars=text)
        if self._writer is not None:
            with _name_folder_in_errors(self._writer.log_dir):
                for name, value in values.items():
                    self._writer.add_scalar(name, value, step)
                self._writer.flush()

    def matrices(self, step: int, name: str, student: Tensor, teacher: Tensor) -> None:
        """Write FSP matrices (m, n) of student and teacher, and their difference, as a picture."""
        if self._writer is not None:
            picture = draw_side_by_side([student, teacher, student - teacher])
            with _name_folder_in_errors(self._writer.log_dir):
                self._writer.add_image(f"{name}: student, teacher, difference", picture, step)


def draw_side_by_side(matrices: list[Tensor]) -> Tensor:
    """Matrices (m, n) as one picture (3, height, width) of values 0 to 1, on one colour scale.

    An entry is a square of as many pixels as the least height needs.
    """
    m, n = matrices[0].shape
    white = torch.zeros(m, max(1, n // 16))
    parts = [part for matrix in matrices for part in (matrix.float(), white)][:-1]
    joined = torch.cat(parts, dim=1)
    limit = joined.abs().max().clamp_min(torch.finfo(torch.float32).tiny)
    colours = torch.from_numpy(colormaps["RdBu_r"]((joined / limit + 1).numpy() / 2)[..., :3])
    pixels = -(-_LEAST_HEIGHT // m)
    return colours.permute(2, 0, 1).repeat_interleave(pixels, 1).repeat_interleave(pixels, 2)


def _rate(task: Task) -> str:
    speed = task.finished_speed or task.speed
    if speed is None:
        return ""
    return f"{speed:.3g} steps/s" if speed < 1000 else f"{speed:.0f} steps/s"


def _line(task: Task) -> str:
    """A line with what a bar shows, for a log."""
    left = "" if task.time_remaining is None else f"{timedelta(seconds=task.time_remaining)} left"
    done = f"step {task.completed:.0f} of {task.total:.0f}"
    parts = [done, _rate(task), left, task.fields["scalars"]]
    return f"{task.description}: {'  '.join(part for part in parts if part)}"


@contextmanager
def _name_folder_in_errors(folder: Path | str) -> Iterator[None]:
    """Name the folder in errors of TensorBoard, whose thread raises them at a later call."""
    try:
        yield
    except OSError as error:
        raise DistillError(f"{folder}: cannot be written: {error.strerror or error}") from error
