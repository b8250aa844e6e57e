"""Two runs held against each other."""

from __future__ import annotations

from pathlib import Path

import made_up
import pytest

from benchmarks.report.compare import Comparison, compare
from benchmarks.report.comparison import section
from benchmarks.report.runs import Run, load, part_of

MIB = made_up.MIB


def run(name: str, results: list[made_up.Facts], machine: made_up.Facts = made_up.CPU, **content):
    part = part_of(made_up.part(name, results, machine, **content))
    return Run(Path("somewhere"), {name: part})


def losses(ours: float, einsum: float, spread: float = 0.01, **info: object) -> list[made_up.Facts]:
    return [
        made_up.loss("segmentation", "ours (torch)", ours, spread=spread, **info),
        made_up.loss("segmentation", "einsum", einsum, spread=spread),
    ]


BASELINE = losses(1.0, 3.0)


def against_baseline(new: list[made_up.Facts], machine: made_up.Facts = made_up.CPU) -> Comparison:
    return compare(run("loss", BASELINE), run("loss", new, machine))


def flags(comparison: Comparison) -> dict[str, list[str]]:
    return {change.after.contender: change.flags for change in comparison.changes}


def test_the_same_run_has_not_regressed() -> None:
    assert not against_baseline(BASELINE).regressed


def test_ours_slower_while_peers_are_not_is_a_regression() -> None:
    found = against_baseline(losses(1.2, 3.0))
    assert flags(found) == {"ours (torch)": ["REGRESSION"], "einsum": []}
    assert found.regressed


def test_a_slower_machine_is_no_regression() -> None:
    found = against_baseline(losses(1.5, 4.5))
    assert found.changes[0].ratio == pytest.approx(1.5)
    assert found.changes[0].beyond_drift == pytest.approx(1.0)
    assert not found.regressed


def test_a_faster_machine_does_not_hide_a_regression() -> None:
    found = against_baseline(losses(1.0, 2.0))
    assert found.changes[0].beyond_drift == pytest.approx(1.5)
    assert found.regressed


def test_drift_is_the_geometric_mean_of_the_peers() -> None:
    bmm = made_up.loss("segmentation", "bmm", 2.0)
    twice = made_up.loss("segmentation", "bmm", 8.0)
    found = compare(run("loss", [*BASELINE, bmm]), run("loss", [*BASELINE, twice]))
    assert found.changes[0].drift == pytest.approx(2)  # sqrt(1 * 4)


def test_a_peer_that_is_faster_once_does_not_accuse_ours() -> None:
    others = [
        made_up.loss(name, contender, 2.0)
        for name in ("cifar-resnet", "wide-late-512", "tokens-vit-b")
        for contender in ("ours (torch)", "einsum")
    ]
    found = compare(
        run("loss", [*losses(1.0, 3.0), *others]), run("loss", [*losses(1.02, 2.0), *others])
    )
    assert found.changes[0].drift == pytest.approx((2 / 3) ** (1 / 4))  # of the whole run
    assert found.changes[0].beyond_drift == pytest.approx(1.02 / (2 / 3) ** (1 / 4))


def test_a_change_within_the_spread_is_no_regression() -> None:
    wide = losses(1.0, 3.0, spread=0.1)
    found = compare(run("loss", wide), run("loss", losses(1.15, 3.0, spread=0.1)))
    assert not found.regressed


def test_a_change_of_a_few_percent_is_no_regression() -> None:
    found = compare(
        run("loss", losses(1.0, 3.0, spread=0.001)), run("loss", losses(1.04, 3.0, spread=0.001))
    )
    assert not found.regressed


def test_peers_never_regress() -> None:
    bmm = made_up.loss("segmentation", "bmm", 2.0)
    slow = made_up.loss("segmentation", "bmm", 4.0)
    found = compare(run("loss", [*BASELINE, bmm]), run("loss", [*BASELINE, slow]))
    assert flags(found)["bmm"] == []


@pytest.mark.parametrize(
    ("peak", "expected"),
    [(12 * MIB, ["MORE MEMORY"]), (10.4 * MIB, []), (9 * MIB, [])],
    ids=["grown", "by less than a twentieth", "shrunk"],
)
def test_more_memory_is_flagged(peak: float, expected: list[str]) -> None:
    before = losses(1.0, 3.0, peak_extra_bytes=10 * MIB)
    after = losses(1.0, 3.0, peak_extra_bytes=int(peak))
    found = compare(run("loss", before), run("loss", after))
    assert flags(found)["ours (torch)"] == expected


