"""The table and the figure of a GPU run."""

from __future__ import annotations

import builtins
from pathlib import Path
from typing import Any

import pytest

from benchmarks import figure, gpu_table, report
from benchmarks.rows import rows_of

MIB = 1 << 20


def entry(workload: str, dtype: str, contender: str, median: float, **info: Any) -> dict[str, Any]:
    """A result whose floor is 0.5 ms."""
    facts = {
        "workload": workload,
        "dtype": dtype,
        "contender": contender,
        "batch": 32,
        "gradient_bytes": 2 * MIB,
        "peak_extra_bytes": 3 * MIB,
        "kernel_launches": 4,
        "full_queue": True,
        "eager_median": 4 * median,
        "floor_bytes": 1_000_000,
        "copy_bytes_per_second": 2e9,
    }
    return {"extra_info": facts | info, "stats": {"median": median, "iqr": median / 50}}


REPORT = {
    "machine_info": {"gpu": "NVIDIA Some 1", "driver": "1.2"},
    "commit_info": {"id": "abc", "dirty": False},
    "not_measured": [
        {
            "workload": "wide-late-512",
            "dtype": "bf16",
            "contender": "broadcast",
            "reason": "out of memory",
        }
    ],
    "benchmarks": [
        entry("wide-late-512", "fp32", "ours (torch)", 0.004),
        entry("wide-late-512", "fp32", "einsum", 0.012, full_queue=False),
        entry("wide-late-512", "bf16", "bmm", 0.004),
        entry("wide-late-512", "bf16", "einsum", 0.003, kernel_launches=None),
        entry("wide-late-512", "bf16", "ours (torch)", 0.001),
        entry("tokens-vit-b", "bf16", "einsum", 0.012, eager_median=0.036),
        entry("tokens-vit-b", "bf16", "ours (torch)", 0.001),
    ],
}


def lines(dtype: str) -> list[dict[str, str]]:
    header, body = report.tables(REPORT, ", ")[dtype]
    return [dict(zip(header, line, strict=True)) for line in body]


def test_there_is_a_table_for_each_dtype() -> None:
    assert list(report.tables(REPORT, ", ")) == ["fp32", "bf16"]


def test_a_line_says_all_there_is_to_say_of_a_contender() -> None:
    assert lines("bf16")[0] == {
        "workload": "wide-late-512",
        "B": "32",
        "gradients MiB": "2.00",
        "contender": "ours (torch)",
        "device ms": "1.00",
        "eager ms": "4.00",
        "spread": "±1.0%",
        "% of floor": "50%",
        "launches": "4",
        "extra MiB": "3.00",
        "ratio": "-",
    }


def test_contenders_follow_their_table_also_where_one_ran_out_of_memory() -> None:
    found = [(x["contender"], x["device ms"], x["ratio"]) for x in lines("bf16")[:4]]
    assert found == [
        ("ours (torch)", "1.00", "-"),
        ("einsum", "3.00", "3.00x"),
        ("bmm", "4.00", "4.00x"),
        ("broadcast", "out of memory", ""),
    ]


def test_the_last_lines_hold_geometric_means_of_device_and_eager_times() -> None:
    means = {x["contender"]: (x["ratio"], x["eager ms"]) for x in lines("bf16")[-3:]}
    assert means == {
        "einsum": ("6.00x", "5.20x"),  # sqrt(3 * 12), sqrt(3 * 9)
        "bmm": ("4.00x", "4.00x"),
        "fastest peer": ("6.00x", "-"),
    }


def test_what_is_uncertain_is_marked() -> None:
    assert lines("fp32")[1]["device ms"] == "12.0 (with gaps)"
    assert lines("bf16")[1]["launches"] == "-"


def test_the_floor_is_bytes_over_copy_rate() -> None:
    fp32 = rows_of(REPORT)[0]
    assert gpu_table.floor_share(fp32.results["ours (torch)"]) == pytest.approx(0.125)


def test_the_results_file_names_the_gpu_and_has_both_tables() -> None:
    text = report.markdown(REPORT, "make gpu-bench")
    assert "- gpu: NVIDIA Some 1" in text
    assert text.index("## fp32") < text.index("## bf16")
    assert (
        "| tokens-vit-b | 32 | 2.00 | einsum | 12.0 | 36.0 | ±1.0% | 4% | 4 | 3.00 | 12.00x |"
        in text
    )


def test_the_figure_is_a_png(tmp_path: Path) -> None:
    figure.draw(rows_of(REPORT), "NVIDIA Some 1", tmp_path / "loss.png")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def no_matplotlib(name: str, *rest: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ModuleNotFoundError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", no_matplotlib)
    with pytest.raises(ModuleNotFoundError, match=r"fsp-kernels\[bench\]"):
        figure.matplotlib_figure()
