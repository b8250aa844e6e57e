"""The commands of ``fsp-distill``."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from fsp_kernels.distill import export as exporting
from fsp_kernels.distill import inspection, records
from fsp_kernels.distill.config import ArmName, Config, Network, load_config
from fsp_kernels.distill.interruption import InterruptedRunError, Interruption
from fsp_kernels.distill.models import build_model
from fsp_kernels.distill.monitor import Monitor
from fsp_kernels.distill.report import write_report
from fsp_kernels.distill.study import Study
from fsp_kernels.errors import DistillError

_RUNS = Path("runs")

app = typer.Typer(
    name="fsp-distill",
    help="""Distil a network by its flow of solution procedure (Yim et al., CVPR 2017).

    A recipe is a YAML file; any key of it can be overridden on the command line:

        fsp-distill study recipe.yaml stage1.steps=200 execution.precision=bf16

    On several GPUs or machines, start the same command with a launcher:

        torchrun --nproc-per-node 4 -m fsp_kernels.distill train recipe.yaml
    """,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)

Recipe = Annotated[Path, typer.Argument(metavar="CONFIG", help="The recipe, a YAML file.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE", help="Overrides, such as stage1.steps=300."),
]
Output = Annotated[
    Path | None,
    typer.Option(
        "--output",
        "-o",
        metavar="FOLDER",
        help="The run folder, by default runs/NAME with the recipe's name. Results of an earlier "
        "run in it are replaced; a folder that holds anything else is refused.",
    ),
]
Resume = Annotated[
    bool | None,
    typer.Option(
        "--resume/--restart",
        help="Resume an unfinished run, or begin again. With neither, an unfinished run is an "
        "error.",
        show_default=False,
    ),
]


@app.command()
def study(
    recipe: Recipe, overrides: Overrides = None, output: Output = None, resume: Resume = None
) -> None:
    """Train the teacher (or reuse it), then a student for each of the recipe's arms and seeds.

    Writes report.md and report.html, figures, metrics.json, runs.csv, curves.csv, weights and
    event files for TensorBoard.
    """
    with _open_study(recipe, overrides, output, resume) as opened:
        opened.all()
        if opened.runtime.accelerator.is_main_process:
            _report([opened.folder], opened.folder, opened.monitor)


@app.command()
def teacher(
    recipe: Recipe, overrides: Overrides = None, output: Output = None, resume: Resume = None
) -> None:
    """Train the teacher and keep its weights in the run folder."""
    with _open_study(recipe, overrides, output, resume, lambda _: []) as opened:
        opened.train_teacher()
        opened.monitor.say(f"weights: {opened.folder / 'teacher' / records.MODEL}")


@app.command()
def train(
    recipe: Recipe,
    overrides: Overrides = None,
    arm: Annotated[ArmName, typer.Option(help="How to train it.")] = "two-stage",
    seed: Annotated[
        int | None, typer.Option(min=0, help="The seed; the recipe's first by default.")
    ] = None,
    output: Output = None,
    resume: Resume = None,
) -> None:
    """Train one student (first its teacher, if there is none yet) and report on it."""

    def student(config: Config) -> list[tuple[str, int]]:
        return [(arm, config.seeds[0] if seed is None else seed)]

    with _open_study(recipe, overrides, output, resume, student) as opened:
        [chosen] = opened.students
        opened.student(*chosen)
        folder = opened.folder_of(*chosen)
        if opened.runtime.accelerator.is_main_process:
            _report([folder], folder, opened.monitor)
            opened.monitor.say(f"weights: {folder / records.MODEL}")


@app.command()
def compare(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN...", help="Folders of runs, or of whole studies.")
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="FOLDER", help="For the report.")
    ] = _RUNS / "comparison",
) -> None:
    """Write one report of all finished runs in the given folders."""
    with _exit_codes():
        _report(runs, output, Monitor(Console()))


@app.command()
def inspect(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="The student: cifar/resnet8, torchvision/resnet18, timm/NAME, package:callable.",
        ),
    ],
    teacher: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="Also show which pairs fit this teacher."),
    ] = None,
    input: Annotated[  # noqa: A002
        str, typer.Option(metavar="CxHxW", help="Shape of an image, each number at most 1024.")
    ] = "3x32x32",
    classes: Annotated[int, typer.Option(min=1, max=100_000, help="Number of classes.")] = 10,
    modules: Annotated[
        bool, typer.Option("--modules", help="Also print every module's path and output.")
    ] = False,
) -> None:
    """Print the pairs of feature maps that a model offers, and its modules with their outputs."""
    with _exit_codes():
        image = inspection.blank_image(input)
        networks = {
            role: build_model(
                Network(model=name), in_channels=image.shape[1], classes=classes, where=role
            )
            for role, name in (("student", model), ("teacher", teacher))
            if name
        }
        # A pipe has no width, and its rows should stay whole, so that they can be searched.
        console = Console() if Console().is_terminal else Console(width=160)
        inspection.print_inspection(console, image, **networks, modules=modules)


@app.command()
def export(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a finished run.")],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="FOLDER", help="RUN/export by default."),
    ] = None,
) -> None:
    """Write a run's network as safetensors and as a torch.export program, which is checked."""
    with _exit_codes():
        for path in exporting.export_run(run, output or run / "export"):
            print(path)


def _report(folders: list[Path], output: Path, monitor: Monitor) -> None:
    command = shlex.join(["fsp-distill", *sys.argv[1:]])
    headlines = write_report(folders, output, command)
    monitor.say("\n".join(["", *headlines]))
    monitor.say(f"report: {output / 'report.md'} and report.html")


@contextmanager
def _open_study(
    recipe: Path,
    overrides: list[str] | None,
    output: Path | None,
    resume: bool | None,
    students: Callable[[Config], list[tuple[str, int]]] | None = None,
) -> Iterator[Study]:
    """The recipe's study, with progress bars; ``students`` chooses what to train of it."""
    with _exit_codes(), Interruption() as interruption:
        config = load_config(recipe, overrides or [])
        folder = output or _RUNS / config.name
        first = os.environ.get("RANK", "0") == "0"  # only this process prints
        monitor = Monitor(Console(quiet=not first), folder / "tensorboard" if first else None)
        chosen = students(config) if students else None
        opened = Study(config, folder, monitor, interruption, resume, chosen)
        with monitor:
            yield opened
            if opened.summary:
                monitor.say(opened.summary)


@contextmanager
def _exit_codes() -> Iterator[None]:
    """Print an error and exit with code 2, or with the shell's code for a signal."""
    try:
        yield
    except DistillError as error:
        Console(stderr=True).print(f"[red]error:[/red] {escape(str(error))}", soft_wrap=True)
        raise typer.Exit(2) from None
    except InterruptedRunError as error:
        Console(stderr=True).print(escape(str(error)), soft_wrap=True)
        raise typer.Exit(error.exit_code) from None
