"""The tables of the part ``loss``."""

from __future__ import annotations

import made_up
import pytest

from benchmarks.report import loss
from benchmarks.report.layout import Table
from benchmarks.report.runs import part_of

MIB = made_up.MIB
CPU_RESULTS = [
    made_up.loss("segmentation", "einsum", 400, peak_extra_bytes=8 * MIB),
    made_up.loss("segmentation", "ours (torch)", 100),
    made_up.loss("wide-late-512", "bmm", 2),
    made_up.loss("wide-late-512", "einsum", 3),
    made_up.loss("wide-late-512", "ours (torch)", 1, spread=0.05),
]
NO_BROADCAST = made_up.absent(
    made_up.loss("segmentation", "broadcast", 1), "not run: holds 9.0 GiB"
)


def sections(results: list[made_up.Facts], machine: made_up.Facts = made_up.CPU, **content: object):
    return loss.sections(part_of(made_up.part("loss", results, machine, **content)))


def lines(table: Table) -> list[dict[str, str]]:
    return [dict(zip(table.header, line, strict=True)) for line in table.body]


def summary(results: list[made_up.Facts]) -> list[dict[str, str]]:
    return lines(sections(results)[0].tables[0])


def test_the_summary_has_a_line_for_each_workload_in_their_order_and_means_last() -> None:
    found = [line["workload"] for line in summary(CPU_RESULTS)]
    assert found == ["wide-late-512", "segmentation", "geometric mean"]


def test_the_summary_says_what_ours_takes_and_the_peers_beside_it() -> None:
    assert summary(CPU_RESULTS)[0] == {
        "workload": "wide-late-512",
        "B": "32",
        "ours ms": "1.00 ±0.05",
        "of floor": "50%",
        "bound by": "bytes",
        "einsum": "3.00x",
        "bmm": "2.00x",
        "fastest": "2.00x",
        "ours MiB": "3.00",
        "einsum MiB": "3.00",
    }


def test_means_are_over_the_workloads_that_a_peer_ran_on() -> None:
    means = summary(CPU_RESULTS)[-1]
    assert means["einsum"] == "3.46x"  # sqrt(3 * 4)
    assert means["bmm"] == "2.00x"
    assert means["fastest"] == "2.83x"  # sqrt(2 * 4)
    assert means["ours ms"] == ""


def test_the_floor_is_the_longer_of_moving_and_multiplying() -> None:
    entry = made_up.loss("segmentation", "ours (torch)", 100, floor_flops=8e9)
    (line, _) = summary([entry])
    assert (line["of floor"], line["bound by"]) == ("80%", "flops")


def test_tables_are_apart_by_dtype_layout_and_direction() -> None:
    kinds = [
        {"direction": "forward"},
        {"dtype": "bf16"},
        {"layout": "channels_last"},
        {},
    ]
    results = [made_up.loss("segmentation", "ours (torch)", 1, **kind) for kind in kinds]
    assert [table.title for table in sections(results)[0].tables] == [
        "fp32, nchw, forward + backward",
        "fp32, nchw, forward",
        "fp32, channels_last, forward + backward",
        "bf16, nchw, forward + backward",
    ]


def test_tokens_stand_with_nchw() -> None:
    tokens = made_up.loss("tokens-vit-b", "ours (torch)", 1, layout="tokens")
    (table,) = sections([*CPU_RESULTS, tokens])[0].tables
    assert [line[0] for line in table.body[:2]] == ["wide-late-512", "tokens-vit-b"]


def test_the_summary_names_ours_where_the_default_has_no_result() -> None:
    results = [
        made_up.loss("wide-late-512", "ours (triton)", 1),
        made_up.loss("segmentation", "ours (cuda)", 1),
    ]
    assert [line["ours"] for line in summary(results)] == ["", "ours (cuda)", ""]
    assert "ours" not in summary(CPU_RESULTS)[0]


def test_the_summary_tells_why_someone_is_missing() -> None:
    notes = sections(CPU_RESULTS, not_measured=[NO_BROADCAST])[0].notes
    assert notes == ["No result of broadcast: segmentation (not run: holds 9.0 GiB)"]


