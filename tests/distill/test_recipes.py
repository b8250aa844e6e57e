"""Each shipped recipe is valid and runs to its report, here with few steps and small images."""

from __future__ import annotations

from pathlib import Path

import pytest
from image_data import WriteCifar
from studies import open_study

from fsp_kernels.distill.config import load_config
from fsp_kernels.distill.report import write_report

CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_a_recipe_is_valid_and_says_what_it_follows(path: Path) -> None:
    config = load_config(path)
    assert config.name == path.stem
    assert config.evaluation.split == "test"
    assert len(config.seeds) >= 3
    # The two stages are compared with as many steps on the task.
    assert {"baseline-long", "two-stage"} <= set(config.arms)
    header = path.read_text().split("seeds:")[0]
    for words in ("section", "Different from the paper", f"fsp-distill study configs/{path.name}"):
        assert words in header


def run(recipe: str, tmp_path: Path, *overrides: str) -> None:
    short = ["seeds=[0]", "evaluation.every=2", "execution.threads=1"]
    for section in ("teacher_training", "stage1", "stage2"):
        short += [f"{section}.steps=2", f"{section}.epochs=null"]
    study = open_study(CONFIGS / f"{recipe}.yaml", tmp_path / "run", *short, *overrides)
    assert [run.arm for run in study.all()] == list(study.config.arms)
    write_report([study.folder], tmp_path / "report", "the command")
    assert (tmp_path / "report" / "report.md").is_file()
    assert (tmp_path / "report" / "figures" / "fsp-matrices.png").is_file()


@pytest.mark.parametrize(
    ("recipe", "overrides"),
    [
        ("network-minimisation-digits", []),
        ("fast-optimisation-digits", []),
        ("transfer-learning-digits", ["source.training.steps=2"]),
    ],
)
def test_a_recipe_on_digits_runs(recipe: str, overrides: list[str], tmp_path: Path) -> None:
    run(recipe, tmp_path, *overrides)


@pytest.mark.parametrize(
    ("recipe", "dataset"),
    [("fast-optimisation-cifar10", "cifar10"), ("network-minimisation-cifar100", "cifar100")],
)
def test_a_recipe_on_cifar_runs(
    recipe: str,
    dataset: str,
    tmp_path: Path,
    write_cifar: WriteCifar,
) -> None:
    root = write_cifar(dataset, images=10)
    run(recipe, tmp_path, f"data.root={root}", "data.batch_size=8", "data.workers=0")


def test_the_recipe_on_a_folder_of_images_runs(tmp_path: Path, folder: Path) -> None:
    data = [f"root={folder}", "image_size=32", "batch_size=8", "workers=1"]
    overrides = [f"data.{assignment}" for assignment in data]
    # A test has no network to download weights.
    run("transfer-learning-imagefolder", tmp_path, *overrides, "teacher.pretrained=false")
