"""docs/tutorial.md runs from top to bottom, and prints what the page shows, up to the numbers."""

import contextlib
import io
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

pytest.importorskip("sklearn")

PAGE = (Path(__file__).parents[1] / "docs/tutorial.md").read_text()
# The page says that fewer steps and seeds are faster.
FEWER = {"teacher_steps": 100, "steps": 60, "seeds": 2}
NUMBER = re.compile(r"[+-]?\d+(\.\d+)?(e[+-]\d+)?")


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield  # the page sets one
    torch.set_num_threads(threads)


def blocks() -> list[tuple[str, str]]:
    """Each block of code with the output that is shown after it, or none."""
    found = re.findall(r"^```(\w+)\n(.*?)^```", PAGE, flags=re.DOTALL | re.MULTILINE)
    assert {language for language, _ in found} == {"python", "text"}
    following = [*found[1:], ("", "")]
    return [
        (code, shown if after == "text" else "")
        for (language, code), (after, shown) in zip(found, following, strict=True)
        if language == "python"
    ]


def with_fewer_steps(code: str) -> str:
    for name, number in FEWER.items():
        code = re.sub(rf"^{name} = \d+$", f"{name} = {number}", code, flags=re.MULTILINE)
    return code


def without_numbers(output: str) -> list[str]:
    """Its distinct lines: there are fewer seeds here than on the page."""
    return list(dict.fromkeys(NUMBER.sub("#", output).splitlines()))


@pytest.mark.slow
def test_the_tutorial_runs_and_distillation_brings_the_matrices_closer() -> None:
    names: dict = {}
    for code, shown in blocks():
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(with_fewer_steps(code), "tutorial.md", "exec"), names)
        assert without_numbers(printed.getvalue()) == without_numbers(shown)
    assert {name: names[name] for name in FEWER} == FEWER
    assert len(names["gains"]) == FEWER["seeds"]
    # Ten classes. That many steps are enough to tell learning from luck.
    assert names["accuracy"](names["teacher"], names["test"]) > 60
    assert names["accuracy"](names["student"], names["test"]) > 50
    assert names["losses"][-1] < 0.5 * names["losses"][0]
    theirs, ours, alone = (
        names["matrices"](names[network]) for network in ("teacher", "distilled", "alone")
    )
    assert (ours[-1] - theirs[-1]).norm() < 0.8 * (alone[-1] - theirs[-1]).norm()
