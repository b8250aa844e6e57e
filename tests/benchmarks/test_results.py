"""``results.csv``: written, read again, and rows set beside each other."""

import made_up_results
import pandas as pd
import pytest

from benchmarks import results
from benchmarks.results import Unreadable, growth, read, with_ratios

ONE = [made_up_results.loss("segmentation", "ours (torch)", 2.0)]


def rows_of(tmp_path, *rows):
    return with_ratios(made_up_results.write(tmp_path, "loss", list(rows)).rows)


def test_what_is_written_can_be_read(tmp_path):
    row = made_up_results.on_gpu(ONE[0]) | {"pass": "forward"}
    found = made_up_results.write(tmp_path, "loss", [row], made_up_results.GPU)
    (read_again,) = results.records(found.rows)
    assert {name: read_again[name] for name in row} == row
    assert found.environment["loss"]["commit"] == "abc"
    assert found.device == "NVIDIA Some 1"


def test_whole_numbers_are_written_as_such(tmp_path):
    missing = made_up_results.absent(
        made_up_results.loss("segmentation", "bmm", 1.0), "out of memory"
    )
    for _ in range(2):  # the second time they are read first
        made_up_results.write(tmp_path, "loss", [*ONE, missing])
        made_up_results.write(tmp_path, "plan", [])
    assert f",{3 * made_up_results.MIB}," in (tmp_path / "results.csv").read_text()


def test_a_part_replaces_its_former_rows_and_keeps_the_other_parts(tmp_path):
    made_up_results.write(tmp_path, "accuracy", [made_up_results.erring(0.1, "einsum", 1e-6)])
    made_up_results.write(tmp_path, "loss", 3 * ONE)
    found = made_up_results.write(tmp_path, "loss", ONE, commit="def")
    assert list(found.rows["part"]) == ["loss", "accuracy"]
    assert [facts["commit"] for facts in found.environment.values()] == ["def", "abc"]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("results.csv", None, "it has no results.csv"),
        ("environment.json", None, "it has no environment.json"),
        ("results.csv", "part,workload\n", "it has no column backend"),
        ("results.csv", "", "No columns to parse"),
        ("environment.json", "{", "holds no results"),
    ],
)
def test_missing_and_other_files_are_refused(tmp_path, name, text, message):
    made_up_results.write(tmp_path, "loss", ONE)
    (tmp_path / name).unlink()
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(Unreadable, match=message):
        read(tmp_path)


def test_ratios_are_to_the_first_of_ours(tmp_path):
    times = {"ours (triton)": 2.0, "ours (torch)": 4.0, "einsum": 6.0, "bmm": 3.0}
    rows = rows_of(
        tmp_path, *(made_up_results.loss("segmentation", *item) for item in times.items())
    )
    assert list(rows["is_base"]) == [True, False, False, False]
    assert list(rows["ratio"][1:]) == pytest.approx([2, 3, 1.5])
    assert pd.isna(rows["ratio"][0])


def test_without_ours_there_is_no_ratio(tmp_path):
    failed = made_up_results.absent(
        made_up_results.loss("segmentation", "ours (torch)", 1.0), "wrong", True
    )
    rows = rows_of(tmp_path, failed, made_up_results.loss("segmentation", "bmm", 1.0))
    assert rows["ratio"].isna().all()


def test_cases_are_told_apart(tmp_path):
    cases = [("wide-late-512", "fp32", 2.0), ("wide-late-512", "bf16", 3.0)]
    rows = rows_of(
        tmp_path,
        *(made_up_results.loss(name, "ours (torch)", 1.0, dtype=dtype) for name, dtype, _ in cases),
        *(made_up_results.loss(name, "einsum", time, dtype=dtype) for name, dtype, time in cases),
    )
    assert list(rows["ratio"][2:]) == pytest.approx([2, 3])


@pytest.mark.parametrize(("peaks", "ratio"), [((1, 4), 4.0), ((0, 4), None), ((None, 4), None)])
def test_an_unknown_or_empty_peak_has_no_ratio(tmp_path, peaks, ratio):
    rows = rows_of(
        tmp_path,
        made_up_results.loss("segmentation", "ours (torch)", 1.0, peak_bytes=peaks[0]),
        made_up_results.loss("segmentation", "einsum", 1.0, peak_bytes=peaks[1]),
    )
    assert results.records(rows)[1]["memory_ratio"] == ratio


@pytest.mark.parametrize(("flops", "share", "bound"), [(4e6, 0.5, "bytes"), (8e7, 0.8, "flops")])
def test_the_floor_is_the_longer_of_moving_and_multiplying(tmp_path, flops, share, bound):
    rows = rows_of(
        tmp_path, made_up_results.loss("segmentation", "ours (torch)", 1, floor_flops=flops)
    )
    assert rows["of_floor"][0] == pytest.approx(share)
    assert rows["bound_by"][0] == bound


@pytest.mark.parametrize(
    ("points", "slope"),
    [
        ({1: 5.0, 2: 5.0, 4: 16.0, 8: 64.0}, 2),
        ({2: 3.0, 4: 6.0}, 1),
        ({1: 7.0, 10: 2.0, 100: 20.0, 1000: 2000.0, 10000: 20000.0}, 1.5),
        ({4: 1.0}, None),
        ({}, None),
    ],
)
def test_growth_is_the_slope_of_the_upper_half(points, slope):
    assert growth(points) == (None if slope is None else pytest.approx(slope))
