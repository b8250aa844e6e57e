"""What a run shows while it runs, in place of pytest's own output: a bar, and what goes wrong."""

from __future__ import annotations

import pytest
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn


class ProgressBar:
    """A bar over the tests of a run. Where nobody watches it, a line for each race."""

    def __init__(self, console: Console):
        self._console = console
        self._bar = Progress(
            TextColumn("{task.description:<60.60}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("collecting", total=None)
        self._race = ""

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """What keeps benchmarks from being found."""
        if report.failed:
            self._console.print(report.longreprtext, markup=False)

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        """Now it is known how many there are."""
        self._bar.start()
        self._bar.update(self._task, total=len(session.items))

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        """Name what is being measured; the contenders of a race are measured together."""
        what = nodeid.partition("[")[2].rstrip("]")
        self._bar.update(self._task, description=what)
        race = what.rpartition("-")[0]
        if race != self._race and not self._console.is_terminal:
            self._console.print(race, markup=False, highlight=False)
        self._race = race

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Say what failed."""
        if report.failed:
            self._console.print(f"{report.nodeid}\n{report.longreprtext}", markup=False)

    def pytest_runtest_logfinish(self) -> None:
        """One more is done."""
        self._bar.advance(self._task)

    def pytest_sessionfinish(self) -> None:
        """Leave the bar as it is."""
        self._bar.stop()


def pytest_configure(config: pytest.Config) -> None:
    """``-p benchmarks.progress`` asks for it."""
    config.pluginmanager.register(ProgressBar(Console()), "fsp-progress")
