"""What can be watched while networks train: progress bars and TensorBoard."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

from accelerate.tracking import TensorBoardTracker
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)


class Watch:
    """One phase of one network's training, as ``Monitor.watch`` hands it out."""

    def __init__(
        self, progress: Progress, task: TaskID, tracker: TensorBoardTracker | None
    ) -> None:
        self._progress, self._task, self._tracker = progress, task, tracker

    def step(self) -> None:
        """One optimiser step is done."""
        self._progress.advance(self._task)

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        """Show ``scalars`` beside the bar and write them to TensorBoard at ``step``."""
        shown = [(name, value) for name, value in scalars.items() if name != "step"]
        text = "  ".join(f"{name.replace('_', ' ')} {value:.4g}" for name, value in shown)
        self._progress.update(self._task, scalars=text)
        if self._tracker is not None:
            self._tracker.log(dict(shown), step=step)


class Monitor:
    """Progress bars on ``console``; TensorBoard event files in ``folder``, if one is given.

    A terminal sees one live bar per phase; a log file sees only what ``say`` prints.
    """

    def __init__(self, console: Console, folder: Path | None = None) -> None:
        self._folder = folder
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("[dim]{task.fields[scalars]}"),
            console=console,
            transient=True,
        )

    @contextmanager
    def watch(self, run: str, phase: str, steps: int) -> Iterator[Watch]:
        """Follow ``steps`` steps of ``phase`` ("stage 1") of ``run`` ("distilled seed 0")."""
        task = self._progress.add_task(f"{run}, {phase}", total=steps, scalars="")
        tracker = None
        if self._folder is not None:
            name = f"{run} {phase}".replace(" ", "-")
            shutil.rmtree(self._folder / name, ignore_errors=True)  # or two runs share one curve
            tracker = TensorBoardTracker(run_name=name, logging_dir=self._folder)
            tracker.start()
        try:
            yield Watch(self._progress, task, tracker)
        finally:
            self._progress.remove_task(task)
            if tracker is not None:
                tracker.finish()

    def say(self, text: str) -> None:
        """Print a line above the bars."""
        self._progress.console.print(text, highlight=False)

    def __enter__(self) -> Monitor:
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._progress.stop()
