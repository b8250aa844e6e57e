"""The report's files, written from the templates beside this module."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import markdown
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from fsp_kernels.distill.config import Config, dump_config
from fsp_kernels.distill.records import Run
from fsp_kernels.distill.report.figures import FIGURES, draw
from fsp_kernels.distill.report.results import TITLES, Group, Results, gather
from fsp_kernels.distill.settings import read
from fsp_kernels.distill.storage import check_writable, replacing, write_text

# A headline is about the first of these arms that a study has.
_HEADLINED = ("two-stage", "two-stage-kd", "one-stage", "one-stage-kd", "kd", "baseline-long")
_SPACE = 8 << 20  # bytes


def write_report(folders: Sequence[Path], output: Path, command: str) -> list[str]:
    """Write one report of the runs and studies in ``folders`` into the folder ``output``.

    ``report.md`` with ``figures/``, the same in one file as ``report.html``, ``metrics.json``,
    ``runs.csv``, ``curves.csv``; each replaces what had its name. ``command`` is the command line
    to quote.

    Returns:
        The headline of each study, in plain text.

    Raises:
        DistillError: a folder holds no finished run, or one that is damaged; ``output`` can't be
            written to.
    """
    results = gather(folders)
    check_writable(output, _SPACE)
    write_text(output / "metrics.json", json.dumps(_metrics(results), indent=1) + "\n")
    write_text(output / "runs.csv", results.runs.to_csv(index=False, lineterminator="\n"))
    write_text(output / "curves.csv", results.curves.to_csv(index=False, lineterminator="\n"))
    figures = draw(results)
    for name in FIGURES:
        path = output / "figures" / f"{name}.png"
        path.unlink(missing_ok=True)  # of an earlier report, which may have had others
        if name in figures:
            with replacing(path) as unfinished:
                figures[name].savefig(unfinished, dpi=130, format="png")
    page, html = render(results, command, list(figures))
    for name in figures:
        data = base64.b64encode((output / "figures" / f"{name}.png").read_bytes()).decode()
        html = html.replace(f'src="figures/{name}.png"', f'src="data:image/png;base64,{data}"')
    write_text(output / "report.md", page)
    write_text(output / "report.html", html)
    return headlines(results)


def render(results: Results, command: str, figures: Sequence[str] = ()) -> tuple[str, str]:
    """The page with the ``figures`` of those names, in Markdown and in HTML."""
    facts = {"results": results, "command": command, "figures": figures}
    page = _TEMPLATES.get_template("report.md.jinja").render(facts)
    body = Markup(markdown.markdown(page, extensions=["tables"]))
    return page, _TEMPLATES.get_template("report.html.jinja").render(facts, body=body)


def headlines(results: Results) -> list[str]:
    """The result of each study in plain text, whichever way it came out.

    It compares the paper's method, or else another arm, with the baseline of as many steps, or
    else the shorter one. Without a baseline it lists accuracies.
    """
    lines = []
    for study, config in results.configs.items():
        gains = [gain for gain in results.gains if gain["study"] == study]
        gains.sort(key=lambda gain: (gain["baseline"] == "baseline", _HEADLINED.index(gain["arm"])))
        groups = {group.arm: group for group in results.groups if group.study == study}
        arms = [gains[0]["arm"], gains[0]["baseline"]] if gains else groups
        parts = [
            f"{_accuracy(results.summaries[study, arm])} with {TITLES[arm]} "
            f"({_span([run.steps for run in groups[arm].runs])} steps)"
            for arm in arms
        ]
        name = f"{study}: " if len(results.configs) > 1 else ""
        verdict = f": {_verdict(gains[0])}" if gains else ""
        lines.append(f"{name}{config.evaluation.split} accuracy {', '.join(parts)}{verdict}")
    return lines


def _verdict(gain: Mapping[str, Any]) -> str:
    mean, seeds = f"{_points(gain['mean'])} points", len(gain["each"])
    if seeds == 1:
        return f"{mean}, which may be chance: one seed can't tell"
    if gain["low"] is None:
        return f"{mean} with each of {seeds} seeds, too alike for an interval"
    interval = f"95 % interval {_points(gain['low'])} to {_points(gain['high'])}"
    if gain["verdict"] == "neither":
        return f"no difference that {seeds} seeds can tell ({mean}, {interval})"
    return f"a {gain['verdict']} of {_points(abs(gain['mean'])).lstrip('+')} points ({interval})"


def _metrics(results: Results) -> dict[str, Any]:
    """Everything, for programs."""
    groups = [
        {
            "study": group.study,
            "arm": group.arm,
            "title": group.title,
            "summary": results.summaries[group.study, group.arm],
            "runs": [asdict(run) for run in group.runs],
        }
        for group in results.groups
    ]
    return {"groups": groups, "gains": results.gains}


def _accuracy(summary: Mapping[str, Any]) -> str:
    spread = "" if summary["spread"] is None else f" ± {100 * summary['spread']:.1f}"
    return f"{100 * summary['accuracy']:.1f}{spread} %"


def _points(share: float) -> str:
    """A difference in points with its sign, and as many digits as show that it is not zero."""
    value = round(100 * share, 6)
    return (f"{value:+.1f}" if abs(value) >= 0.05 else f"{value:+.1g}").replace("-", "−")


def _steps(group: Group) -> str:
    """The steps of each stage with its losses, and how often a stopping rule ended it."""
    stages = []
    for phases in zip(*(run.phases for run in group.runs), strict=True):
        stopped = sum(phase.stopped for phase in phases)
        note = f" ({stopped} of {len(phases)} runs stopped early)" if stopped else ""
        steps = _span([phase.steps for phase in phases])
        stages.append(f"{steps} on {' + '.join(phases[0].losses)}{note}")
    return ", ".join(stages)


def _span(counts: Sequence[int]) -> str:
    least, most = min(counts), max(counts)
    return str(least) if least == most else f"{least} to {most}"


def _differing_keys(run: Run, recipe: Config) -> list[str]:
    """The keys of a run's recipe that differ from ``recipe`` and that a run depends on."""
    own, others = vars(read(Config, run.config)), vars(recipe)
    ignored = ("name", "seeds", "arms", "checkpoints")
    return [key for key in own if key not in ignored and own[key] != others[key]]


def escaped(value: object) -> Markup:
    """``value`` on one line, as Markdown and HTML that show it as it is."""
    if isinstance(value, Markup):
        return value
    # An underscore within a word is no sign of Markdown.
    special = r"[\\`*\[\]|<>&~$#]|(?<![^\W_])_|_(?![^\W_])"
    text = " ".join(str(value).split())
    return Markup(re.sub(special, lambda found: f"&#{ord(found[0])};", text))


_TEMPLATES = Environment(
    loader=PackageLoader("fsp_kernels.distill.report"),
    finalize=escaped,
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
_TEMPLATES.filters |= {"accuracy": _accuracy, "points": _points, "steps": _steps}
_TEMPLATES.globals |= {"headlines": headlines, "titles": TITLES, "yaml": dump_config}
_TEMPLATES.globals |= {"differing_keys": _differing_keys}
