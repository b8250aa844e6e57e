"""docs/troubleshooting.md has an entry for every message of the library, and no other.

Messages are read from the source: what ``raise`` statements say, and the reasons why a backend does
not work, which functions named ``why...`` return. In an entry, words in capitals stand for what
changes.
"""

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "fsp_kernels"
# The trainer's messages name file, line and key of a recipe. The reference is for tests. errors.py
# has messages that others give it.
ELSEWHERE = {"reference.py", "errors.py"}
FILES = {
    str(path.relative_to(PACKAGE)): path.read_text()
    for path in sorted(PACKAGE.rglob("*.py"))
    if "distill" not in path.relative_to(PACKAGE).parts and path.name not in ELSEWHERE
}
ENTRIES = re.findall(
    r"^\| `([^`]+)` \|", (ROOT / "docs/troubleshooting.md").read_text(), flags=re.MULTILINE
)
# Whoever sees one of these has found a fault of the library, not one of the call.
INTERNAL = {"AssertionError", "NotImplementedError"}
CHANGING = ["", ""]


@cache
def constants() -> dict[str, ast.expr]:
    """The strings that modules bind to names in capitals."""
    return {
        target.id: node.value
        for source in FILES.values()
        for node in ast.parse(source).body
        if isinstance(node, ast.Assign) and isinstance(node.value, (ast.Constant, ast.JoinedStr))
        for target in node.targets
        if isinstance(target, ast.Name) and target.id.lstrip("_").isupper()
    }


def fixed_words(text: ast.expr) -> list[str]:
    """What is between the changing parts of a message: of ``f"{x}: got {y}"``, three strings."""
    if isinstance(text, ast.Name) and text.id in constants():
        return fixed_words(constants()[text.id])
    if isinstance(text, ast.Constant):
        return [str(text.value)]
    if isinstance(text, ast.FormattedValue):
        return fixed_words(text.value) if isinstance(text.value, ast.Name) else CHANGING
    if isinstance(text, (ast.JoinedStr, ast.BinOp)):
        values = text.values if isinstance(text, ast.JoinedStr) else [text.left, text.right]
        parts = [""]
        for value in values:
            first, *more = fixed_words(value)
            parts = [*parts[:-1], parts[-1] + first, *more]
        return parts
    return CHANGING


def texts(value: ast.expr | None) -> Iterator[ast.expr]:
    """The strings that an expression may be."""
    if isinstance(value, (ast.IfExp, ast.BoolOp)):
        for each in [value.body, value.orelse] if isinstance(value, ast.IfExp) else value.values:
            yield from texts(each)
    elif isinstance(value, ast.JoinedStr) or (
        isinstance(value, ast.Constant) and isinstance(value.value, str)
    ):
        yield value


def messages(source: str) -> set[tuple[str, ...]]:
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
            if ast.unparse(node.exc.func) not in INTERNAL:
                found.append(node.exc.args[0])
        elif isinstance(node, ast.FunctionDef) and re.search("why|compiled_module", node.name):
            returns = [x for x in ast.walk(node) if isinstance(x, ast.Return)]
            found += [text for x in returns for text in texts(x.value)]
    return {tuple(fixed_words(text)) for text in found}


def matches(words: tuple[str, ...], entry: str) -> bool:
    # What changes may be empty: a hint that is given in some cases only.
    return bool(re.fullmatch("[A-Z]*".join(map(re.escape, words)), entry))


@pytest.mark.parametrize("file", [name for name in FILES if messages(FILES[name])])
def test_every_message_has_an_entry(file: str) -> None:
    without = [
        "…".join(words)
        for words in messages(FILES[file])
        if not any(matches(words, entry) for entry in ENTRIES)
    ]
    assert not without


def test_every_entry_is_a_message() -> None:
    known = {words for source in FILES.values() for words in messages(source)}
    assert [x for x in ENTRIES if not any(matches(words, x) for words in known)] == []


def test_no_message_is_made_of_changing_words_alone() -> None:
    # Its entry would match any other message.
    known = {words for source in FILES.values() for words in messages(source)}
    assert all(re.search("[a-z]{2}", "".join(words)) for words in known)
