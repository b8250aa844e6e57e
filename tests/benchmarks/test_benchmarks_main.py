"""``python -m benchmarks`` from its options to its files."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import contenders, report
from benchmarks.__main__ import PARTS, main, parse, run
from benchmarks.environment import device_slug
from benchmarks.options import QUICK_ROUNDS

ROOT = Path(__file__).resolve().parents[2]
# As `python -m benchmarks`, on a GPU that is not there, with a peer that is wrong and one that is
# too large. A part is a process of its own, to which the same is done.
ON_FAKE_GPU = """
import sys
import pytest
import torch
import fake_gpu
from benchmarks import peers, workloads

def out_of_memory(first, second):
    raise torch.OutOfMemoryError("no room")

def twice(first, second):
    return 2 * peers.einsum_matrix(first, second)

patch = pytest.MonkeyPatch()
fake_gpu.install(patch)
patch.setattr(peers, "broadcast_matrix", out_of_memory)
patch.setattr(peers, "bmm_matrix", twice)
workloads.BY_NAME.clear()
workloads.BY_NAME["tiny"] = workloads.Workload("tiny", 8, (((4, 6), (3, 6)),))
torch.set_num_threads(1)
"""
MAIN = """
from benchmarks import __main__ as command
command.sys.executable = __file__
sys.exit(command.main(sys.argv[1:]))
"""
PYTEST = """
assert sys.argv[1:3] == ["-m", "pytest"]
sys.exit(pytest.main(sys.argv[3:]))
"""


def environment() -> dict[str, str]:
    """Without xdist's variables: under it pytest-benchmark turns itself off."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    return kept | {"PYTHONPATH": f"{Path(__file__).parent}:{ROOT}"}


def executed(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True)


def test_without_options_everything_runs_on_a_cpu() -> None:
    options = parse([])
    assert (options.device, options.part) == ("cpu", list(PARTS))
    assert not any((options.dtype, options.layout, options.workload, options.contender))


def test_parts_run_in_their_own_order() -> None:
    assert parse(["accuracy", "loss"]).part == ["loss", "accuracy"]


def test_where_there_is_a_gpu_it_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(contenders, "serves", lambda *_: True)
    assert parse([]).device == "cuda"
    assert parse(["--contender", "ours (triton)"]).contender == ["ours (triton)"]
    assert parse(["--device", "cpu"]).device == "cpu"


