"""The experiment: fair arms, reproducible numbers, a teacher that is trained once."""

from __future__ import annotations

import dataclasses
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fsp_kernels import fsp_matrix
from fsp_kernels.distill.compare import Comparison, Laboratory, Run
from fsp_kernels.distill.config import Config, load_config
from fsp_kernels.distill.errors import DistillError
from fsp_kernels.distill.models import CifarResNet
from fsp_kernels.distill.monitor import Monitor
from fsp_kernels.distill.train import Phase, Trainer, tapped_pairs


@pytest.fixture
def laboratory(config: Config, tmp_path: Path, monitor: Monitor) -> Laboratory:
    return Laboratory(config, tmp_path / "run", monitor)


def figures(run: Run) -> dict[str, Any]:
    """All of a run but the time it took."""
    tree = asdict(run)
    for phase in (tree["task"], tree["stage1"]):
        if phase:
            del phase["seconds"]
    return tree


def files_under(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_every_seed_has_every_arm(compared: tuple[Comparison, Path]) -> None:
    comparison, _ = compared
    assert [(run.arm, run.seed) for run in comparison.runs] == [
        (arm, seed) for seed in (0, 1) for arm in ("baseline", "baseline-long", "distilled")
    ]


def test_the_arms_take_the_steps_they_claim(compared: tuple[Comparison, Path]) -> None:
    comparison, _ = compared
    for arm, stage1, task in (("baseline", 0, 6), ("baseline-long", 0, 14), ("distilled", 8, 6)):
        for run in comparison.of(arm):
            assert run.task.history[-1]["step"] == task
            assert (run.stage1.history[-1]["step"] if run.stage1 else 0) == stage1


def test_baselines_of_a_seed_start_equal_and_see_the_same_images(
    compared: tuple[Comparison, Path],
) -> None:
    comparison, _ = compared
    short, long = (comparison.of(arm) for arm in ("baseline", "baseline-long"))
    for one, other in zip(short, long, strict=True):
        assert one.task.history[0] == other.task.history[0]
        # The shorter one's rate falls after its third step, which no loss up to the fourth shows.
        assert one.task.history[1]["train_loss"] == other.task.history[1]["train_loss"]
    assert short[0].task.history[0] != short[1].task.history[0]


def test_the_distilled_student_starts_from_the_baselines_weights(
    config: Config, tmp_path: Path, monitor: Monitor
) -> None:
    laboratory = Laboratory(config, tmp_path / "run", monitor)
    seen: dict[str, dict[str, torch.Tensor]] = {}

    def observe(moment: str, student: torch.nn.Module) -> None:
        seen[moment] = {name: x.clone() for name, x in student.state_dict().items()}

    laboratory.student("distilled", 1, observe)
    fresh = laboratory.trainer.new_network(config.student, 1).state_dict()
    assert all(torch.equal(seen["before"][name], fresh[name]) for name in fresh)
    kept = load_file(laboratory.student_path("distilled", 1, "stage-1"))
    assert all(torch.equal(seen["after"][name], kept[name]) for name in fresh)
    assert not torch.equal(seen["after"]["conv.weight"], fresh["conv.weight"])


def test_the_same_seeds_give_the_same_numbers(
    compared: tuple[Comparison, Path], laboratory: Laboratory
) -> None:
    first, folder = compared
    torch.rand(17)  # the state of the global generator must not matter
    again = laboratory.compare()
    assert figures(again.teacher) == figures(first.teacher)
    assert [figures(run) for run in again.runs] == [figures(run) for run in first.runs]
    for path in sorted((folder / "checkpoints").iterdir()):
        ours, theirs = load_file(path), load_file(laboratory.folder / "checkpoints" / path.name)
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    for moment, matrices in first.matrices.items():
        assert all(map(torch.equal, matrices, again.matrices[moment]))


def test_a_seed_has_its_numbers_whatever_other_seeds_are_run(
    compared: tuple[Comparison, Path], laboratory: Laboratory
) -> None:
    alone = laboratory.student("distilled", 1)
    assert figures(alone) == figures(compared[0].of("distilled")[1])


def test_matrices_are_means_over_the_evaluated_images(
    compared: tuple[Comparison, Path], trainer: Trainer
) -> None:
    comparison, folder = compared
    assert {name: [m.shape for m in ms] for name, ms in comparison.matrices.items()} == {
        name: [(16, 16), (64, 64)] for name in ("teacher", "before", "after")
    }
    teacher = CifarResNet(14, in_channels=1).eval()
    teacher.load_state_dict(load_file(folder / "teacher.safetensors"))
    with torch.no_grad():
        maps = tapped_pairs(teacher, trainer.teacher_paths, trainer.splits.validation.images)
    for matrix, (first, second) in zip(comparison.matrices["teacher"], maps, strict=True):
        torch.testing.assert_close(matrix, fsp_matrix(first, second).mean(0))


def test_a_teacher_of_the_same_settings_is_reused(
    laboratory: Laboratory, monitor: Monitor, tmp_path: Path
) -> None:
    trained = laboratory.teacher()
    other_students = load_config(tmp_path / "tiny.yaml", ["stage1.steps=3", "seeds=[9]"])
    reused = Laboratory(other_students, laboratory.folder, monitor).teacher()
    assert (trained.reused, reused.reused) == (False, True)
    assert reused.run == trained.run
    for name, tensor in trained.model.state_dict().items():
        assert torch.equal(reused.model.state_dict()[name], tensor)


@pytest.mark.parametrize(
    "change",
    ["teacher.depth=8", "teacher_training.steps=5", "teacher_seed=5", "data.batch_size=10"],
)
def test_a_teacher_of_other_settings_is_trained_anew(
    laboratory: Laboratory, monitor: Monitor, tmp_path: Path, change: str
) -> None:
    laboratory.teacher()
    changed = load_config(tmp_path / "tiny.yaml", [change])
    assert not Laboratory(changed, laboratory.folder, monitor).teacher().reused
    assert Laboratory(changed, laboratory.folder, monitor).teacher().reused


def test_a_damaged_teacher_is_refused_before_anything_changes(
    laboratory: Laboratory, config: Config, monitor: Monitor
) -> None:
    laboratory.teacher()
    (laboratory.folder / "report.md").write_text("an earlier report")
    laboratory.teacher_path.write_bytes(laboratory.teacher_path.read_bytes()[:1000])
    before = files_under(laboratory.folder)
    other = dataclasses.replace(config, seeds=(5,))
    with pytest.raises(DistillError, match=r"teacher\.safetensors: not a checkpoint"):
        Laboratory(other, laboratory.folder, monitor)
    assert files_under(laboratory.folder) == before


def test_a_folder_that_holds_other_things_is_refused(
    config: Config, tmp_path: Path, monitor: Monitor
) -> None:
    folder = tmp_path / "precious"
    folder.mkdir()
    (folder / "report.md").write_text("my thesis")
    with pytest.raises(DistillError, match="precious: is not empty and holds no earlier run"):
        Laboratory(config, folder, monitor)
    with pytest.raises(DistillError, match=r"report\.md: is not a folder"):
        Laboratory(config, folder / "report.md", monitor)
    assert files_under(tmp_path) == files_under(tmp_path) | {folder / "report.md": b"my thesis"}
    assert len(list(folder.iterdir())) == 1


@pytest.mark.parametrize(
    ("pair", "message"),
    [
        (
            "{student: [stage1.0.relu, stage1], teacher: [stage1, stage1]}",
            r"pairs\.0\.student: stage1\.0\.relu: CifarResNet has no module .* did you mean",
        ),
        (
            "{student: [stage1, stage2], teacher: [stage1, stage1]}",
            r"pairs\.0: the student's FSP matrix is 16 x 32, the teacher's 16 x 16",
        ),
        ("{student: [fc, stage2], teacher: [stage1, stage2]}", r"pairs\.0\.student: "),
    ],
)
def test_pairs_that_do_not_fit_the_networks_are_refused_before_training(
    recipe: Path, monitor: Monitor, pair: str, message: str
) -> None:
    config = load_config(recipe, [f"pairs=[{pair}]"])
    with pytest.raises(DistillError, match=message):
        Laboratory(config, recipe.parent / "run", monitor)
    assert not (recipe.parent / "run").exists()


def test_steps_to_an_accuracy_are_those_of_the_first_evaluation_that_shows_it() -> None:
    history = [{"step": s, "accuracy": a} for s, a in ((0, 0.1), (5, 0.7), (10, 0.6), (15, 0.8))]
    run = Run("baseline", 0, 1, None, Phase(history, 1.0))
    assert [run.steps_to(target) for target in (0.1, 0.65, 0.75, 0.9)] == [0, 5, 15, None]
