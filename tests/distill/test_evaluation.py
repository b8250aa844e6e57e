"""What is measured, against the same written out; and that measuring changes nothing."""

from __future__ import annotations

import math
import multiprocessing
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from studies import open_study

from fsp_kernels import reference
from fsp_kernels.distill import evaluation
from fsp_kernels.distill.arms import TrainingStage
from fsp_kernels.distill.data import EvaluationBatches
from fsp_kernels.distill.evaluation import Evaluations, by_batch_statistics
from fsp_kernels.distill.models import CifarResNet
from fsp_kernels.distill.objective import Objective, Tapped
from fsp_kernels.distill.study import Study
from fsp_kernels.distill.teacher import LiveTeacher
from fsp_kernels.errors import DistillError


@pytest.fixture
def stage(study: Study) -> TrainingStage:
    return study.stages("two-stage")[0]


@pytest.fixture
def objective(study: Study, stage: TrainingStage) -> Objective:
    network = study.runtime.new_network(study.config.student, study.splits, 5, "student")
    return Objective(network, stage, study.pairs, study.config.fsp, None).train()


@pytest.fixture
def evaluations(study: Study, teacher: LiveTeacher) -> Evaluations:
    return Evaluations(study.splits, study.runtime, teacher)


def test_accuracy_and_loss_are_means_over_the_split(
    study: Study, evaluations: Evaluations, objective: Objective
) -> None:
    network = objective.student.network.eval()
    [batch] = EvaluationBatches(study.splits.test, batch_size=600)
    logits = network(batch.images)
    found = evaluations.task(network, "test")
    right = (logits.argmax(1) == batch.labels).float().mean().item()
    assert found["accuracy"] == pytest.approx(right)
    assert found["loss"] == pytest.approx(F.cross_entropy(logits, batch.labels).item(), rel=1e-5)


def test_the_split_is_the_recipes_unless_another_is_asked_for(
    evaluations: Evaluations, objective: Objective
) -> None:
    network = objective.student.network.eval()
    assert evaluations.task(network) == evaluations.task(network, "validation")
    assert evaluations.task(network) != evaluations.task(network, "test")


def test_the_fsp_loss_is_that_of_the_definition_by_the_batchs_statistics(
    study: Study, evaluations: Evaluations, objective: Objective, teacher: LiveTeacher
) -> None:
    [batch] = EvaluationBatches(study.splits.validation)
    paths = [pair.student for pair in study.pairs]
    student = CifarResNet(8, in_channels=1)
    student.load_state_dict(objective.student.network.state_dict())
    with torch.no_grad():
        _, maps = Tapped(student.train(), paths, [None] * 2)(batch.images)
        matrices, _ = teacher.matrices(batch.images, "max")
    each = [
        reference.fsp_loss([tuple(x.double() for x in pair)], [matrix.double()]).item()
        for pair, matrix in zip(maps, matrices, strict=True)
    ]
    found = evaluations.fsp(objective)
    assert found["fsp_loss/0"] == pytest.approx(each[0], rel=1e-4)
    assert found["fsp_loss/1"] == pytest.approx(each[1], rel=1e-4)
    assert found["fsp_loss"] == pytest.approx(sum(each), rel=1e-4)


def test_measuring_moves_no_weight_no_statistic_and_no_mode(
    evaluations: Evaluations, objective: Objective, stage: TrainingStage
) -> None:
    before = {name: x.clone() for name, x in objective.state_dict().items()}
    modes = [module.training for module in objective.modules()]
    evaluations.figures(stage, objective)
    evaluations.student_matrices(objective)
    assert all(torch.equal(before[name], x) for name, x in objective.state_dict().items())
    assert [module.training for module in objective.modules()] == modes


def test_statistics_are_given_back_even_after_an_error() -> None:
    network = CifarResNet(8, in_channels=1).eval()
    before = network.bn.running_mean.clone()
    with pytest.raises(RuntimeError), by_batch_statistics(network):
        network(torch.randn(4, 1, 8, 8) + 5).backward()  # of many numbers: an error
    assert torch.equal(network.bn.running_mean, before)
    assert not network.bn.training


def test_matrices_are_means_over_the_images(
    study: Study, evaluations: Evaluations, teacher: LiveTeacher
) -> None:
    [batch] = EvaluationBatches(study.splits.validation)
    matrices, _ = teacher.matrices(batch.images, "max")
    for mean, each in zip(evaluations.teacher_matrices(), matrices, strict=True):
        torch.testing.assert_close(mean, each.mean(0))


