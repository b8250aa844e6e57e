"""What a run leaves behind, and reading it back."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from made_up_runs import fsp_phase, run_of, task_phase

from fsp_kernels.distill import records
from fsp_kernels.errors import DistillError


def test_a_run_is_read_as_it_was_written(tmp_path: Path) -> None:
    phases = [fsp_phase(4.0, 1 / 3, stopped=True), task_phase(0.1, 0.7)]
    run = run_of("two-stage", 3, phases=phases)
    records.write(run, tmp_path)
    assert records.read(tmp_path) == run


def test_steps_and_seconds_are_those_of_all_stages() -> None:
    run = run_of(phases=[fsp_phase(2.0, 1.0), task_phase(0.1, 0.5, 0.7)])
    assert [phase.steps for phase in run.phases] == [100, 20]
    assert (run.steps, run.seconds) == (120, 3.0)


def test_accuracy_is_that_of_the_last_step_of_the_task() -> None:
    run = run_of(phases=[fsp_phase(2.0, 1.0), task_phase(0.1, 0.9, 0.7)])
    assert run.task is run.phases[1]
    assert run.accuracy == 0.7


def test_a_stage_knows_its_losses_by_its_figures() -> None:
    both = records.Phase("task", [], [{"step": 0, "accuracy": 0, "fsp_loss": 1}], 0, False)
    found = [(phase.has_task, phase.has_fsp) for phase in (task_phase(0), fsp_phase(0), both)]
    assert found == [(True, False), (False, True), (True, True)]


def test_steps_to_an_accuracy_are_those_of_the_first_evaluation_that_shows_it() -> None:
    run = run_of(phases=[task_phase(0.1, 0.7, 0.6, 0.8, every=5)])
    assert [run.steps_to(target) for target in (0.1, 0.65, 0.7, 0.75, 0.9)] == [0, 5, 5, 15, None]


def test_a_folder_without_a_record_is_not_finished(tmp_path: Path) -> None:
    assert not records.is_finished(tmp_path)
    with pytest.raises(DistillError, match=r"holds no finished run \(run\.json is missing\)"):
        records.read(tmp_path)
    records.write(run_of(), tmp_path)
    assert records.is_finished(tmp_path)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "3", "{}", '{"format": 3}', '{"format": 3, "phases": [{"name": "x"}]}']
)
def test_a_damaged_record_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / records.RECORD).write_text(text)
    with pytest.raises(DistillError, match=r"run\.json: not the record of a run, or damaged"):
        records.read(tmp_path)


def test_a_record_of_unknown_fields_is_refused(tmp_path: Path) -> None:
    records.write(run_of(), tmp_path)
    tree = json.loads((tmp_path / records.RECORD).read_text())
    (tmp_path / records.RECORD).write_text(json.dumps(tree | {"mood": "good"}))
    with pytest.raises(DistillError, match=r"damaged: .*mood"):
        records.read(tmp_path)


def test_a_record_of_another_version_is_refused(tmp_path: Path) -> None:
    records.write(run_of(), tmp_path)
    tree = json.loads((tmp_path / records.RECORD).read_text())
    (tmp_path / records.RECORD).write_text(json.dumps(tree | {"format": 0}))
    with pytest.raises(DistillError, match="was written by another version of this program"):
        records.read(tmp_path)


def test_a_record_that_cannot_be_read_is_an_error(tmp_path: Path) -> None:
    (tmp_path / records.RECORD).mkdir()
    with pytest.raises(DistillError, match=r"run\.json: cannot be read: Is a directory"):
        records.read(tmp_path)


def test_runs_are_found_in_a_folder_and_below_in_order(tmp_path: Path) -> None:
    folders = [tmp_path / "b", tmp_path / "a" / "deep", tmp_path]
    for folder in folders:
        records.write(run_of(), folder)
    assert records.find(tmp_path) == sorted(folders)
    assert records.find(tmp_path / "b") == [tmp_path / "b"]


def test_where_there_are_no_runs_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DistillError, match="holds no finished run"):
        records.find(tmp_path)
    with pytest.raises(DistillError, match="nowhere: is not a folder"):
        records.find(tmp_path / "nowhere")
