"""``python -m benchmarks report`` from paths to files and an exit status."""

from __future__ import annotations

from pathlib import Path

import made_up
import pytest

from benchmarks.report import draw, main, plain
from benchmarks.report.runs import load

LOSS = made_up.part(
    "loss",
    [
        made_up.loss("segmentation", "ours (torch)", 1.0),
        made_up.loss("segmentation", "einsum", 3.0),
    ],
)
ACCURACY = made_up.part(
    "accuracy", [made_up.erring(0.1, "einsum", 1e-6)], command="python -m benchmarks accuracy"
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return made_up.write(tmp_path / "run", LOSS, ACCURACY)


def test_one_run_is_written_beside_its_files(folder: Path) -> None:
    assert main([str(folder)]) == 0
    written = {path.name for path in folder.iterdir()} - {"loss.json", "accuracy.json"}
    assert written == {"report.md", "speedup.png", "roofline.png", "accuracy.png"}


def test_one_run_is_written_where_asked(folder: Path, tmp_path: Path) -> None:
    assert main([str(folder / "loss.json"), "--output", str(tmp_path / "there")]) == 0
    assert (tmp_path / "there" / "report.md").exists()
    assert not (folder / "report.md").exists()


def test_one_run_is_printed(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main([str(folder)])
    printed = capsys.readouterr().out
    assert "fp32, nchw, forward + backward" in printed
    assert "fp32, 8 @ 7 x 7, error of the gradient" in printed


def test_draw_tells_what_it_wrote(folder: Path) -> None:
    names = [path.name for path in draw(folder)]
    assert names == ["report.md", "speedup.png", "roofline.png", "accuracy.png"]


def test_the_report_links_no_figure_that_was_not_drawn(tmp_path: Path) -> None:
    alone = made_up.part("loss", [made_up.loss("segmentation", "einsum", 3.0)])
    assert "speedup.png" not in [path.name for path in draw(made_up.write(tmp_path, alone))]
    assert "speedup.png" not in (tmp_path / "report.md").read_text()


def test_the_report_links_the_figures_that_were_drawn(folder: Path) -> None:
    draw(folder)
    text = (folder / "report.md").read_text()
    assert "](speedup.png)" in text
    assert "](scaling.png)" not in text


def test_the_report_tells_facts_that_parts_share_once(folder: Path) -> None:
    draw(folder)
    text = (folder / "report.md").read_text()
    assert text.count("- cpu: some cpu") == 1
    assert text.count("- commit: abc") == 1
    assert "Of the part *accuracy*:\n\n- command: `python -m benchmarks accuracy`" in text


def test_the_report_tells_what_differs_part_by_part(tmp_path: Path) -> None:
    other = ACCURACY | {"commit_info": {"id": "def", "dirty": True}}
    draw(made_up.write(tmp_path, LOSS, other))
    text = (tmp_path / "report.md").read_text()
    assert "- commit: abc\n" in text
    assert "- commit: def with uncommitted changes" in text


def test_plain_takes_a_folder_or_a_run_and_some_parts(folder: Path) -> None:
    assert plain(folder) == plain(load(folder))
    assert "segmentation" not in plain(folder, ["accuracy"])
    assert "error of the gradient" in plain(folder, ["accuracy"])


def slower(tmp_path: Path) -> Path:
    results = [
        made_up.loss("segmentation", "ours (torch)", 2.0),
        made_up.loss("segmentation", "einsum", 3.0),
    ]
    return made_up.write(tmp_path / "slower", made_up.part("loss", results))


def test_a_regression_is_an_exit_status(folder: Path, tmp_path: Path) -> None:
    assert main([str(folder), str(slower(tmp_path))]) == 1
    assert main([str(slower(tmp_path)), str(folder)]) == 0


def test_a_comparison_writes_nothing_unasked(folder: Path, tmp_path: Path) -> None:
    main([str(folder), str(slower(tmp_path))])
    assert {path.name for path in folder.iterdir()} == {"loss.json", "accuracy.json"}


def test_a_comparison_is_written_where_asked(folder: Path, tmp_path: Path) -> None:
    main([str(folder), str(slower(tmp_path)), "--output", str(tmp_path / "there")])
    text = (tmp_path / "there" / "comparison.md").read_text()
    assert "REGRESSION" in text
    assert "](comparison.png)" in text
    assert (tmp_path / "there" / "comparison.png").read_bytes().startswith(b"\x89PNG")


def test_a_terminal_is_spared_the_peers(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main([str(folder), str(slower(tmp_path)), "--output", str(tmp_path)])
    assert "einsum" not in capsys.readouterr().out
    assert "einsum" in (tmp_path / "comparison.md").read_text()


def test_every_further_run_is_held_against_the_first(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(folder), str(folder), str(slower(tmp_path))]) == 1
    printed = capsys.readouterr().out
    assert printed.index("No regression") < printed.index("Slower: 1")


def test_an_unreadable_path_is_told_without_a_traceback(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(tmp_path / "nowhere")]) == 2
    assert "no such file or folder" in capsys.readouterr().err
