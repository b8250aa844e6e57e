"""The stages: what each one changes, what it leaves alone, and that seeds decide everything."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor, nn

from fsp_kernels.distill.errors import DistillError
from fsp_kernels.distill.train import Trainer, tapped_pairs


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def changed(before: dict[str, Tensor], model: nn.Module) -> set[str]:
    after = model.state_dict()
    return {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}


def student_and_teacher(trainer: Trainer) -> tuple[nn.Module, nn.Module]:
    config = trainer.config
    return trainer.new_network(config.student, 0), trainer.new_network(config.teacher, 1)


def test_the_seed_decides_the_initial_weights(trainer: Trainer) -> None:
    network = trainer.config.student
    first, again, other = (trainer.new_network(network, seed) for seed in (3, 3, 4))
    assert not changed(weights_of(first), again)
    assert changed(weights_of(first), other)


def test_stage_1_lowers_the_fsp_loss(trainer: Trainer) -> None:
    student, teacher = student_and_teacher(trainer)
    history = trainer.stage1(student, teacher, 0, "student").history
    assert history[-1]["fsp_loss"] < 0.9 * history[0]["fsp_loss"]


def test_stage_1_trains_the_student_up_to_the_last_map_and_nothing_behind_it(
    trainer: Trainer,
) -> None:
    student, teacher = student_and_teacher(trainer)
    before = weights_of(student)
    trainer.stage1(student, teacher, 0, "student")
    moved = changed(before, student)
    assert {"conv.weight", "stage1.0.conv1.weight", "stage3.0.conv2.weight"} <= moved
    assert not any(name.startswith("fc.") for name in moved)


def test_stage_1_leaves_the_teacher_bitwise_alone_and_in_evaluation_mode(trainer: Trainer) -> None:
    student, teacher = student_and_teacher(trainer)
    teacher.train()  # a caller who forgot: batch statistics would move its buffers
    before = weights_of(teacher)
    trainer.stage1(student, teacher, 0, "student")
    assert not changed(before, teacher)
    assert not any(module.training for module in teacher.modules())
    assert all(p.grad is None for p in teacher.parameters())


def test_stage_1_measures_without_moving_the_students_statistics(trainer: Trainer) -> None:
    # A phase of one step evaluates twice: only the step itself may count.
    trainer.config = dataclasses.replace(
        trainer.config, stage1=dataclasses.replace(trainer.config.stage1, steps=1)
    )
    student, teacher = student_and_teacher(trainer)
    trainer.stage1(student, teacher, 0, "student")
    assert student.get_buffer("bn.num_batches_tracked").item() == 1


def test_map_pairs_come_first_layer_then_second_in_the_recipes_order(trainer: Trainer) -> None:
    teacher = trainer.new_network(trainer.config.teacher, 1).eval()
    images = trainer.splits.test.images[:4]
    [(first, second), (third, fourth)] = tapped_pairs(teacher, trainer.teacher_paths, images)
    stage1 = teacher.stage1(teacher.relu(teacher.bn(teacher.conv(images))))
    stage2 = teacher.stage2(stage1)
    assert torch.equal(second, stage1)
    assert torch.equal(fourth, teacher.stage3(stage2))
    block = teacher.stage3[0]
    assert torch.equal(third, block.relu1(block.bn1(block.conv1(stage2))))
    assert first.shape == second.shape == (4, 16, 8, 8)


def test_the_task_starts_from_the_weights_it_is_given(trainer: Trainer) -> None:
    student, teacher = student_and_teacher(trainer)
    trainer.stage1(student, teacher, 0, "student")
    expected = trainer.evaluate_task(student.eval())
    phase = trainer.task(
        student, trainer.config.stage2, trainer.splits.train, 0, ("student", "task")
    )
    first = phase.history[0]
    assert {name: first[name] for name in expected} == expected


def test_the_task_learns(trainer: Trainer) -> None:
    training = dataclasses.replace(trainer.config.stage2, steps=40)
    student = trainer.new_network(trainer.config.student, 0)
    phase = trainer.task(student, training, trainer.splits.train, 0, ("student", "task"))
    assert phase.history[0]["accuracy"] < 0.3
    assert phase.history[-1]["accuracy"] > 0.7  # 40 images, 40 steps
    assert phase.history[-1]["train_loss"] < 0.5 * phase.history[1]["train_loss"]


def test_a_phase_is_evaluated_at_its_start_every_so_often_and_at_its_end(trainer: Trainer) -> None:
    student = trainer.new_network(trainer.config.student, 0)
    phase = trainer.task(
        student, trainer.config.stage2, trainer.splits.train, 0, ("student", "task")
    )
    assert [row["step"] for row in phase.history] == [0, 4, 6]
    assert ["train_loss" in row for row in phase.history] == [False, True, True]
    assert phase.seconds > 0


@pytest.mark.parametrize("split", ["validation", "test"])
def test_the_evaluated_split_is_the_recipes(trainer: Trainer, split: str) -> None:
    evaluation = dataclasses.replace(trainer.config.evaluation, split=split)
    trainer.config = dataclasses.replace(trainer.config, evaluation=evaluation)
    model = trainer.new_network(trainer.config.student, 0).eval()
    images, labels = getattr(trainer.splits, split)
    with torch.no_grad():
        right = (model(images).argmax(1) == labels).float().mean().item()
    assert trainer.evaluate_task(model)["accuracy"] == pytest.approx(right)


def test_the_rate_falls_at_the_milestones(trainer: Trainer) -> None:
    # With a rate of nothing after half of the steps, the second half must not move the weights.
    student = trainer.new_network(trainer.config.student, 0)
    short = dataclasses.replace(trainer.config.stage2, steps=4, weight_decay=0.0, momentum=0.0)
    long = dataclasses.replace(short, steps=8, milestones=(0.5,), decay=1e-30)
    images = trainer.splits.train
    trainer.task(student, dataclasses.replace(short, milestones=(1.0,)), images, 0, ("s", "task"))
    other = trainer.new_network(trainer.config.student, 0)
    trainer.task(other, long, images, 0, ("s", "task"))
    for ours, theirs in zip(student.parameters(), other.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_a_loss_that_is_no_longer_finite_stops_with_a_hint(trainer: Trainer) -> None:
    trainer.config = dataclasses.replace(
        trainer.config, stage1=dataclasses.replace(trainer.config.stage1, learning_rate=1e6)
    )
    student, teacher = student_and_teacher(trainer)
    with pytest.raises(DistillError, match=r"seed 0, stage 1: .* nan by step 4; try a smaller lea"):
        trainer.stage1(student, teacher, 0, "distilled seed 0")