def test_less_than_half_a_mib_more_is_not_flagged() -> None:
    before = losses(1.0, 3.0, peak_extra_bytes=MIB)
    after = losses(1.0, 3.0, peak_extra_bytes=MIB + MIB // 3)
    assert not compare(run("loss", before), run("loss", after)).regressed


def test_a_contest_without_peers_drifts_as_the_run_did(tmp_path: Path) -> None:
    def both(name: str, slower: float) -> Run:
        plan = made_up.evaluated("4 x 8-8 @ 7", "matrix form", 2.0 * slower, planned=True)
        parts = (
            made_up.part("loss", losses(slower, 3 * slower)),
            made_up.part("plan", [plan]),
        )
        return load(made_up.write(tmp_path / name, *parts))

    found = compare(both("before", 1.0), both("after", 2.0))
    assert found.changes[-1].drift == pytest.approx(2.0)
    assert not found.regressed


@pytest.mark.parametrize("planned", [True, False])
def test_only_the_planned_evaluation_can_regress(planned: bool) -> None:
    before, after = (
        [made_up.evaluated("4 x 8-8 @ 7", "matrix form", time, planned=planned)]
        for time in (1.0, 2.0)
    )
    assert compare(run("plan", before), run("plan", after)).regressed == planned


def test_a_gradient_error_that_doubled_is_a_regression() -> None:
    before, after = (
        [made_up.erring(0.1, name, error) for name in ("ours (torch)", "einsum")]
        for error in (1e-5, 3e-5)
    )
    found = compare(run("accuracy", before), run("accuracy", after))
    assert [(error.contender, error.worse) for error in found.errors] == [
        ("ours (torch)", True),
        ("einsum", False),
    ]
    assert found.regressed


@pytest.mark.parametrize(("before", "after"), [(1e-5, 1.9e-5), (1e-7, 9e-7)])
def test_a_small_or_slightly_larger_error_is_not(before: float, after: float) -> None:
    old, new = ([made_up.erring(0.1, "ours (torch)", error)] for error in (before, after))
    assert not compare(run("accuracy", old), run("accuracy", new)).regressed


def test_ours_that_fails_now_is_a_regression() -> None:
    broken = made_up.absent(BASELINE[0], "ours is wrong", fault=True)
    found = compare(run("loss", BASELINE), run("loss", BASELINE[1:], not_measured=[broken]))
    assert found.lost == [
        "loss, segmentation, fp32, nchw, forward+backward: ours (torch), ours is wrong"
    ]
    assert found.regressed


def test_on_another_device_ours_may_fail() -> None:
    missing = made_up.absent(BASELINE[0], "out of memory")
    new = run("loss", BASELINE[1:], OTHER, not_measured=[missing])
    assert not compare(run("loss", BASELINE), new).regressed


OTHER = made_up.CPU | {"cores": 64}


def test_on_two_devices_nothing_is_flagged() -> None:
    found = against_baseline(losses(9.0, 3.0, peak_extra_bytes=900 * MIB), OTHER)
    assert found.changes[0].ratio == pytest.approx(9)
    assert found.changes[0].beyond_drift is None
    assert not found.regressed
    assert "Two devices: no verdict" in section(found).notes


def test_different_versions_are_told() -> None:
    found = against_baseline(BASELINE, made_up.CPU | {"torch": "2.14"})
    assert found.versions == ["torch 2.13 -> 2.14"]
    assert "Versions differ: torch 2.13 -> 2.14" in section(found).notes


def test_only_what_both_runs_have_is_compared() -> None:
    other = made_up.loss("wide-late-512", "ours (torch)", 1.0)
    found = against_baseline([*BASELINE, other])
    assert [change.key["workload"] for change in found.changes] == ["segmentation"] * 2


def test_runs_that_share_nothing_say_so() -> None:
    found = compare(run("loss", BASELINE), run("accuracy", [made_up.erring(0.1, "einsum", 1.0)]))
    assert section(found).legend == "The two runs have nothing in common."


def test_the_table_shows_both_times_and_the_change() -> None:
    (table,) = section(against_baseline(losses(1.2, 3.3))).tables
    assert table.title == "loss, fp32, nchw, forward+backward"
    assert dict(zip(table.header, table.body[0], strict=True)) == {
        "": "segmentation",
        "contender": "ours (torch)",
        "baseline ms": "1.00 ±0.01",
        "new ms": "1.20 ±0.01",
        "new/baseline": "1.200",
        "beyond drift": "1.091",
        "peak MiB": "3.00",
        "flag": "REGRESSION",
    }


def test_means_are_told_of_ours_and_of_the_peers() -> None:
    notes = section(against_baseline(losses(1.2, 3.3))).notes
    assert notes[0] == (
        "Geometric means of new/baseline, loss: ours 1.200, ours beyond drift 1.091, peers 1.100"
    )


def test_eager_times_are_compared_where_a_gpu_has_them() -> None:
    before, after = (
        [made_up.on_gpu(entry, eager=eager) for entry in BASELINE] for eager in (2.0, 3.0)
    )
    found = compare(run("loss", before, made_up.GPU), run("loss", after, made_up.GPU))
    assert found.changes[0].eager_ratio == pytest.approx(1.5)
