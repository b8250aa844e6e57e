"""Each shipped recipe runs from its first step to its report: few steps, one seed, small images."""

from __future__ import annotations

from pathlib import Path

import pytest

from distill.data.conftest import WriteCifar, folder, write_cifar  # noqa: F401  # fixtures
from distill.studies import open_study
from fsp_kernels.distill.report import write_report

CONFIGS = Path(__file__).parents[2] / "configs"
SHORT = ("seeds=[0]", "evaluation.every=2", "execution.threads=1")


def steps(*sections: str) -> list[str]:
    return [f"{section}.{key}" for section in sections for key in ("steps=2", "epochs=null")]


def run(recipe: str, tmp_path: Path, *overrides: str) -> None:
    short = [*SHORT, *steps("teacher_training", "stage1", "stage2"), *overrides]
    study = open_study(CONFIGS / f"{recipe}.yaml", tmp_path / "run", *short)
    runs = study.all()
    assert [run.arm for run in runs] == list(study.config.arms)
    write_report([study.folder], tmp_path / "report", "the command")
    assert (tmp_path / "report" / "report.md").is_file()
    assert (tmp_path / "report" / "figures" / "fsp-matrices.png").is_file()


@pytest.mark.parametrize("recipe", ["network-minimisation-digits", "fast-optimisation-digits"])
def test_a_recipe_on_digits_runs(recipe: str, tmp_path: Path) -> None:
    run(recipe, tmp_path)


def test_the_recipe_from_mnist_to_digits_runs(tmp_path: Path) -> None:
    run("transfer-learning-digits", tmp_path, "source.training.steps=2")


@pytest.mark.parametrize(
    ("recipe", "dataset"),
    [
        ("fast-optimisation-cifar10", "cifar10"),
        ("network-minimisation-cifar100", "cifar100"),
    ],
)
def test_a_recipe_on_cifar_runs(
    recipe: str,
    dataset: str,
    tmp_path: Path,
    write_cifar: WriteCifar,  # noqa: F811
) -> None:
    root = write_cifar(dataset, images=100)
    run(recipe, tmp_path, f"data.root={root}", "data.batch_size=8", "data.workers=0")


def test_the_recipe_on_a_folder_of_images_runs(tmp_path: Path, folder: Path) -> None:  # noqa: F811
    run(
        "transfer-learning-imagefolder",
        tmp_path,
        f"data.root={folder}",
        "data.image_size=64",
        "data.batch_size=8",
        "data.workers=1",
        "teacher.pretrained=false",  # there is no network in a test
    )