def test_only_as_many_images_as_have_matrices_that_fit(
    study: Study,
    teacher: LiveTeacher,
    objective: Objective,
    evaluations: Evaluations,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    of_one_image = 4 * (16 * 16 + 64 * 64)
    monkeypatch.setattr(evaluation, "_MATRIX_BYTES", 10 * of_one_image)
    ten = EvaluationBatches(study.splits.validation, limit=10)
    expected, _ = teacher.matrices(next(iter(ten)).images, "max")
    torch.testing.assert_close(evaluations.teacher_matrices()[0], expected[0].mean(0))
    assert evaluations.fsp(objective)["fsp_loss"] > 0


def test_a_stages_figures_are_those_it_is_about(
    study: Study, evaluations: Evaluations, objective: Objective
) -> None:
    first, second = study.stages("two-stage")
    [joint] = study.stages("one-stage")
    fsp, task = {"fsp_loss", "fsp_loss/0", "fsp_loss/1"}, {"accuracy", "loss"}
    assert set(evaluations.figures(first, objective)) == fsp
    assert set(evaluations.figures(second, objective)) == task
    assert set(evaluations.figures(joint, objective)) == fsp | task


def test_a_stopping_rule_looks_at_the_stages_loss_on_the_validation_split(
    study: Study, evaluations: Evaluations, objective: Objective
) -> None:
    [joint] = study.stages("one-stage")
    found = evaluations.figures(joint, objective, "validation")
    expected = found["loss"] + joint.fsp * found["fsp_loss"]
    assert evaluations.stopping_loss(joint, objective) == pytest.approx(expected)


@pytest.mark.parametrize(
    "overrides", [["evaluation.split=validation"], ["stage1.stop.patience=2"]], ids=str
)
@pytest.mark.parametrize("count", [0, 1])
def test_too_few_validation_images_are_refused_at_the_door(
    recipe: Path, tmp_path: Path, overrides: list[str], count: int
) -> None:
    test = [f"data.validation_images={count}", "evaluation.split=test"]
    match = rf"^data\.validation_images: is {count}, must be at least 2"
    with pytest.raises(DistillError, match=match):
        open_study(recipe, tmp_path / "run", *test, *overrides)
    assert not (tmp_path / "run").exists()


def test_two_validation_images_are_enough(recipe: Path, tmp_path: Path) -> None:
    study = open_study(recipe, tmp_path / "run", "data.validation_images=2")
    first, _ = study.student("two-stage", 0).phases
    assert all(math.isfinite(row["fsp_loss"]) for row in first.history)


def test_no_image_is_left_to_be_normalised_by_itself(
    study: Study, teacher: LiveTeacher, monkeypatch: pytest.MonkeyPatch
) -> None:
    # 600 images in batches of 599: the last one's 1 x 1 maps have no deviation.
    monkeypatch.setattr(evaluation, "_BATCH", 599)
    [first, _] = study.stages("two-stage")
    network = study.runtime.new_network(study.config.student, study.splits, 5, "student")
    network.stage3[0].conv1.stride = (4, 4)
    network.stage3[0].shortcut.stride = 4
    objective = Objective(network, first, study.pairs, study.config.fsp, None)
    evaluations = Evaluations(study.splits, study.runtime, teacher)
    assert math.isfinite(evaluations.fsp(objective, "test")["fsp_loss"])


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[multiprocessing.Process]:
    """The processes that are started, to load images."""
    processes: list[multiprocessing.Process] = []
    start = multiprocessing.Process.start

    def noted(process: multiprocessing.Process) -> None:
        processes.append(process)
        start(process)

    monkeypatch.setattr(multiprocessing.Process, "start", noted)
    return processes


@pytest.mark.parametrize("every", [1, 8])
def test_workers_are_started_once_a_stage_and_end_with_it(
    recipe: Path, tmp_path: Path, started: list[multiprocessing.Process], every: int
) -> None:
    overrides = ["data.workers=1", f"evaluation.every={every}"]
    open_study(recipe, tmp_path / "run", *overrides).student("two-stage", 0)
    assert len(started) == 6  # one to train and one to measure with, in each of three stages
    assert not any(process.is_alive() for process in started)


def test_workers_end_with_a_stage_that_fails_and_none_look_for_the_reason(
    recipe: Path, tmp_path: Path, started: list[multiprocessing.Process]
) -> None:
    overrides = ["data.workers=1", "teacher_training.learning_rate=1e30"]
    study = open_study(recipe, tmp_path / "run", *overrides)
    with pytest.raises(DistillError, match="not finite") as error:
        study.train_teacher()
    assert len(started) == 2
    assert not any(process.is_alive() for process in started)
    assert error.traceback
