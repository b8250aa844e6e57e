"""What ``fsp-distill inspect`` shows: the pairs that networks could have, and their modules."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple

import torch
import yaml
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from fsp_kernels.distill.config import Pair
from fsp_kernels.distill.errors import DistillError
from fsp_kernels.distill.pairs import PairShapes, check_pairs, resolve_pairs
from fsp_kernels.distill.paths import tensors_in
from fsp_kernels.distill.stages import ModuleRun, stages_of, trace

_LARGEST = 1024  # channels, height or width; all of a network's maps are kept at once
_SHOWN = 2  # tensors in one note
_TIMES = {2: "twice", 3: "three times"}


class Row(NamedTuple):
    """One module: ``shape`` is of its output without the batch, ``stage`` as ``"2 first"``."""

    path: str
    type: str
    shape: str
    stage: str
    note: str


class PairRow(NamedTuple):
    """One pair that a recipe could have, and what would become of it."""

    source: Literal["auto", "family"]
    pair: Pair
    shapes: PairShapes
    verdict: str


def parse_input_shape(text: str) -> tuple[int, int, int]:
    """``"3x32x32"`` as channels, height and width.

    Raises:
        DistillError: it is something else.
    """
    match = re.fullmatch(r"(\d{1,4})x(\d{1,4})x(\d{1,4})", text)
    channels, height, width = map(int, match.groups()) if match else (0, 0, 0)
    if not all(1 <= size <= _LARGEST for size in (channels, height, width)):
        raise DistillError(
            f"--input: is {text!r}, must be channels, height and width, as in 3x32x32, each from "
            f"1 to {_LARGEST}"
        )
    return channels, height, width


def module_table(model: nn.Module, image: Tensor, role: str = "student") -> list[Row]:
    """Every submodule in the order of definition, with what it did with ``image`` (1, C, H, W)."""
    entries = trace(model, image, role)
    marks: dict[str, str] = {}
    for number, stage in enumerate(stages_of(entries, image), start=1):
        marks[stage.first.path] = f"{number} first"
        marks[stage.last.path] = f"{number} last"
    return [
        Row(
            entry.path,
            type(entry.module).__name__,
            _times(entry.output.shape[1:]) if entry.output is not None else "",
            marks.get(entry.path, ""),
            _note(entry),
        )
        for entry in entries
    ]


def pair_table(student: nn.Module, teacher: nn.Module, image: Tensor) -> list[PairRow]:
    """The pairs of ``auto`` and, where both networks' are known, of ``family``."""
    rows = []
    sources: tuple[Literal["auto", "family"], ...] = ("auto", "family")
    for source in sources:
        pairs = _pairs(source, student, teacher, image)
        shapes = check_pairs(pairs, student, teacher, image, projection=True)
        rows += [
            PairRow(source, pair, shape, _verdict(shape))
            for pair, shape in zip(pairs, shapes, strict=True)
        ]
    return rows


def print_inspection(
    console: Console,
    shape: tuple[int, int, int],
    student: nn.Module,
    teacher: nn.Module | None = None,
    modules: bool = False,
) -> None:
    """The pairs of one network or two, as a table and for a recipe; their modules where asked for.

    Args:
        console: where to.
        shape: of the images, as ``parse_input_shape`` gives it.
        student: left as it was.
        teacher: without one, the pairs are of ``student`` with its like.
        modules: also every module of each network.
    """
    image = torch.zeros(1, *shape)
    networks = {"student": student} | ({"teacher": teacher} if teacher is not None else {})
    # Made before the pairs: it raises the error of a network that can't take the image.
    tables = [_modules(model, image, role) for role, model in networks.items()]
    rows = pair_table(student, teacher or student, image)
    if rows:
        console.print(_pair_listing(rows))
    pasted = [row.pair for row in rows if row.source == "auto"]
    if pasted:
        console.print("For a recipe, the pairs of auto:\n", highlight=False)
        console.print(pairs_yaml(pasted), markup=False, highlight=False, soft_wrap=True)
    else:
        try:
            resolve_pairs("auto", student, teacher or student, image)
        except DistillError as why:
            console.print(str(why), markup=False, highlight=False)
    if modules:
        console.print(*tables)


