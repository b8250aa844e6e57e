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

from benchmarks import contenders, figure, workloads
from benchmarks.__main__ import QUICK_ROUNDS, main, parse
from benchmarks.environment import device_slug

ROOT = Path(__file__).resolve().parents[2]
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
from benchmarks.__main__ import main
sys.exit(main(sys.argv[1:]))
"""


def environment() -> dict[str, str]:
    """Without xdist's variables: under it pytest-benchmark turns itself off."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    return kept | {"PYTHONPATH": str(Path(__file__).parent)}


def test_without_options_everything_runs_on_a_cpu() -> None:
    options = parse([])
    assert (options.device, options.dtype) == ("cpu", ["fp32"])
    assert options.workload == list(workloads.BY_NAME)
    assert options.contender == [contender.name for contender in contenders.on("cpu")]


def test_where_there_is_a_gpu_it_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(contenders, "serves", lambda *_: True)
    options = parse([])
    assert (options.device, options.dtype) == ("cuda", ["bf16", "fp32"])
    assert options.contender[0].startswith("ours (")
    assert parse(["--device", "cpu"]).device == "cpu"
    assert parse(["--dtype", "fp16", "bf16"]).dtype == ["fp16", "bf16"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "cuda"], "torch sees no GPU here"),
        (["--contender", "ours (torch)"], "on cpu there are fsp_kernels, einsum"),
        (["--dtype", "fp64"], "invalid choice"),
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
        raise ModuleNotFoundError("the figure needs matplotlib")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(contenders, "serves", lambda *_: True)
    monkeypatch.setattr(figure, "matplotlib_figure", missing)
    with pytest.raises(ModuleNotFoundError):
        main(["--output", str(tmp_path)])


def test_quick_only_changes_what_is_not_asked_for() -> None:
    options = parse(["--quick"])
    assert (options.workload, options.rounds) == (list(workloads.QUICK), QUICK_ROUNDS)
    options = parse(["--quick", "--workload", "segmentation", "--rounds", "2"])
    assert (options.workload, options.rounds) == (["segmentation"], 2)


@pytest.mark.slow
def test_a_quick_run_prints_a_table_and_writes_its_files(tmp_path: Path) -> None:
    options = [
        "--quick",
        "--workload=cifar-resnet",
        "--contender=fsp_kernels",
        "--contender=einsum",
    ]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks", *options, f"--output={tmp_path}"],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "geometric mean" in done.stdout
    folder = tmp_path / device_slug()
    assert "| cifar-resnet | 32 | 7.00 MiB |" in (folder / "loss.md").read_text()
    text = (folder / "loss.json").read_text()
    assert platform.node() not in text.split('"')
    found = {b["extra_info"]["contender"]: b for b in json.loads(text)["benchmarks"]}
    assert set(found) == {"fsp_kernels", "einsum"}
    for entry in found.values():
        assert len(entry["stats"]["data"]) == QUICK_ROUNDS
        assert (
            entry["extra_info"]["peak_extra_bytes"] >= 0.98 * entry["extra_info"]["gradient_bytes"]
        )


@pytest.mark.slow
def test_a_gpu_run_keeps_what_it_measured_whoever_fails(tmp_path: Path) -> None:
    options = ["--dtype", "fp32", "bf16", "--rounds=3"]
    who = ["ours (torch)", "einsum", "bmm", "broadcast"]
    options += [f"--contender={name}" for name in who]
    done = subprocess.run(
        [sys.executable, "-c", ON_FAKE_GPU, *options, f"--output={tmp_path}"],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1, done.stdout + done.stderr  # bmm is wrong
    assert done.stdout.splitlines()[-1].split()[:3] == ["geometric", "mean", "fastest"]
    folder = tmp_path / "gpu-nvidia-fake-1"
    assert {path.name for path in folder.iterdir()} == {"loss.json", "loss.md", "loss.png"}
    table = (folder / "loss.md").read_text()
    assert table.count("| broadcast | out of memory |") == 2
    assert table.count("| bmm | wrong |") == 2
    results = json.loads((folder / "loss.json").read_text())
    assert results["machine_info"]["gpu"] == "NVIDIA Fake 1"
    measured = {
        (b["extra_info"]["dtype"], b["extra_info"]["contender"]) for b in results["benchmarks"]
    }
    assert measured == {(d, c) for d in ("fp32", "bf16") for c in ("ours (torch)", "einsum")}
