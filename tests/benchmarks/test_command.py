"""``python -m benchmarks`` and ``pytest benchmarks/``, from their options to their files."""

import dataclasses
import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import fake_gpu
import made_up_results
import pytest
import torch

from benchmarks import __main__ as command
from benchmarks import (
    accuracy,
    bench_plan,
    bench_scaling,
    contenders,
    networks,
    parts,
    peers,
    results,
    workloads,
)
from benchmarks.__main__ import main, parse
from benchmarks.bench_loss import cases
from benchmarks.environment import device_slug
from benchmarks.options import QUICK_ROUNDS, ROUNDS, chosen_dtypes, chosen_rounds
from benchmarks.parts import PARTS, measure_part

ROOT = Path(__file__).resolve().parents[2]


def executed(*arguments):
    """Run Python; without xdist's variables, under which pytest-benchmark turns itself off.

    On one thread: small maps gain nothing from more.
    """
    kept = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=kept | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )


def test_without_options_everything_runs_on_a_cpu():
    options = parse([])
    assert (options.device, options.part) == ("cpu", list(PARTS))
    assert parse(["accuracy", "loss"]).part == ["loss", "accuracy"]
    assert chosen_dtypes(options) == ["fp32"]
    assert chosen_rounds(options) == ROUNDS["cpu"]
    assert {case.workload.name for case in cases(options)} == set(workloads.BY_NAME)
    tokens = sum(workload.tokens for workload in workloads.WORKLOADS)  # these have one layout
    assert len(cases(options)) == 2 * (2 * len(workloads.WORKLOADS) - tokens)


def test_a_quick_run_has_fewer_cases_and_rounds():
    options = parse(["--quick"])
    assert chosen_rounds(options) == QUICK_ROUNDS["cpu"]
    assert [str(case) for case in cases(options)] == [
        f"{name}, fp32, nchw, forward+backward" for name in workloads.QUICK
    ]


def test_cases_are_those_asked_for_in_the_order_of_their_tables():
    asked = ["--workload=segmentation", "--workload=cifar-resnet", "--dtype=bf16", "--pass=forward"]
    found = cases(parse([*asked, "--layout=channels_last", "--quick", "--rounds=3"]))
    assert [str(case) for case in found] == [
        f"{name}, bf16, channels_last, forward" for name in ("cifar-resnet", "segmentation")
    ]


def test_where_there_is_a_gpu_it_is_used(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(contenders, "serves", lambda *_: True)
    assert parse([]).device == "cuda"
    assert parse(["--contender", "ours (triton)"]).contender == ["ours (triton)"]
    assert parse(["--device", "cpu"]).device == "cpu"


def test_an_interpreter_s_errors_are_measured_but_not_its_times(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    interpreted = ["--contender", "ours (triton)"]
    assert parse(["accuracy", *interpreted]).contender == ["ours (triton)"]
    with pytest.raises(SystemExit):
        parse(["loss", "accuracy", *interpreted])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "cuda"], "torch sees no GPU here"),
        (["--contender", "ours (triton)"], "ours (torch), einsum"),
        (["--dtype", "fp64"], "invalid choice"),
        (["--layout", "tokens"], "invalid choice"),
        (["--rounds", "0"], "--rounds: 0, must be at least 1"),
        (["speed"], "PART: 'speed', must be of loss, step, scaling, plan, accuracy, or report"),
    ],
)
def test_impossible_options_are_refused(capsys, arguments, message):
    with pytest.raises(SystemExit):
        parse(arguments)
    assert message in capsys.readouterr().err


def test_a_part_that_crashes_does_not_take_others_down(monkeypatch, tmp_path, capsys):
    def measured(part, _):
        if part == "loss":
            raise RuntimeError("crashed")
        return [made_up_results.erring(0.1, "einsum", 1e-6)], made_up_results.CPU

    monkeypatch.setattr(command, "in_fresh_process", measured)
    assert main(["loss", "accuracy", "--output", str(tmp_path)]) == 1
    found = results.read(tmp_path / device_slug())
    assert list(found.environment) == ["accuracy"]
    assert "error of the gradient" in capsys.readouterr().out


def test_the_commit_of_a_part_is_that_of_its_start(monkeypatch, tmp_path):
    def measured(*_):
        monkeypatch.setattr(command.environment, "commit", lambda: "made meanwhile")
        return [made_up_results.erring(0.1, "einsum", 1e-6)], made_up_results.CPU

    monkeypatch.setattr(command.environment, "commit", lambda: "at the start")
    monkeypatch.setattr(command, "in_fresh_process", measured)
    assert main(["accuracy", "--output", str(tmp_path)]) == 0
    found = results.read(tmp_path / device_slug())
    assert found.environment["accuracy"]["commit"] == "at the start"


def test_without_results_the_command_says_so_and_fails(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(parts, "PARTS", {"loss": "no_such_module"})
    monkeypatch.setattr(command, "in_fresh_process", measure_part)
    assert main(["loss", "--output", str(tmp_path)]) == 1
    assert "holds no results" in capsys.readouterr().err


def test_results_can_be_drawn_again_and_compared(tmp_path, capsys):
    made_up_results.write(
        tmp_path, "loss", [made_up_results.loss("segmentation", "ours (torch)", 2.0)]
    )
    assert main(["report", str(tmp_path)]) == 0
    assert "ours ms" in capsys.readouterr().out
    assert (tmp_path / "report.md").exists()
    assert main(["report", str(tmp_path), str(tmp_path)]) == 0
    assert "loss, ours: 1.000" in capsys.readouterr().out
    assert main(["report", str(tmp_path / "nowhere")]) == 2
    assert "holds no results" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["report", *3 * [str(tmp_path)]])


