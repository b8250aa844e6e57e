"""``report.md`` and what a terminal shows: every part's sections, and what made the numbers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from benchmarks.report import accuracy, loss, plan, scaling, step
from benchmarks.report.figures import FIGURES
from benchmarks.report.layout import Section
from benchmarks.report.runs import Part, Run

SECTIONS = {
    "loss": loss.sections,
    "step": step.sections,
    "scaling": scaling.sections,
    "plan": plan.sections,
    "accuracy": accuracy.sections,
}
INTRODUCTION = (
    "Drawn from the JSON files beside it by `python -m benchmarks report`. Compare numbers within "
    "one table: all of its contenders ran turn by turn, so a busy machine slows them all, though "
    "not all alike. Of two runs, compare with `python -m benchmarks report BASELINE NEW`."
)


def sections(part: Part) -> list[Section]:
    """All there is to say of a part."""
    return SECTIONS[part.name](part)


def facts(part: Part) -> dict[str, Any]:
    """What a reader needs to judge the numbers of a part."""
    state = " with uncommitted changes" if part.commit["dirty"] else ""
    made = {"command": f"`{part.command}`", "commit": part.commit["id"] + state}
    return made | {"measured": part.date} | dict(part.machine)


def bullets(found: dict[str, Any]) -> str:
    return "\n".join(f"- {name.replace('_', ' ')}: {value}" for name, value in found.items())


def provenance(parts: Sequence[Part]) -> str:
    """Facts that all parts share once, the others part by part."""
    of = {part.name: facts(part) for part in parts}
    first = of[parts[0].name]
    shared = {
        name: value
        for name, value in first.items()
        if all(name in other and other[name] == value for other in of.values())
    }
    blocks = [bullets(shared)] if shared else []
    for name, found in of.items():
        own = {key: value for key, value in found.items() if key not in shared}
        if own:
            blocks += [f"Of the part *{name}*:", bullets(own)]
    return "\n\n".join(blocks)


def markdown(run: Run, figures: Iterable[str]) -> str:
    """The whole of ``report.md``, with links to the figures that were drawn."""
    parts = list(run.parts.values())
    blocks = [f"# Benchmarks on {parts[0].device_name}", INTRODUCTION, provenance(parts)]
    for part in parts:
        first, *rest = (section.markdown() for section in sections(part))
        drawn = [name for name in FIGURES if name in figures and FIGURES[name][0] == part.name]
        blocks += [first, *(f"![{FIGURES[name][2]}]({name})" for name in drawn), *rest]
    return "\n\n".join(blocks) + "\n"


def terminal(run: Run, parts: Sequence[str] | None = None) -> str:
    """What fits on a screen, of some parts or all."""
    chosen = [part for name, part in run.parts.items() if parts is None or name in parts]
    return "\n\n\n".join(
        section.plain() for part in chosen for section in sections(part) if section.in_terminal
    )
