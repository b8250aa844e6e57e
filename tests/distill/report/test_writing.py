"""The report's files."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from distill.report.made_up import comparison_of, keep, keep_matrices, run_of
from fsp_kernels.distill.errors import DistillError
from fsp_kernels.distill.report import Report, write_report
from fsp_kernels.distill.study import Study

COMMAND = "fsp-distill compare '<b>' && echo"


class Page(HTMLParser):
    """The tags, images, cells and text of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href")]

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture
def study(tmp_path: Path) -> Path:
    """A made-up one, of a name that Markdown and HTML could trip over."""
    folder = tmp_path / "_<i>&amp;_*|*"
    comparison_of(folder, {"teacher": [0.97], "baseline-long": [0.9, 0.92]})
    for seed in (0, 1):
        keep_matrices(keep(run_of("two-stage", seed), folder), teacher=1.0, before=0.0, after=1.0)
    return folder


@pytest.fixture
def report(study: Path, tmp_path: Path) -> Report:
    return write_report([study], tmp_path / "report", COMMAND)


def test_all_files_are_there(report: Report) -> None:
    folder = report.path.parent
    assert sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()) == [
        "curves.csv",
        "figures/accuracy.png",
        "figures/fsp-matrices.png",
        "figures/losses.png",
        "metrics.json",
        "report.html",
        "report.md",
        "runs.csv",
    ]


def test_every_figure_of_the_page_is_a_picture_beside_it(report: Report) -> None:
    paths = re.findall(r"^!\[.+\]\((.+)\)$", report.path.read_text(), re.M)
    assert len(paths) == 3
    for path in paths:
        assert (report.path.parent / path).read_bytes().startswith(b"\x89PNG")


def test_the_page_holds_headline_tables_method_recipe_and_environment(report: Report) -> None:
    page = report.path.read_text()
    order = [
        "**With 260 optimiser steps each",
        "| FSP in two stages | cifar/resnet8 |",
        "points over *baseline, same total steps*",
        "## What was done",
        "## Figures",
        "(FSP in two stages, seed 0), averaged over the test images",
        "## How to run it again",
        f"```\n{COMMAND}\n```",
        "name: made-up",
        "| device | cpu |",
    ]
    places = [page.index(said) for said in order]
    assert places == sorted(places)


def test_several_headlines_are_a_list(study: Path, tmp_path: Path) -> None:
    keep(run_of("baseline"), tmp_path / "b")
    page = write_report([study, tmp_path / "b"], tmp_path / "report", COMMAND).path.read_text()
    assert "- **b: test accuracy: baseline, stage 2's steps 90.0 %**\n" in page


def test_a_warning_is_below_the_table(tmp_path: Path) -> None:
    for seed in (0, 1):
        keep(run_of(seed=seed), tmp_path / "study")
    odd = {**run_of().config, "kd": {"weight": 0.5}}
    keep(run_of(seed=2, recipe=odd), tmp_path / "study")
    assert "\n\n- **Careful:** baseline" in (
        write_report([tmp_path / "study"], tmp_path, COMMAND).path.read_text()
    )


def test_the_html_needs_no_other_file(report: Report) -> None:
    page = Page(report.path.with_suffix(".html").read_text())
    assert len(page.links) == 3
    assert all(link.startswith("data:image/png;base64,") for link in page.links)
    assert not {"script", "link", "iframe"} & set(page.tags)
    assert "url(" not in report.path.with_suffix(".html").read_text()


def test_the_html_shows_names_and_command_as_they_are(report: Report) -> None:
    page = Page(report.path.with_suffix(".html").read_text())
    assert "_<i>&amp;_*|*" in page.text
    assert COMMAND in page.text
    assert not {"i", "b"} & set(page.tags)


def test_the_html_has_the_tables_of_the_page(report: Report) -> None:
    html = report.path.with_suffix(".html").read_text()
    assert html.count("<table>") == 3
    assert re.search(r"<td>FSP in two stages</td>\s*<td>cifar/resnet8</td>", html)


def test_a_study_without_fsp_has_no_matrices_to_show(report: Report, tmp_path: Path) -> None:
    # Into the same folder: nothing may stay that the new report does not speak of.
    comparison_of(tmp_path / "kd", {"kd": [0.9]})
    write_report([tmp_path / "kd"], report.path.parent, COMMAND)
    assert "fsp-matrices" not in report.path.read_text()
    assert not (report.path.parent / "figures" / "fsp-matrices.png").exists()


def test_a_lone_teacher_has_a_report_without_figures(tmp_path: Path) -> None:
    comparison_of(tmp_path / "study", {"teacher": [0.9]})
    report = write_report([tmp_path / "study"], tmp_path / "report", COMMAND)
    assert "## Figures" not in report.path.read_text()
    assert "**test accuracy: teacher 90.0 %**" in report.path.read_text()
    assert not list((tmp_path / "report").rglob("*.png"))


def test_a_report_that_cannot_be_written_is_an_error(study: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(DistillError, match="file: is not a folder"):
        write_report([study], tmp_path / "file", COMMAND)
    assert (tmp_path / "file").read_text() == "mine"


def test_a_real_study_has_a_report(studied: Study, tmp_path: Path) -> None:
    report = write_report([studied.folder], tmp_path, COMMAND)
    page = report.path.read_text()
    [run] = report.comparison.teachers[0].runs
    cells = f"| teacher | cifar/resnet14 | {run.parameters:,} | 1 | {100 * run.accuracy:.1f} % |"
    assert cells in page
    assert "FSP matrices: `stage1.0.relu1` to `stage1`; `stage3.0.conv2:input` to `st" in page
    assert page.count("figures/") == 3