def shrink(monkeypatch):
    """Have the parts measure few and small maps; the loss is of a workload that is small anyway."""
    axes = [axis._replace(values=axis.values[:3]) for axis in bench_scaling.AXES["cpu"]]
    monkeypatch.setitem(bench_scaling.AXES, "cpu", axes)
    monkeypatch.setitem(bench_plan.CHANNELS, "cpu", (16, 32, 64))
    monkeypatch.setitem(bench_plan.SIDES, "cpu", (4,))
    monkeypatch.setattr(accuracy, "QUICK_SHAPES", {"64 @ 9 x 9": (2, 64, 9, 9)})
    [name] = networks.QUICK
    small = dataclasses.replace(networks.BY_NAME[name], cpu_batch=2)
    monkeypatch.setitem(networks.BY_NAME, name, small)


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_a_quick_run_prints_its_tables_and_writes_its_files(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(command, "in_fresh_process", measure_part)
    shrink(monkeypatch)
    chosen = ["--workload=cifar-resnet", "--contender=ours (torch)", "--contender=einsum"]
    assert main(["--quick", *chosen, f"--output={tmp_path}"]) == 0
    printed = capsys.readouterr().out
    folder = tmp_path / device_slug()
    figures = {"speedup.png", "scaling.png", "accuracy.png"}
    data = {"results.csv", "environment.json"}
    assert {path.name for path in folder.iterdir()} == {"report.md"} | figures | data
    assert printed.splitlines()[-1].endswith("accuracy.png")
    assert "geometric mean" in printed
    assert "The plan loses" in printed
    found = results.read(folder)
    assert set(found.environment) == set(PARTS)
    assert platform.node() not in (folder / "environment.json").read_text().split('"')
    recorded = found.environment["loss"]["command"]
    assert recorded.startswith("python -m benchmarks --quick --workload=cifar-resnet")
    loss = results.records(found.rows[found.rows["part"] == "loss"])
    assert [row["contender"] for row in loss] == ["ours (torch)", "einsum"]
    unsure = (1 << 18) * torch.get_num_threads()
    for row in loss:
        assert row["rounds"] <= QUICK_ROUNDS["cpu"].most
        assert row["peak_bytes"] >= row["gradient_bytes"] - unsure


@pytest.mark.usefixtures("one_thread")
def test_a_gpu_run_keeps_what_was_measured_where_others_fail(monkeypatch, tmp_path, capfd):
    def out_of_memory(*_):
        raise torch.OutOfMemoryError("no room")

    fake_gpu.install(monkeypatch)
    monkeypatch.setattr(command, "in_fresh_process", measure_part)
    monkeypatch.setattr(peers, "broadcast_matrix", out_of_memory)
    monkeypatch.setattr(peers, "bmm_matrix", lambda *maps: 2 * peers.einsum_matrix(*maps))
    tiny = workloads.Workload("tiny", 8, (((4, 6), (3, 6)),))
    monkeypatch.setattr(workloads, "BY_NAME", {"tiny": tiny})
    names = ("ours (torch)", "einsum", "bmm", "broadcast")
    options = ["loss", "--dtype=fp32", "--dtype=bf16", "--layout=nchw", "--pass=forward+backward"]
    options += ["--rounds=3", *(f"--contender={name}" for name in names)]
    assert main([*options, f"--output={tmp_path}"]) == 1  # bmm is wrong
    assert "bmm is wrong on tiny: relative to float64" in capfd.readouterr().err
    folder = tmp_path / "gpu-nvidia-fake-1"
    found = results.read(folder)
    assert found.device == "NVIDIA Fake 1"
    rows = [(x["dtype"], x["contender"], x["reason"]) for x in results.records(found.rows)]
    reasons = dict.fromkeys(names) | {"bmm": "wrong", "broadcast": "out of memory"}
    assert rows == [(dtype, *item) for dtype in ("fp32", "bf16") for item in reasons.items()]
    assert "FAULT: No result of bmm: tiny (wrong)" in (folder / "report.md").read_text()


@pytest.mark.slow
def test_pytest_benchmark_times_contenders_and_compares_runs(tmp_path):
    arguments = (
        *("-m", "pytest", "benchmarks/bench_loss.py", "-p", "no:cacheprovider", "--quick"),
        *("--workload=cifar-resnet", "--contender=ours (torch)", "--contender=einsum"),
        *("--benchmark-max-time=0.01", f"--benchmark-storage={tmp_path}", "--benchmark-autosave"),
    )
    assert executed(*arguments).returncode == 0
    done = executed(*arguments, "--benchmark-compare")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "benchmark 'cifar-resnet, fp32, nchw, forward+backward': 4 tests" in done.stdout
    saved = json.loads(next(tmp_path.rglob("*.json")).read_text())
    assert platform.node() not in json.dumps(saved["machine_info"]).split('"')
    assert all(entry["extra_info"]["gradient_error"] < 1e-4 for entry in saved["benchmarks"])


@pytest.mark.slow
def test_a_machine_without_pandas_or_matplotlib_can_measure(tmp_path):
    program = (
        "import runpy, sys\n"
        "sys.modules['pandas'] = sys.modules['matplotlib'] = None\n"
        "runpy.run_module('benchmarks', run_name='__main__', alter_sys=True)\n"
    )
    chosen = ["--contender=ours (torch)", "--contender=einsum"]
    done = executed("-c", program, "accuracy", "--quick", *chosen, f"--output={tmp_path}")
    assert done.returncode == 0, done.stderr
    (table,) = tmp_path.glob("*/results.csv")
    assert table.read_text().count("\naccuracy,") > 10
    assert "To draw them, install pandas" in done.stdout
    assert results.read(table.parent).rows["gradient_error"].notna().any()
