"""The report's files and words."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import markdown
import pytest
from hypothesis import given
from hypothesis import strategies as st
from made_up_runs import (
    fsp_phase,
    keep,
    keep_matrices,
    recipe,
    results_of,
    run_of,
    task_phase,
)

from fsp_kernels.distill.report import write_report
from fsp_kernels.distill.report.results import gather
from fsp_kernels.distill.report.writing import escaped, headlines, render
from fsp_kernels.distill.study import Study
from fsp_kernels.errors import DistillError

COMMAND = "fsp-distill compare '<b>|*`' && echo\n# no heading"


class Page:
    """The tags, text and table rows (by their first cell) of an HTML page, which is XML, too."""

    def __init__(self, html: str) -> None:
        self.tree = ElementTree.fromstring(html)
        self.tags = {element.tag for element in self.tree.iter()}
        self.text = "".join(self.tree.itertext())
        rows = [["".join(cell.itertext()) for cell in row] for row in self.tree.iter("tr")]
        self.rows = {first: rest for first, *rest in rows}


def page_of(folder: Path) -> Page:
    """The page of the runs in a folder."""
    return Page(render(gather([folder]), COMMAND)[1])


SAME = "with baseline, same total steps (260 steps): "


@pytest.mark.parametrize(
    ("arms", "said"),
    [
        (
            {"baseline": [0.5] * 3, "baseline-long": [0.9, 0.91, 0.92], "kd": [0.9]}
            | {"two-stage": [0.94, 0.95, 0.97], "two-stage-kd": [0.9]},
            "test accuracy 95.3 ± 1.5 % with FSP in two stages (260 steps), 91.0 ± 1.0 % "
            f"{SAME}a gain of 4.3 points (95 % interval +2.9 to +5.8)",
        ),
        (
            {"baseline-long": [0.9, 0.91, 0.92], "two-stage": [0.84, 0.86, 0.86]},
            f"{SAME}a loss of 5.7 points (95 % interval −7.1 to −4.2)",
        ),
        (
            {"baseline-long": [0.9, 0.91, 0.92], "two-stage": [0.91, 0.91, 0.92]},
            "no difference that 3 seeds can tell (+0.3 points, 95 % interval −1.1 to +1.8)",
        ),
        (
            {"baseline-long": [0.9] * 3, "two-stage": [0.9002, 0.9001, 0.90015]},
            "a gain of 0.01 points (95 % interval +0.003 to +0.03)",
        ),
        (
            {"baseline-long": [0.9], "two-stage": [0.95]},
            f"{SAME}+5.0 points, which may be chance: one seed can't tell",
        ),
        (
            {"baseline-long": [0.9, 0.8], "two-stage": [0.95, 0.85]},
            f"{SAME}+5.0 points with each of 2 seeds, too alike for an interval",
        ),
        (
            {"baseline": [0.9], "baseline-long": [0.9], "kd": [0.9], "two-stage-kd": [0.9]},
            "90.0 % with FSP in two stages, soft targets in the second (260 steps), 90.0 % with b",
        ),
        (
            {"two-stage": [0.9], "kd": [0.8]},
            "accuracy 90.0 % with FSP in two stages (260 steps), 80.0 % with soft targets (260 st",
        ),
    ],
)
def test_a_headline_compares_the_method_with_the_baseline_of_as_many_steps(
    tmp_path: Path, arms: dict[str, list[float]], said: str
) -> None:
    [line] = headlines(results_of(tmp_path, arms))
    assert said in line


def test_each_study_has_a_headline(tmp_path: Path) -> None:
    for study, seeds in (("a", 1), ("b", 2)):
        for seed in range(seeds):
            phases = [task_phase(0.1, 0.9, every=30 + 10 * seed)]
            keep(run_of("kd", seed, phases=phases), tmp_path / study)
    assert write_report([tmp_path], tmp_path, COMMAND) == [
        "a: test accuracy 90.0 % with soft targets (30 steps)",
        "b: test accuracy 90.0 ± 0.0 % with soft targets (30 to 40 steps)",
    ]


def test_the_overview_has_a_row_for_each_group(tmp_path: Path) -> None:
    keep(run_of("teacher", recipe=recipe(evaluation={"targets": [0.995]})), tmp_path / "b")
    for seed, (last, ends) in enumerate(((0.4, (6.0, 1.0)), (0.6, (4.0, 2.0)), (0.8, (5.0, 3.0)))):
        losses = ["cross-entropy", "soft targets"]
        phases = [fsp_phase(*ends, every=100 + seed, stopped=seed < 2)]
        phases += [task_phase(0.1, last, losses=losses, seconds=1500.0)]
        keep(run_of("two-stage-kd", seed, phases=phases), tmp_path / "a")
    rows = page_of(tmp_path).rows
    assert rows[""][3:6] == ["test accuracy", "task steps to 50 %", "task steps to 99.5 %"]
    assert rows["a: FSP in two stages, soft targets in the second"] == [
        *("cifar/resnet8", "75,002", "3", "60.0 ± 20.0 %", "10 (2 of 3)", "–"),
        "100 to 102 on FSP loss (2 of 3 runs stopped early), 10 on cross-entropy + soft targets",
        *("5 → 2", "1,502.0"),
    ]
    assert rows["b: teacher"][3:] == ["90.0 %", "60", "–", "60 on cross-entropy", "", "1.0"]


def test_each_difference_has_its_interval_and_verdict(tmp_path: Path) -> None:
    arms = {"baseline": [0.9, 0.91, 0.92], "two-stage": [0.94, 0.95, 0.97], "kd": [0.8, 0.9, 1.0]}
    results_of(tmp_path, arms | {"one-stage": [0.95]})
    rows, over = page_of(tmp_path).rows, "baseline, stage 2's steps"
    assert rows["FSP in two stages"] == [over, "+4.3", "+2.9 to +5.8", "3 of 3", "gain"]
    assert rows["soft targets"] == [over, "−1.0", "−23.4 to +21.4", "1 of 3", "can't be told"]
    assert rows["task + FSP in one stage"] == [over, "+5.0", "none", "1 of 1", "can't be told"]


def test_a_run_by_another_recipe_is_named(tmp_path: Path) -> None:
    for seed in (0, 1):
        keep(run_of("kd", seed, recipe=recipe(seeds=[seed])), tmp_path)
    keep(run_of("kd", 2, recipe=recipe(kd={"weight": 0.5}, pairs="family")), tmp_path)
    text = page_of(tmp_path).text
    assert text.count("Careful:") == 1
    assert "soft targets with seed 2 was trained by another recipe" in text
    assert "differs in pairs, kd." in text


SOURCE = {"data": {"dataset": "mnist5k"}, "training": {"steps": 1, "learning_rate": 0.1}}
TRAINED = {"model": "cifar/resnet14", "weights": "t.pt"}


@pytest.mark.parametrize(
    ("arm", "sections", "said", "unsaid"),
    [
        (
            "kd",
            {"data": {"dataset": "digits", "train_images": 40, "teacher_images": 60}},
            ["student trains on 40 images of digits, augm", "teacher was trained on 60 images"],
            [],
        ),
        ("kd", {"data": {"dataset": "digits", "train_images": 40}}, ["on all training images"], []),
        ("kd", {}, ["teacher was trained on 40 images of digits."], ["among the teacher's"]),
        ("kd", {"source": SOURCE}, ["digits, after all training images of mnist5k, augmen"], []),
        ("kd", {"teacher": TRAINED, "teacher_training": None}, ["teacher came trained."], []),
        ("baseline", {}, ["student trains on 40 images of digits."], ["The teacher"]),
    ],
)
def test_it_is_told_who_trained_on_what(
    tmp_path: Path, arm: str, sections: dict[str, Any], said: list[str], unsaid: list[str]
) -> None:
    keep(run_of(arm, recipe=recipe(**sections)), tmp_path)
    text = page_of(tmp_path).text
    assert all(words in text for words in said)
    assert not any(words in text for words in unsaid)
    more_images = arm == "kd" and "train_images" in sections.get("data", {})
    assert ("images that the baselines never had any part of" in text) == more_images


def test_the_environment_is_all_there_was(tmp_path: Path) -> None:
    for seed, device in enumerate(("cpu", "NVIDIA H100", "cpu")):
        keep(run_of(seed=seed, environment={"torch": "2.11", "device": device}), tmp_path)
    rows = page_of(tmp_path).rows
    assert (rows["torch"], rows["device"]) == (["2.11"], ["cpu, NVIDIA H100"])


HOSTILE = "_<i>&amp;_*|*` [x](y) ~~z~~ $1$\n# <script>"


def test_a_report_shows_names_and_command_as_they_are_in_one_file(tmp_path: Path) -> None:
    odd = recipe(student={"model": "cifar/resnet8", "arguments": {"x": f"```\n{HOSTILE}"}})
    run = run_of("two-stage", recipe=odd, network=HOSTILE, environment={HOSTILE: HOSTILE})
    keep_matrices(keep(run, tmp_path / HOSTILE), teacher=1.0, before=0.0, after=1.0)
    write_report([tmp_path], tmp_path / "report", COMMAND)
    names = {str(p.relative_to(tmp_path / "report")) for p in (tmp_path / "report").rglob("*.*")}
    assert names == {
        *("report.md", "report.html", "metrics.json", "runs.csv", "curves.csv"),
        *("figures/curves.png", "figures/fsp-matrices.png"),
    }
    html = (tmp_path / "report" / "report.html").read_text()
    page, shown = Page(html), HOSTILE.replace("\n", " ")
    assert [page.tree.find(f".//{tag}").text for tag in ("title", "h1")] == [shown, shown]
    assert page.rows["FSP in two stages"][0] == shown
    assert page.rows[shown] == [shown]
    assert COMMAND in page.text
    assert "the student's one to two and the teacher's one to three" in page.text
    assert not {"i", "b", "em", "a", "del", "h4", "script", "link", "iframe"} & page.tags
    sources = [image.get("src", "") for image in page.tree.iter("img")]
    assert [source[:22] for source in sources] == 2 * ["data:image/png;base64,"]
    assert "url(" not in html
    assert "prefers-color-scheme: dark" in html
    assert 'content="width=device-width' in html
    text = (tmp_path / "report" / "report.md").read_text()
    assert "![curves](figures/curves.png)" in text
    assert "    name: made-up\n" in text


@given(st.text(st.characters(exclude_categories=["Cc", "Cn", "Cs"]) | st.just("\n")))
def test_any_name_is_shown_as_it_is(name: str) -> None:
    text = escaped(f"study {name}")
    source = f"# {text}\n\n| {text} | **{text}** |\n| --- | --- |"
    html = markdown.markdown(source, extensions=["tables"])
    heading, table = ElementTree.fromstring(f"<p>{html}</p>")
    shown = " ".join(f"study {name}".split())
    assert heading.text == shown
    assert ["".join(cell.itertext()) for cell in table.iter("th")] == [shown, shown]
    assert {element.tag for element in table.iter()} <= {
        *("table", "thead", "tbody", "tr", "th", "td", "strong")
    }


def test_only_figures_of_an_earlier_report_are_removed(tmp_path: Path) -> None:
    results_of(tmp_path / "kd", {"kd": [0.9]})
    results_of(tmp_path / "teacher", {"teacher": [0.9]})
    figures = tmp_path / "report" / "figures"
    write_report([tmp_path / "kd"], tmp_path / "report", COMMAND)
    (figures / "mine.png").write_bytes(b"")
    assert {path.name for path in figures.iterdir()} == {"curves.png", "mine.png"}
    write_report([tmp_path / "teacher"], tmp_path / "report", COMMAND)
    assert {path.name for path in figures.iterdir()} == {"mine.png"}
    assert "![" not in (tmp_path / "report" / "report.md").read_text()


def test_a_report_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    results_of(tmp_path / "study", {"kd": [0.9]})
    (tmp_path / "file").write_text("mine")
    with pytest.raises(DistillError, match="file: is not a folder"):
        write_report([tmp_path / "study"], tmp_path / "file", COMMAND)
    assert (tmp_path / "file").read_text() == "mine"


def test_programs_read_summaries_runs_gains_and_curves(tmp_path: Path) -> None:
    stopped = [fsp_phase(2.0, 1.0, stopped=True), task_phase(0.1, 0.75)]
    keep(run_of("two-stage", 4, phases=stopped), tmp_path)
    keep(run_of("baseline", 4, 0.2), tmp_path)
    write_report([tmp_path], tmp_path, COMMAND)
    tree = json.loads((tmp_path / "metrics.json").read_text())
    assert tree["groups"][1]["summary"]["steps_to"] == {"0.5": [10, 1]}
    assert tree["groups"][1]["runs"][0]["config"]["stage1"]["steps"] == 200
    assert tree["gains"][0]["mean"] == pytest.approx(0.55)
    runs, curves = (
        list(csv.DictReader((tmp_path / f"{name}.csv").read_text().splitlines()))
        for name in ("runs", "curves")
    )
    assert runs[1] == {
        "study": tmp_path.name,
        "arm": "two-stage",
        "seed": "4",
        "network": "cifar/resnet8",
        "parameters": "75002",
        "stage1_steps": "100",
        "task_steps": "10",
        "stopped": "True",
        "accuracy": "0.75",
        "loss": "0.25",
        "seconds": "3.0",
        "steps_to_0.5": "10",
    }
    assert runs[0]["steps_to_0.5"] == ""
    columns = ("stage", "step", "fsp_loss", "accuracy")
    assert [tuple(row[name] for name in columns) for row in curves[2:]] == [
        ("stage 1", "0", "2.0", ""),
        ("stage 1", "100", "1.0", ""),
        ("task", "0", "", "0.1"),
        ("task", "10", "", "0.75"),
    ]


def test_a_real_study_has_a_report(studied: Study) -> None:
    page = page_of(studied.folder)
    assert "the student's stage3.0.conv2:input to st" in page.text
    assert page.rows["teacher"][0] == "cifar/resnet14"
