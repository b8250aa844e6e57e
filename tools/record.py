"""What compiling every kernel found, kept in a file that is committed.

A test compares the digest in the file with the sources at hand, and compiles a few kernels again.
So whoever changes a kernel has to compile all of them, and a test run has not.

The file is a table in CSV. Its first line names the compiler and the digest of the sources.
"""

from __future__ import annotations

import ast
import csv
import hashlib
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

FOLDER = Path(__file__).parent / "records"


class Record(NamedTuple):
    """A compiler with its version, the digest of what it compiled, and a row for each kernel."""

    compiler: str
    digest: str
    rows: list[list[str]]


def read(path: Path) -> Record:
    with path.open(newline="") as file:
        first = re.fullmatch(r"# (.+), sources (\w+)\n", file.readline())
        if first is None:
            raise ValueError(f"{path}: the first line does not name a compiler and a digest")
        _, *rows = csv.reader(file)
    return Record(first[1], first[2], rows)


def write(path: Path, record: Record, header: Sequence[str]) -> None:
    path.parent.mkdir(exist_ok=True)
    with path.open("w", newline="") as file:
        file.write(f"# {record.compiler}, sources {record.digest}\n")
        csv.writer(file, lineterminator="\n").writerows([header, *record.rows])


def digest_of(files: Iterable[Path]) -> str:
    """Of source files; comments, docstrings and the layout of the text do not change it."""
    digest = hashlib.sha256()
    for path in sorted(files):
        code = _of_python if path.suffix == ".py" else _of_cpp if path.suffix != ".json" else str
        digest.update(f"{path.name}\0{code(path.read_text())}\0".encode())
    return digest.hexdigest()[:16]


def _of_python(source: str) -> str:
    tree = ast.parse(source)
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list) and body and isinstance(body[0], ast.Expr):
            value = body[0].value
            if isinstance(value, ast.Constant) and isinstance(value.value, str):
                del body[0]
    return repr(_plain(tree))


def _plain(node: Any) -> Any:
    """A syntax tree as tuples. Versions of Python differ in the empty fields they have."""
    if isinstance(node, ast.AST):
        fields = ((name, _plain(value)) for name, value in ast.iter_fields(node))
        return (type(node).__name__, *((k, v) for k, v in fields if v not in (None, [])))
    return [_plain(x) for x in node] if isinstance(node, list) else node


def _of_cpp(source: str) -> str:
    text = re.compile(r'"(?:\\.|[^"\\])*"|//[^\n]*|/\*.*?\*/', re.DOTALL)
    return " ".join(text.sub(lambda x: x[0] if x[0][0] == '"' else " ", source).split())
