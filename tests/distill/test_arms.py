"""The ways to train a student: which stages, how long, on which losses."""

from __future__ import annotations

import pytest

from fsp_kernels.distill.arms import ARMS, TrainingStage
from fsp_kernels.distill.config import Config, Training


def count(training: Training) -> int:
    return training.steps or 1000 * (training.epochs or 0)


def stages(config: Config, arm: str) -> tuple[TrainingStage, ...]:
    return ARMS[arm].stages(config, count)


@pytest.mark.parametrize(
    ("arm", "expected"),
    [
        ("baseline", [(6, ["cross-entropy"])]),
        ("baseline-long", [(14, ["cross-entropy"])]),
        ("two-stage", [(8, ["FSP loss"]), (6, ["cross-entropy"])]),
        ("one-stage", [(14, ["cross-entropy", "FSP loss"])]),
        ("kd", [(14, ["cross-entropy", "soft targets"])]),
        ("two-stage-kd", [(8, ["FSP loss"]), (6, ["cross-entropy", "soft targets"])]),
        ("one-stage-kd", [(14, ["cross-entropy", "soft targets", "FSP loss"])]),
    ],
)
def test_an_arm_is_its_stages(config: Config, arm: str, expected: list[object]) -> None:
    assert [(stage.steps, stage.losses) for stage in stages(config, arm)] == expected


def test_all_arms_but_the_short_baseline_take_as_many_steps(config: Config) -> None:
    totals = {arm: sum(stage.steps for stage in stages(config, arm)) for arm in ARMS}
    assert totals.pop("baseline") == 6
    assert set(totals.values()) == {14}


def test_each_stage_has_its_own_training(config: Config) -> None:
    first, second = stages(config, "two-stage")
    assert first.training is config.stage1
    assert second.training is config.stage2


def test_only_arms_with_a_teachers_loss_need_one(config: Config) -> None:
    needing = {arm for arm in ARMS if any(s.needs_teacher for s in stages(config, arm))}
    assert needing == set(ARMS) - {"baseline", "baseline-long"}


def test_the_joint_loss_is_weighted_by_beta(config: Config) -> None:
    [stage] = stages(config, "one-stage")
    assert stage.fsp == config.fsp.beta
    assert stages(config, "two-stage")[0].fsp == 1.0
