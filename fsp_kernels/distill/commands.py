"""The commands of ``fsp-distill``; ``cli.py`` starts them."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from fsp_kernels.distill.compare import ARMS, Laboratory
from fsp_kernels.distill.config import load_config
from fsp_kernels.distill.errors import DistillError, did_you_mean
from fsp_kernels.distill.monitor import Monitor
from fsp_kernels.distill.report import headline, write_report

_RUNS = Path("runs")

app = typer.Typer(
    name="fsp-distill",
    help="""Distil a network by its flow of solution procedure (Yim et al., CVPR 2017).

    A recipe is a YAML file; any key of it can be overridden on the command line:

        fsp-distill compare recipe.yaml student.depth=14 stage1.steps=200
    """,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)

Recipe = Annotated[Path, typer.Argument(metavar="CONFIG", help="The recipe, a YAML file.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE", help="Overrides, such as student.depth=14."),
]
Output = Annotated[
    Path | None,
    typer.Option(
        "--output",
        "-o",
        metavar="FOLDER",
        help="The run folder; runs/NAME of the recipe by default. Results of an earlier run in it "
        "are replaced; a folder that holds anything else is refused.",
    ),
]


def _known_arm(name: str) -> str:
    if name not in ARMS:
        hint = did_you_mean(name, ARMS) or f"; there are {', '.join(ARMS)}"
        raise typer.BadParameter(f"no arm is called {name!r}{hint}")
    return name


@app.command()
def teacher(recipe: Recipe, overrides: Overrides = None, output: Output = None) -> None:
    """Train the teacher and keep its checkpoint in the run folder."""
    with _laboratory(recipe, overrides, output) as laboratory:
        laboratory.teacher()
        laboratory.monitor.say(f"checkpoint: {laboratory.teacher_path}")


@app.command()
def student(
    recipe: Recipe,
    overrides: Overrides = None,
    arm: Annotated[
        str, typer.Option(help=f"How to train it: {', '.join(ARMS)}.", callback=_known_arm)
    ] = "distilled",
    seed: Annotated[
        int | None, typer.Option(min=0, help="The seed; the recipe's first by default.")
    ] = None,
    output: Output = None,
) -> None:
    """Train one student: distilled (with the teacher, trained first if need be) or a baseline."""
    with _laboratory(recipe, overrides, output) as laboratory:
        first = laboratory.config.seeds[0]
        run = laboratory.student(arm, first if seed is None else seed)
        laboratory.monitor.say(f"checkpoint: {laboratory.student_path(run.arm, run.seed)}")


@app.command()
def compare(recipe: Recipe, overrides: Overrides = None, output: Output = None) -> None:
    """Train the teacher (or reuse it), baselines and distilled students; write a report.

    The run folder gets report.md with figures, metrics.json, runs.csv, curves.csv, checkpoints and
    TensorBoard's event files.
    """
    command = ["fsp-distill", "compare", str(recipe), *(overrides or [])]
    command += ["--output", str(output)] if output else []
    with _laboratory(recipe, overrides, output) as laboratory:
        comparison = laboratory.compare()
        path = write_report(comparison, laboratory.folder, shlex.join(command))
        laboratory.monitor.say("")
        laboratory.monitor.say(headline(comparison).replace("**", ""))
        laboratory.monitor.say(f"report: {path}")


@contextmanager
def _laboratory(
    recipe: Path, overrides: list[str] | None, output: Path | None
) -> Iterator[Laboratory]:
    """The recipe's laboratory with its bars running; a ``DistillError`` ends with exit code 2."""
    try:
        config = load_config(recipe, overrides or [])
        folder = output or _RUNS / config.name
        laboratory = Laboratory(config, folder, Monitor(Console(), folder / "tensorboard"))
        with laboratory.monitor:
            yield laboratory
    except DistillError as error:
        Console(stderr=True).print(f"[red]error:[/red] {escape(str(error))}", soft_wrap=True)
        raise typer.Exit(2) from None