def pairs_yaml(pairs: Sequence[Pair]) -> str:
    """The pairs as a recipe has them."""
    tree = [{"student": list(pair.student), "teacher": list(pair.teacher)} for pair in pairs]
    return yaml.safe_dump({"pairs": tree}, sort_keys=False, default_flow_style=None, width=1000)


def _pairs(
    source: Literal["auto", "family"], student: nn.Module, teacher: nn.Module, image: Tensor
) -> tuple[Pair, ...]:
    try:
        return resolve_pairs(source, student, teacher, image)
    except DistillError:
        return ()


def _verdict(shapes: PairShapes) -> str:
    ours, theirs = _pooled(shapes.student_sizes), _pooled(shapes.teacher_sizes)
    words = []
    if ours == theirs:
        words += [f"pooled to {ours}"] if ours else []
    else:
        both = (("student", ours), ("teacher", theirs))
        words += [f"{role} pooled to {size}" for role, size in both if size]
    needs = dict.fromkeys(
        f"{have} -> {want}"
        for have, want in zip(shapes.student, shapes.teacher, strict=True)
        if have != want
    )
    words += [f"needs fsp.projection ({', '.join(needs)})"] if needs else []
    return ", ".join(words) or "fits"


def _pooled(sizes: tuple[tuple[int, ...], tuple[int, ...]]) -> str:
    """The size that a pair's larger map is pooled to; nothing where the maps are of one size."""
    return "" if sizes[0] == sizes[1] else _times(map(min, *sizes))


def _note(entry: ModuleRun) -> str:
    if not entry.calls:
        return "did not run"
    if entry.calls > 1:
        return f"runs {_TIMES.get(entry.calls, f'{entry.calls} times')}"
    if entry.overwritten:
        return "overwritten in place"
    if entry.output is not None:
        return ""
    within = [f"{keys} is {_times(x.shape[1:])}" for keys, x in tensors_in(entry.other)]
    return "; ".join([type(entry.other).__name__, *within[:_SHOWN]])


def _modules(model: nn.Module, image: Tensor, role: str) -> Table:
    table = Table(
        title=f"{role.capitalize()}: {type(model).__name__} on {_times(image.shape[1:])}",
        title_justify="left",
        box=box.SIMPLE_HEAD,
    )
    table.add_column("module", overflow="fold")
    table.add_column("type", overflow="fold")
    table.add_column("output", no_wrap=True)
    table.add_column("stage", no_wrap=True)
    table.add_column("note", max_width=36)
    for row in module_table(model, image, role):
        table.add_row(*row, style="bold" if row.stage else "")
    return table


def _pair_listing(rows: Sequence[PairRow]) -> Table:
    table = Table(title="Pairs", title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("from", no_wrap=True)
    table.add_column("student", overflow="fold")
    table.add_column("teacher", overflow="fold")
    table.add_column("verdict")
    for row in rows:
        shapes = row.shapes
        table.add_row(
            row.source,
            _two_maps(row.pair.student, shapes.student, shapes.student_sizes),
            _two_maps(row.pair.teacher, shapes.teacher, shapes.teacher_sizes),
            row.verdict,
        )
    return table


def _two_maps(
    paths: tuple[str, str],
    channels: tuple[int, int],
    sizes: tuple[tuple[int, ...], tuple[int, ...]],
) -> str:
    maps = zip(paths, channels, sizes, strict=True)
    return "\n".join(f"{path} {_times((count, *size))}" for path, count, size in maps)


def _times(sizes: Iterable[int]) -> str:
    return "x".join(map(str, sizes))
