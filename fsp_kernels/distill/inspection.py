"""``fsp-distill inspect``: the pairs that networks could have, and their modules."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Literal

import torch
import yaml
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from fsp_kernels.errors import DistillError
from fsp_kernels.features.pairs import PairLike, PairShapes, PathPair, check_pairs, find_pairs
from fsp_kernels.features.paths import tensors_in
from fsp_kernels.features.stages import ModuleRun, stages_of, trace

_LARGEST = 1024  # channels, height or width; all maps of a network are in memory at once
_SHOWN = 2  # tensors in one note
_SOURCES: tuple[Literal["auto", "family"], ...] = ("auto", "family")


def blank_image(text: str) -> Tensor:
    """A black image (1, C, H, W) of a shape such as ``"3x32x32"``.

    Raises:
        DistillError: the shape is something else.
    """
    match = re.fullmatch(r"(\d{1,4})x(\d{1,4})x(\d{1,4})", text)
    sizes = [int(size) for size in match.groups()] if match else [0]
    if not all(1 <= size <= _LARGEST for size in sizes):
        raise DistillError(
            f"--input: is {text!r}, must be channels, height and width, as in 3x32x32, each from "
            f"1 to {_LARGEST}"
        )
    return torch.zeros(1, *sizes)


def print_inspection(
    console: Console,
    image: Tensor,
    student: nn.Module,
    teacher: nn.Module | None = None,
    modules: bool = False,
) -> None:
    """Print the pairs of two networks as a table and for a recipe; with ``modules``, these too.

    The networks run on ``image``, (1, C, H, W), and are left as they were. Without a ``teacher``
    the student is paired with itself.

    Raises:
        DistillError: a network does not take the image.
    """
    networks = {"student": student} | ({"teacher": teacher} if teacher is not None else {})
    tables = [_module_table(model, image, role) for role, model in networks.items()]
    both = student, student if teacher is None else teacher
    found: dict[str, tuple[PathPair, ...]] = {}
    hints = []
    for source in _SOURCES:
        try:
            found[source] = find_pairs(source, *both, image)
        except DistillError as error:
            hints.append(str(error))
    if found:
        console.print(_pair_table(found, *both, image))
    text = hints[0] if hints else ""
    if "auto" in found:
        console.print("For a recipe, the pairs of auto:\n", highlight=False)
        text = pairs_yaml(found["auto"])
    console.print(text, markup=False, highlight=False, soft_wrap=True)
    if modules:
        console.print(*tables)


def pairs_yaml(pairs: Sequence[PairLike]) -> str:
    """The pairs as a recipe has them."""
    tree = [{"student": list(pair.student), "teacher": list(pair.teacher)} for pair in pairs]
    return yaml.safe_dump({"pairs": tree}, sort_keys=False, default_flow_style=None, width=1000)


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    for column in columns:
        table.add_column(column, overflow="fold", no_wrap=column in ("from", "output", "stage"))
    return table


def _pair_table(
    found: dict[str, tuple[PathPair, ...]], student: nn.Module, teacher: nn.Module, image: Tensor
) -> Table:
    table = _table("Pairs", "from", "student", "teacher", "verdict")
    for source, pairs in found.items():
        shapes = check_pairs(pairs, student, teacher, image, projection=True)
        for pair, shape in zip(pairs, shapes, strict=True):
            ours = _two_maps(pair.student, shape.student, shape.student_sizes)
            theirs = _two_maps(pair.teacher, shape.teacher, shape.teacher_sizes)
            table.add_row(source, ours, theirs, _verdict(shape))
    return table


def _two_maps(
    paths: Sequence[str], channels: Sequence[int], sizes: Sequence[tuple[int, ...]]
) -> str:
    maps = zip(paths, channels, sizes, strict=True)
    return "\n".join(f"{path} {_times((count, *size))}" for path, count, size in maps)


def _verdict(shapes: PairShapes) -> str:
    """How the maps of a pair are made to fit each other and the other network's."""
    words = [
        f"{role} pooled to {_times(map(min, *sizes))}"
        for role, sizes in (("student", shapes.student_sizes), ("teacher", shapes.teacher_sizes))
        if sizes[0] != sizes[1]
    ]
    channels = zip(shapes.student, shapes.teacher, strict=True)
    needs = dict.fromkeys(f"{have} -> {want}" for have, want in channels if have != want)
    words += [f"needs fsp.projection ({', '.join(needs)})"] if needs else []
    return ", ".join(words) or "fits"


def _module_table(model: nn.Module, image: Tensor, role: str) -> Table:
    """Every module in the order of definition, with its output for ``image``."""
    runs = trace(model, image, role)
    marks: dict[str, str] = {}
    for number, stage in enumerate(stages_of(runs, image), start=1):
        marks |= {stage.first.path: f"{number} first", stage.last.path: f"{number} last"}
    title = f"{role.capitalize()}: {type(model).__name__} on {_times(image.shape[1:])}"
    table = _table(title, "module", "type", "output", "stage", "note")
    for run in runs:
        kind, mark = type(run.module).__name__, marks.get(run.path, "")
        shape = "" if run.output is None else _times(run.output.shape[1:])
        table.add_row(run.path, kind, shape, mark, _note(run), style="bold" if mark else "")
    return table


def _note(run: ModuleRun) -> str:
    """Why the module's output is not a feature map, if it is not."""
    if run.calls != 1:
        return f"runs {run.calls} times" if run.calls else "did not run"
    if run.overwritten:
        return "overwritten in place"
    if run.output is not None:
        return ""
    within = [f"{keys} is {_times(x.shape[1:])}" for keys, x in tensors_in(run.other)]
    return "; ".join([type(run.other).__name__, *within[:_SHOWN]])


def _times(sizes: Iterable[int]) -> str:
    return "x".join(map(str, sizes))