def test_a_defect_is_called_a_fault() -> None:
    wrong = NO_BROADCAST | {"reason": "broadcast is wrong", "fault": True}
    (note,) = sections(CPU_RESULTS, not_measured=[wrong])[0].notes
    assert note.startswith("FAULT: No result of broadcast")


def test_the_summary_fits_a_terminal() -> None:
    peers = ("einsum", "bmm", "broadcast", "torch.compile")
    names = ("ours (triton)", *peers)
    results = [
        made_up.on_gpu(made_up.loss("torchdistill-resnet34-18", name, 0.0512 * (1 + 99 * i)))
        for i, name in enumerate(names)
    ]
    text = sections(results, made_up.GPU)[0].plain()
    assert max(map(len, text.splitlines())) <= 140


# -- the detail -----------------------------------------------------------------------------------


def detail(results: list[made_up.Facts], *rest: object, **content: object) -> list[dict[str, str]]:
    return lines(sections(results, *rest, **content)[1].tables[0])


def test_a_line_of_the_detail_says_all_there_is_on_a_cpu() -> None:
    assert detail(CPU_RESULTS)[1] == {
        "workload": "wide-late-512",
        "B": "32",
        "gradients MiB": "2.00",
        "contender": "einsum",
        "ms": "3.00",
        "spread": "±2.0%",
        "of floor": "17%",
        "bound by": "bytes",
        "extra MiB": "3.00",
        "ratio": "3.00x",
        "loss error": "1.0e-07",
        "gradient error": "2.0e-07",
    }


def test_on_a_gpu_there_are_more_clocks_and_launches() -> None:
    ours = made_up.on_gpu(made_up.loss("segmentation", "ours (triton)", 1), replay=0.9)
    (line,) = detail([ours], made_up.GPU)
    assert (line["device ms"], line["eager ms"], line["launches"]) == ("1.00", "4.00 ±0.05", "4")
    assert line["replay ms"] == "0.900 ±0.010"


def test_what_cannot_be_replayed_says_why() -> None:
    (line,) = detail([made_up.on_gpu(CPU_RESULTS[0], replay=None)], made_up.GPU)
    assert line["replay ms"] == "it synchronises"


def test_a_queue_that_ran_empty_is_marked() -> None:
    (line,) = detail([made_up.on_gpu(CPU_RESULTS[1], full_queue=False)], made_up.GPU)
    assert line["device ms"] == "100 (with gaps)"


def test_a_reason_stands_in_place_of_the_numbers() -> None:
    line = detail(CPU_RESULTS, not_measured=[NO_BROADCAST])[-1]
    assert (line["contender"], line["ms"]) == ("broadcast", "not run: holds 9.0 GiB")
    assert line["ratio"] == line["spread"] == line["extra MiB"] == ""


def test_a_long_reason_is_one_short_cell() -> None:
    error = NO_BROADCAST | {"reason": "a | b\n" * 100}
    (cell,) = {line["ms"] for line in detail(CPU_RESULTS, not_measured=[error])[-1:]}
    assert len(cell) <= 70
    assert "|" not in cell
    assert "\n" not in cell


def test_means_are_by_every_clock() -> None:
    results = [
        made_up.on_gpu(made_up.loss("segmentation", "ours (triton)", 1), eager=4),
        made_up.on_gpu(made_up.loss("segmentation", "einsum", 3), eager=2, replay=None),
    ]
    means = lines(sections(results, made_up.GPU)[1].tables[1])
    assert means[1]["time"] == "3.00x"
    assert means[1]["eager time"] == "1.50x"
    assert "replay time" not in means[1]


def test_only_the_summary_is_for_a_terminal() -> None:
    assert [section.in_terminal for section in sections(CPU_RESULTS)] == [True, False]


def test_the_legend_explains_the_columns_there_are() -> None:
    on_cpu = sections(CPU_RESULTS)[1].meanings
    on_gpu = sections([made_up.on_gpu(CPU_RESULTS[0])], made_up.GPU)[1].meanings
    assert "launches" in on_gpu
    assert "launches" not in on_cpu


@pytest.mark.parametrize("peak", [None, 0])
def test_an_unknown_peak_is_no_zero(peak: int | None) -> None:
    (line, _) = summary([made_up.loss("segmentation", "ours (torch)", 1, peak_extra_bytes=peak)])
    assert line.get("ours MiB") == (None if peak is None else "0")
