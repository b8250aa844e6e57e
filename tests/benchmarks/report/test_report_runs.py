"""Reading part files, and what is said of a path that holds none."""

from __future__ import annotations

import json
from pathlib import Path

import made_up
import pytest

from benchmarks.report.runs import Part, Unreadable, load, part_of

ONE = [made_up.loss("segmentation", "ours (torch)", 2.0)]


def contest(*results: made_up.Facts, missing: tuple[made_up.Facts, ...] = ()):
    content = made_up.part("loss", list(results), not_measured=list(missing))
    return part_of(content).contests[0]


def test_a_folder_is_a_run_of_all_its_parts_in_their_order(tmp_path: Path) -> None:
    accuracy = made_up.part("accuracy", [made_up.erring(0.1, "einsum", 1e-6)])
    made_up.write(tmp_path, accuracy, made_up.part("loss", ONE))
    (tmp_path / "other.json").write_text("{}")
    assert list(load(tmp_path).parts) == ["loss", "accuracy"]


def test_a_file_is_a_run_of_one_part_whatever_its_name(tmp_path: Path) -> None:
    path = tmp_path / "before.json"
    path.write_text(json.dumps(made_up.part("loss", ONE)))
    assert list(load(path).parts) == ["loss"]


def test_a_path_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(Unreadable, match=r"nowhere: no such file or folder"):
        load(tmp_path / "nowhere")


def test_a_folder_without_parts_says_what_it_should_hold(tmp_path: Path) -> None:
    with pytest.raises(Unreadable, match=r"holds no results: none of loss.json, step.json"):
        load(tmp_path)


@pytest.mark.parametrize("key", ["part", "not_measured", "machine_info"])
def test_a_missing_key_is_named(tmp_path: Path, key: str) -> None:
    content = made_up.part("loss", ONE)
    del content[key]
    path = tmp_path / "loss.json"
    path.write_text(json.dumps(content))
    with pytest.raises(Unreadable, match=f"is not a benchmark result: it has no '{key}'"):
        load(path)


def test_a_missing_fact_of_a_result_is_named() -> None:
    entry = made_up.loss("segmentation", "einsum", 1.0)
    del entry["extra_info"]["floor_flops"]
    with pytest.raises(KeyError, match="floor_flops"):
        part_of(made_up.part("loss", [entry]))


@pytest.mark.parametrize("text", ["no JSON", "[]"])
def test_what_is_no_object_of_json_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "loss.json").write_text(text)
    with pytest.raises(Unreadable, match=r"loss\.json is not a benchmark result"):
        load(tmp_path)


def test_an_unknown_part_is_refused(tmp_path: Path) -> None:
    (tmp_path / "loss.json").write_text(json.dumps(made_up.part("loss", []) | {"part": "speed"}))
    with pytest.raises(Unreadable, match="its part is 'speed', none of loss, step"):
        load(tmp_path)


def test_contenders_are_in_their_order_whatever_that_of_the_run() -> None:
    names = ("bmm", "einsum", "ours (torch)", "ours (triton)")
    found = contest(*(made_up.loss("segmentation", name, 1.0) for name in names))
    assert list(found.results) == ["ours (triton)", "ours (torch)", "einsum", "bmm"]


def test_ratios_say_how_much_faster_ours_is_by_default() -> None:
    times = {"einsum": 6.0, "bmm": 3.0, "ours (torch)": 4.0, "ours (triton)": 2.0}
    found = contest(*(made_up.loss("segmentation", *item) for item in times.items()))
    assert found.ratio("einsum") == pytest.approx(3)
    assert found.ratio("ours (torch)") == pytest.approx(2)
    assert found.ratio("ours (triton)") is None
    assert found.ratio_to_fastest() == pytest.approx(1.5)


def test_without_ours_there_is_no_ratio() -> None:
    found = contest(*(made_up.loss("segmentation", name, 1.0) for name in ("einsum", "bmm")))
    assert found.ratio("bmm") is None
    assert found.ratio_to_fastest() is None


def test_who_was_not_measured_takes_part_with_a_reason() -> None:
    broadcast = made_up.absent(made_up.loss("segmentation", "broadcast", 1.0), "does not fit")
    found = contest(*ONE, missing=(broadcast,))
    assert found.names == ["ours (torch)", "broadcast"]
    assert found.missing["broadcast"].reason == "does not fit"


def hardware(**machine: object) -> Part:
    return part_of(made_up.part("loss", ONE, made_up.CPU | machine))


def test_a_cpu_is_known_by_model_and_cores() -> None:
    assert hardware(torch="1").hardware == hardware(torch="2").hardware
    assert hardware(cores=4).hardware != hardware(cores=2).hardware


def test_a_gpu_is_known_by_its_name() -> None:
    assert hardware(gpu="A", cores=4).hardware == hardware(gpu="A", cores=2).hardware
    assert hardware(gpu="A").hardware != hardware(gpu="B").hardware
    assert hardware(gpu="A").hardware != hardware().hardware
