"""``python -m benchmarks report``: tables and figures of a run, or what changed between runs."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.report import comparison, document, figures
from benchmarks.report.compare import compare
from benchmarks.report.figures.canvas import save
from benchmarks.report.figures.comparison import figure as comparison_figure
from benchmarks.report.runs import Run, Unreadable, load


def write(run: Run, folder: Path) -> list[Path]:
    """``report.md`` and the figures of a run."""
    folder.mkdir(parents=True, exist_ok=True)
    drawn = figures.draw(run, folder)
    report = folder / "report.md"
    report.write_text(document.markdown(run, [path.name for path in drawn]))
    return [report, *drawn]


def draw(folder: Path) -> list[Path]:
    """(Re)draw ``report.md`` and the figures from all parts in a folder; returns what it wrote."""
    return write(load(folder), folder)


def plain(source: Path | Run, parts: Sequence[str] | None = None) -> str:
    """What a terminal shows of a folder or a run: all parts, or some."""
    return document.terminal(source if isinstance(source, Run) else load(source), parts)


def report_one(run: Run, output: Path | None) -> int:
    """Print a run's tables, and write all there is beside its files."""
    print(document.terminal(run))
    folder = output or (run.path if run.path.is_dir() else run.path.parent)
    print("\nwrote " + ", ".join(map(str, write(run, folder))))
    return 0


def report_changes(runs: Sequence[Run], output: Path | None) -> int:
    """Print what changed since the first run; 1 where something of ours got worse."""
    baseline, *others = runs
    comparisons = [compare(baseline, run) for run in others]
    print("\n\n\n".join(comparison.section(c, everything=False).plain() for c in comparisons))
    if output is not None:
        output.mkdir(parents=True, exist_ok=True)
        picture = comparison_figure(comparisons)
        if picture is not None:
            save(picture, output / "comparison.png")
        link = ["![new over baseline](comparison.png)"] * (picture is not None)
        blocks = ["# Comparison", *(comparison.section(c).markdown() for c in comparisons), *link]
        (output / "comparison.md").write_text("\n\n".join(blocks) + "\n")
    return int(any(found.regressed for found in comparisons))


def parser() -> argparse.ArgumentParser:
    """One path is reported, several are compared."""
    options = argparse.ArgumentParser(prog="python -m benchmarks report", description=__doc__)
    options.add_argument(
        "paths",
        nargs="+",
        type=Path,
        metavar="PATH",
        help="a result's JSON file or a folder of them; of several the first is the baseline",
    )
    options.add_argument(
        "--output",
        type=Path,
        metavar="DIR",
        help="of one run: where report.md and figures go (default: beside its files); of several: "
        "write comparison.md and comparison.png there",
    )
    return options


def main(arguments: Sequence[str]) -> int:
    """0, or 1 where a comparison finds a regression, or 2 where it cannot be done."""
    options = parser().parse_args(arguments)
    try:
        runs = [load(path) for path in options.paths]
        if len(runs) == 1:
            return report_one(runs[0], options.output)
        return report_changes(runs, options.output)
    except (Unreadable, ModuleNotFoundError) as error:
        print(error, file=sys.stderr)
        return 2
