"""``report.md``: what a stranger is told."""

from __future__ import annotations

import dataclasses
import platform
import re
from pathlib import Path

import pytest

from fsp_kernels.distill.compare import Comparison
from fsp_kernels.distill.report import headline, write_report


@pytest.fixture(scope="module")
def report(compared: tuple[Comparison, Path]) -> str:
    comparison, folder = compared
    return write_report(comparison, folder, "fsp-distill compare tiny.yaml").read_text()


def percent(text: float) -> str:
    return f"{100 * text:.1f}"


def test_the_headline_quotes_distilled_and_both_baselines(
    compared: tuple[Comparison, Path],
) -> None:
    comparison, _ = compared
    text = headline(comparison)
    for arm in ("distilled", "baseline", "baseline-long"):
        runs = comparison.of(arm)
        assert percent((runs[0].accuracy + runs[1].accuracy) / 2) in text
    assert "validation images" in text


def test_the_table_has_a_row_for_each_network(report: str) -> None:
    rows = [line for line in report.splitlines() if line.startswith("| ")]
    names = [row.split("|")[1].strip() for row in rows[2:6]]
    assert names == [
        "Teacher (ResNet-14)",
        "ResNet-8, baseline, same task steps",
        "ResNet-8, baseline, same total steps",
        "ResNet-8, distilled",
    ]
    cells = [cell.strip() for cell in rows[5].split("|")]
    assert cells[2] == "75,002"
    assert cells[5] == "8 + 6"
    assert "never" in cells  # 100 %


def test_every_embedded_figure_is_there(report: str, compared: tuple[Comparison, Path]) -> None:
    paths = re.findall(r"!\[.+\]\((.+)\)", report)
    assert len(paths) == 3
    for path in paths:
        assert (compared[1] / path).read_bytes().startswith(b"\x89PNG")


def test_the_differences_are_told_whichever_way_they_fall(report: str) -> None:
    lines = [line for line in report.splitlines() if line.startswith("- Distilled less")]
    assert len(lines) == 2
    assert all(re.search(r"[+-]\d+\.\d points .* better with \d of 2 seeds", x) for x in lines)


def test_images_only_the_teacher_saw_are_admitted(
    report: str, compared: tuple[Comparison, Path], tmp_path: Path
) -> None:
    assert "The teacher was trained on 60, these among them" in report
    comparison, _ = compared
    data = dataclasses.replace(comparison.config.data, teacher_images=40)
    same = dataclasses.replace(comparison.config, data=data)
    other = write_report(dataclasses.replace(comparison, config=same), tmp_path, "x").read_text()
    assert "The teacher was trained on the same images." in other


def test_command_recipe_and_environment_are_quoted_without_the_host(report: str) -> None:
    assert "fsp-distill compare tiny.yaml" in report
    assert "learning_rate: 0.0001" in report
    assert f"| python | {platform.python_version()} |" in report
    assert not platform.node() or f" {platform.node()} " not in report