def test_an_interpreter_has_errors_to_be_measured_but_no_times(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    interpreted = ["--contender", "ours (triton)"]
    assert parse(["accuracy", *interpreted]).contender == ["ours (triton)"]
    with pytest.raises(SystemExit):
        parse(["loss", "accuracy", *interpreted])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "cuda"], "torch sees no GPU here"),
        (["--contender", "ours (triton)"], "on cpu there are ours (torch), einsum"),
        (["--dtype", "fp64"], "invalid choice"),
        (["--layout", "tokens"], "invalid choice"),
        (["--rounds", "0"], "--rounds: 0, must be at least 1"),
        (["speed"], "PART: 'speed', must be of loss, step, scaling, plan, accuracy, or report"),
    ],
)
def test_what_cannot_be_is_refused(
    capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    with pytest.raises(SystemExit):
        parse(arguments)
    assert message in capsys.readouterr().err


def test_a_missing_matplotlib_is_found_before_minutes_are_spent(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def missing() -> None:
        raise ModuleNotFoundError("the figures need matplotlib")

    monkeypatch.setattr(report, "require_matplotlib", missing)
    with pytest.raises(ModuleNotFoundError):
        main(["--output", str(tmp_path)])
    assert not list(tmp_path.iterdir())


def test_what_is_asked_for_reaches_pytest(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen: list[list[str]] = []

    def note(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        seen.append(command)
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(subprocess, "run", note)
    arguments = ["--dtype=bf16", "--pass=forward", "--contender=bmm", "--rounds=3", "--quick"]
    assert run("plan", parse(arguments), tmp_path / "plan.json", "as typed") == 0
    (command,) = seen
    assert "benchmarks/bench_plan.py" in command
    assert {*arguments, "--device=cpu", "--written-as=as typed"} <= set(command)


def test_nothing_measured_is_said_and_fails(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("benchmarks.__main__.run", lambda *_: 1)
    assert main(["loss", "--output", str(tmp_path)]) == 1
    assert "holds no results" in capsys.readouterr().err


def test_the_help_offers_the_parts_and_nothing_else(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(["--help"])
    text = capsys.readouterr().out
    assert "PART" in text
    assert "of loss, step, scaling, plan, accuracy; default: all" in text
    assert "[]" not in text


def test_results_can_be_read_in_an_ascii_terminal_from_a_notebook(tmp_path: Path) -> None:
    results = next((ROOT / "benchmarks" / "results").glob("cpu-*"))
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks", "report", results, "--output", tmp_path],
        cwd=ROOT,
        env=os.environ | {"PYTHONIOENCODING": "ascii", "MPLBACKEND": "module://not.installed"},
        capture_output=True,
    )
    assert done.returncode == 0, done.stderr
    assert b"\\xb1" in done.stdout


def test_reports_need_no_measurement(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", "nowhere"]) == 2
    assert "nowhere: no such file or folder" in capsys.readouterr().err


@pytest.mark.slow
def test_a_quick_run_prints_its_tables_and_writes_its_files(tmp_path: Path) -> None:
    chosen = ["--workload=cifar-resnet", "--contender=ours (torch)", "--contender=einsum"]
    command = (sys.executable, "-m", "benchmarks", "--quick", *chosen, f"--output={tmp_path}")
    done = executed(*command)
    assert done.returncode == 0, done.stdout + done.stderr
    folder = tmp_path / device_slug()
    figures = {f"{name}.png" for name in ("speedup", "roofline", "scaling", "plan", "accuracy")}
    parts = {f"{part}.json" for part in PARTS}
    assert {path.name for path in folder.iterdir()} == {"report.md"} | figures | parts
    assert done.stdout.splitlines()[-1].endswith("accuracy.png")
    assert "geometric mean" in done.stdout
    assert "The plan loses" in done.stdout
    text = (folder / "loss.json").read_text()
    assert platform.node() not in text.split('"')
    content = json.loads(text)
    assert content["command"].startswith("python -m benchmarks --quick --workload=cifar-resnet")
    found = {b["extra_info"]["contender"]: b for b in content["benchmarks"]}
    assert list(found) == ["ours (torch)", "einsum"]
    for entry in found.values():
        facts = entry["extra_info"]
        assert len(entry["stats"]["data"]) <= QUICK_ROUNDS["cpu"].most
        unsure = (1 << 18) * torch.get_num_threads()
        assert facts["peak_extra_bytes"] >= facts["gradient_bytes"] - unsure


@pytest.mark.slow
def test_a_gpu_run_keeps_what_it_measured_whoever_fails(tmp_path: Path) -> None:
    script, python = tmp_path / "main.py", tmp_path / "python"
    python.write_text(f"#!{sys.executable}\n{ON_FAKE_GPU}{PYTEST}")
    python.chmod(0o755)
    script.write_text(ON_FAKE_GPU + MAIN.replace("__file__", repr(str(python))))
    who = ["ours (torch)", "einsum", "bmm", "broadcast"]
    options = ["loss", "--dtype=fp32", "--dtype=bf16", "--layout=nchw", "--pass=forward+backward"]
    options += ["--rounds=3", *(f"--contender={name}" for name in who)]
    done = executed(sys.executable, str(script), *options, f"--output={tmp_path}")
    assert done.returncode == 1, done.stdout + done.stderr  # bmm is wrong
    assert "test_loss[tiny-bf16-nchw-forward+backward-bmm]" in done.stdout
    assert "bmm is wrong on tiny: relative to float64" in done.stderr
    folder = tmp_path / "gpu-nvidia-fake-1"
    names = {path.name for path in folder.iterdir()}
    assert names == {"loss.json", "report.md", "speedup.png", "roofline.png"}
    content = json.loads((folder / "loss.json").read_text())
    assert content["machine_info"]["gpu"] == "NVIDIA Fake 1"
    measured = {
        (b["extra_info"]["dtype"], b["extra_info"]["contender"]) for b in content["benchmarks"]
    }
    assert measured == {(d, c) for d in ("fp32", "bf16") for c in ("ours (torch)", "einsum")}
    missing = [(x["contender"], x["reason"], x["fault"]) for x in content["not_measured"]]
    assert missing == 2 * [("bmm", "wrong", True), ("broadcast", "out of memory", False)]
    table = (folder / "report.md").read_text()
    assert "FAULT: No result of bmm: tiny (wrong)" in table
    assert "out of memory" in table
