"""Loops in machine code: whose they are, and what a step is made of."""

from __future__ import annotations

import ast
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Container, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import triton

DISASSEMBLER = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
SOURCES = Path(__file__).parents[1] / "fsp_kernels" / "backends" / "triton"
WAITING = 12  # instructions of a loop that only waits for a copy or a product, at most


class Instruction(NamedTuple):
    name: str
    frames: tuple[tuple[str, int], ...]  # file and line, innermost first
    target: int | None  # the instruction it branches to


class Loop(NamedTuple):
    """A loop of machine code; counts are of one warp and one step, without loops inside it."""

    function: str  # of our sources, that it is in
    first: int  # instructions, by number
    last: int
    counts: Counter[str]


def disassembled(cubin: bytes) -> dict[str, list[Instruction]]:
    """The instructions of each kernel, by its name."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(DISASSEMBLER), "-c", "--print-line-info-inline", file.name]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    _, *parts = re.split(r"^\.text\.(\S+):$", text, flags=re.MULTILINE)
    return {parts[i]: instructions_of(parts[i + 1]) for i in range(0, len(parts), 2)}


def instructions_of(text: str) -> list[Instruction]:
    found: list[tuple[str, tuple[tuple[str, int], ...], str | None]] = []
    labels: dict[str | None, int] = {}
    frames: list[tuple[str, int]] = []
    opened = False  # whether the frames are still being told
    for line in text.splitlines():
        if place := re.search(r'//## File "([^"]*)", line (\d+)', line):
            frames = frames if opened else []
            frames.append((Path(place[1]).name, int(place[2])))
            opened = True
        elif code := re.search(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)(.*);", line):
            target = re.search(r"\((\.L_\w+)\)", code[2]) if code[1].startswith("BRA") else None
            found.append((code[1], tuple(frames), target and target[1]))
            opened = False
        elif label := re.match(r"(\.L_\w+):", line):
            labels[label[1]] = len(found)
    return [Instruction(name, places, labels.get(target)) for name, places, target in found]


@lru_cache
def _functions(file: str) -> list[tuple[int, int, str]]:
    """First line, last line and name of each function of a file of Triton's backend."""
    source = SOURCES / file
    nodes = ast.walk(ast.parse(source.read_text())) if source.is_file() else ()
    return [(n.lineno, n.end_lineno or 0, n.name) for n in nodes if isinstance(n, ast.FunctionDef)]


def functions_of(frames: Sequence[tuple[str, int]]) -> list[str]:
    """The functions of Triton's backend that an instruction is in, innermost first."""
    return [
        f"{Path(file).stem}.{name}"
        for file, line in frames
        for first, last, name in _functions(file)
        if first <= line <= last
    ]


def function_among(known: Container[str]) -> Callable[[Sequence[Instruction]], str]:
    """Names a loop of Triton's after the known function that most of it is in, or its kernel.

    Triton 3.6 tells only the innermost function of an instruction, which is seldom a known one.
    """

    def name(code: Sequence[Instruction]) -> str:
        around = [functions_of(x.frames) or ["?"] for x in code]
        inside = [f for each in around if (f := next((f for f in each if f in known), None))]
        counts = Counter(inside or [each[-1] for each in around])
        return counts.most_common(1)[0][0]

    return name


def line_of_branch(code: Sequence[Instruction]) -> str:
    """Names a loop of csrc/ after the line that closes it."""
    return ":".join(map(str, code[-1].frames[0])) if code[-1].frames else "?"


def loops_of(
    code: Sequence[Instruction], name: Callable[[Sequence[Instruction]], str]
) -> tuple[list[Loop], Counter[str]]:
    """All loops, and the counts of what is in none.

    The latter has the loops that the compiler unrolled.
    """
    spans = {
        (x.target, i) for i, x in enumerate(code) if x.target is not None and x.target < i - WAITING
    }
    found = []
    for first, last in sorted(spans):
        inner = [s for s in spans if first <= s[0] and s[1] <= last and s != (first, last)]
        own = [code[i] for i in range(first, last + 1) if not any(a <= i <= b for a, b in inner)]
        counts = Counter(kind for x in own for kind in _kinds(x.name))
        found.append(Loop(name(own), first, last, counts))
    inside = {i for first, last in spans for i in range(first, last + 1)}
    outside = Counter(k for i, x in enumerate(code) if i not in inside for k in _kinds(x.name))
    # Copies before a loop are those of its first steps.
    kept = {k: n for k, n in outside.items() if not (found and k.startswith("LDGSTS"))}
    return found, Counter(kept)


def _kinds(name: str) -> Iterator[str]:
    """What an instruction counts as: of a load or store, its width in bytes, too."""
    yield "instructions"
    first, *parts = name.split(".")
    if first in ("LDG", "LDGSTS", "STG", "LDS", "STS"):
        widths = {"U16": 2, "S16": 2, "64": 8, "128": 16}
        yield f"{first} {next((widths[x] for x in parts if x in widths), 4)}"
    elif first == "LDSM":
        yield f"LDSM {4 * int(parts[-1]) if parts[-1] in ('2', '4') else 4}"
    elif first == "BAR":
        yield first
    elif first in ("HMMA", "HGMMA"):
        yield name


def product_of(name: str) -> tuple[str, int]:
    """What an instruction of tensor cores multiplies by which unit, and one warp's flops in it."""
    unit, shape, *parts = name.split(".")
    kind = "tf32" if "TF32" in parts else "16"
    if unit == "HGMMA":
        m, n, k = map(int, shape.split("x"))
        return f"HGMMA {kind}", 2 * m * n * k // 4  # of four warps
    return f"HMMA {kind}", 2 * 16 * 8 * int(shape[3:])  # 16816: 16 x 8 x 16
