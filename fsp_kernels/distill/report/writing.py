"""The report's files: for people and for programs."""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import markdown

from fsp_kernels.distill.report import figures, metrics, text
from fsp_kernels.distill.report.comparison import Comparison, gather
from fsp_kernels.distill.storage import check_writable, replacing, write_text

_DRAW = {
    "accuracy": figures.draw_accuracy,
    "losses": figures.draw_losses,
    "fsp-matrices": figures.draw_matrices,
}
_SPACE = 8 << 20
_STYLE = """
body { max-width: 72em; margin: 2em auto; padding: 0 1em; color: #222; background: #fff;
       font: 16px/1.5 system-ui, sans-serif }
table { border-collapse: collapse; display: block; overflow-x: auto; font-size: 92% }
th, td { border: 1px solid #ccc; padding: .3em .6em }
th { background: #f5f5f5 }
td { white-space: nowrap }
img { max-width: 100% }
pre { background: #f5f5f5; padding: 1em; overflow-x: auto; font-size: 87% }
"""


class Report(NamedTuple):
    """``path`` is that of ``report.md``; ``report.html`` is beside it."""

    comparison: Comparison
    path: Path


def write_report(folders: Sequence[Path], output: Path, command: str) -> Report:
    """Write what the runs in ``folders`` say together into ``output``.

    ``report.md`` with ``figures/``, the same in one file as ``report.html``, ``metrics.json``,
    ``runs.csv``, ``curves.csv``; each replaces what had its name.

    Args:
        folders: of runs, or of studies.
        output: made if need be.
        command: the command line to quote.

    Raises:
        DistillError: a folder holds no finished run, or one that is damaged; ``output`` can't be
            written to.
    """
    comparison = gather(folders)
    check_writable(output, _SPACE)
    metrics.write_json(comparison, output / "metrics.json")
    metrics.write_runs_csv(comparison, output / "runs.csv")
    metrics.write_curves_csv(comparison, output / "curves.csv")
    captions = _draw(comparison, output / "figures")
    title = ", ".join(comparison.configs)
    page = _page(comparison, title, captions, command)
    path = output / "report.md"
    write_text(path, page)
    write_text(path.with_suffix(".html"), _as_html(page, title, output))
    return Report(comparison, path)


def _draw(comparison: Comparison, folder: Path) -> dict[str, str]:
    """The figures there are, by name, and what they show."""
    captions = {}
    if comparison.students:
        captions = {
            "accuracy": "Accuracy by steps: mean over seeds, shaded one standard deviation up and "
            "down. A run that a stopping rule ended stays at its last value.",
            "losses": "Cross-entropy and FSP loss by steps, likewise.",
        }
    found = figures.drawn_matrices(comparison)
    if found is not None:
        captions["fsp-matrices"] = text.matrices_caption(comparison, *found)
    for name, draw in _DRAW.items():
        path = folder / f"{name}.png"
        path.unlink(missing_ok=True)
        if name in captions:
            with replacing(path) as unfinished:
                draw(comparison, unfinished)
    return captions


def _page(comparison: Comparison, title: str, captions: dict[str, str], command: str) -> str:
    results = [f"**{text.escaped(line)}**" for line in text.headline(comparison).splitlines()]
    sections = [
        f"# {text.escaped(title)}",
        results[0] if len(results) == 1 else "\n".join(f"- {line}" for line in results),
        text.table(comparison),
        text.warnings(comparison),
        text.differences(comparison),
        "## What was done",
        text.method(comparison),
        *(["## Figures"] if captions else []),
        *(f"![{name}](figures/{name}.png)\n\n{said}" for name, said in captions.items()),
        "## How to run it again",
        f"This report was written by\n\n```\n{command}\n```\n\n"
        "With the recipe below in a file, `fsp-distill study FILE` trains its arms and seeds anew.",
        text.recipes(comparison),
        text.environment(comparison),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _as_html(page: str, title: str, folder: Path) -> str:
    """The page with its figures inside: one file, which needs no other and no network."""
    body = markdown.markdown(page, extensions=["tables", "fenced_code", "sane_lists"])
    for path in sorted((folder / "figures").glob("*.png")):
        data = base64.b64encode(path.read_bytes()).decode()
        body = body.replace(f'src="figures/{path.name}"', f'src="data:image/png;base64,{data}"')
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width">\n'
        f"<title>{html.escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n"
        f"<body>\n{body}\n</body>\n</html>\n"
    )
