"""The trainer on an NVIDIA GPU, in the ways to execute that a CPU does not have."""

from __future__ import annotations

from pathlib import Path

import pytest

from fsp_kernels.distill.records import Run

pytest.importorskip("torchvision")
from studies import open_study

pytestmark = pytest.mark.gpu


def trained(recipe: Path, folder: Path, execution: str) -> Run:
    more = ["stage1.steps=20", "stage2.steps=20", f"execution={execution}"]
    study = open_study(recipe, folder, *more)
    assert study.runtime.accelerator.device.type == "cuda"
    return study.student("two-stage", 0)


@pytest.mark.parametrize(
    "execution",
    [
        "{precision: fp32}",
        "{precision: bf16, channels_last: true}",
        "{precision: fp16, accumulation: 2}",
        "{precision: bf16, compile: true}",
        "{sync_batch_norm: true}",  # refused on a CPU
    ],
)
def test_both_stages_learn(recipe: Path, tmp_path: Path, execution: str) -> None:
    first, second = trained(recipe, tmp_path / "run", execution).phases
    assert first.history[-1]["fsp_loss"] < 0.9 * first.history[0]["fsp_loss"]
    assert second.history[-1]["loss"] < 0.9 * second.history[0]["loss"]


def test_a_gpu_trains_what_a_cpu_trains(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_gpu = trained(recipe, tmp_path / "gpu", "{precision: fp32}")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "1")
    study = open_study(recipe, tmp_path / "cpu", "stage1.steps=20", "stage2.steps=20")
    on_cpu = study.student("two-stage", 0)
    ours, theirs = (run.phases[0].history[0]["fsp_loss"] for run in (on_gpu, on_cpu))
    # Before any step, so but for the order of sums and cuDNN's algorithms the same.
    assert ours == pytest.approx(theirs, rel=2e-2)


def test_the_scaler_of_fp16_is_resumed(recipe: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    options = ["execution={precision: fp16}", "stage2.steps=9"]
    study = open_study(recipe, folder, *options)
    study.runtime.interruption.requested = 15  # asked to stop before the first step
    with pytest.raises(Exception, match="--resume goes on"):
        study.student("baseline", 0)
    again = open_study(recipe, folder, *options, resume=True)
    assert again.student("baseline", 0).task.steps == 9
