"""Which settings may change when a run is resumed, by what it has trained so far."""

from __future__ import annotations

from pathlib import Path

import pytest

from fsp_kernels.distill.arms import ARMS, TrainingStage
from fsp_kernels.distill.changes import check_changes, differing, settings_of
from fsp_kernels.distill.config import Config, load_config
from fsp_kernels.distill.settings import to_tree
from fsp_kernels.errors import DistillError


def described(config: Config, arm: str) -> tuple[tuple[TrainingStage, ...], dict[str, object]]:
    stages = ARMS[arm].stages(config, lambda training: training.steps or 0)
    tree = to_tree(config)
    names = ("data", "student", "execution", "evaluation")
    return stages, {name: tree[name] for name in names} | settings_of(stages)


def refused(recipe: Path, change: str, arm: str, done: int | None, step: int) -> str:
    """The keys that are named if a run of so many stages and steps can't be resumed, else ""."""
    before = described(load_config(recipe), arm)[1]
    stages, now = described(load_config(recipe, [change]), arm)
    try:
        check_changes(Path("run"), before, now, stages, done, step)
    except DistillError as error:
        return str(error).split("these: ")[1].split(";")[0]
    return ""


@pytest.mark.parametrize(
    ("change", "keys"),
    [
        # Nothing that was learnt depends on these.
        ("data.workers=3", ""),
        ("data.root=null", ""),
        ("execution.threads=7", ""),
        ("evaluation.every=1", ""),
        ("evaluation.targets=[0.3]", ""),
        # All steps depend on these.
        ("data.batch_size=10", "data.batch_size"),
        ("data.augment=true", "data.augment"),
        ("student.arguments={width: 2}", "student.arguments.width"),
        ("execution.accumulation=2", "execution.accumulation"),
        ("evaluation.split=test", "evaluation.split"),
    ],
)
@pytest.mark.parametrize(("done", "step"), [(None, 0), (0, 0), (1, 3)])
def test_some_settings_may_always_change_and_some_never(
    recipe: Path, change: str, keys: str, done: int | None, step: int
) -> None:
    assert refused(recipe, change, "two-stage", done, step) == keys


# The tiny recipe's stage 1 has 8 steps, stage 2 has 6, whose rate falls at steps 3 and 4.
@pytest.mark.parametrize(
    ("change", "done", "step", "keys"),
    [
        ("stage1.clip=1", 0, 0, ""),
        ("stage1.clip=1", 0, 1, "stage1.clip"),
        ("stage1.clip=1", 1, 0, "stage1.clip"),
        ("stage2.clip=1", 0, 5, ""),
        ("stage2.clip=1", 1, 0, ""),
        ("stage2.clip=1", 1, 1, "stage2.clip"),
        ("stage2.clip=1", None, 0, "stage2.clip"),
        ("stage2.steps=9", 1, 3, ""),  # three of either at the full rate
        ("stage2.steps=9", 1, 4, "stage2.steps"),
        ("stage2.steps=9", None, 0, "stage2.steps"),
        ("stage2.steps=3", 1, 1, ""),
        ("stage2.steps=3", 1, 4, "stage2.steps"),
        ("stage2.milestones=[0.5, 0.9]", 1, 4, ""),
        ("stage2.milestones=[0.3, 0.9]", 1, 4, "stage2.milestones"),
        ("stage2.schedule=constant", 1, 3, ""),
        ("stage2.schedule=constant", 1, 4, "stage2.schedule"),
        ("stage2.learning_rate=0.04", 1, 1, "stage2.learning_rate"),
        ("stage2.momentum=0.8", 1, 1, "stage2.momentum"),
        ("stage2.stop={patience: 2}", 1, 3, ""),
    ],
)
def test_a_stage_may_change_if_the_steps_taken_would_have_been_the_same(
    recipe: Path, change: str, done: int | None, step: int, keys: str
) -> None:
    assert refused(recipe, change, "two-stage", done, step) == keys


@pytest.mark.parametrize(
    ("change", "arm", "done", "step", "keys"),
    [
        ("kd.weight=0.5", "two-stage", None, 0, ""),
        ("kd.weight=0.5", "two-stage-kd", 0, 5, ""),
        ("kd.weight=0.5", "two-stage-kd", 1, 1, "kd.weight"),
        ("kd.weight=0.5", "kd", None, 0, "kd.weight"),
        ("stage1.clip=1", "baseline-long", None, 0, ""),
        ("stage1.steps=9", "baseline", None, 0, ""),
        ("stage1.steps=9", "baseline-long", None, 0, "stage2.steps"),
        ("fsp.beta=1e-6", "one-stage", None, 0, "stage2.fsp"),
        ("fsp.beta=1e-6", "two-stage", None, 0, ""),
    ],
)
def test_an_arm_depends_only_on_what_it_is_trained_by(
    recipe: Path, change: str, arm: str, done: int | None, step: int, keys: str
) -> None:
    assert refused(recipe, change, arm, done, step) == keys


def test_a_stage_cannot_end_before_the_steps_it_has_taken(recipe: Path) -> None:
    constant = "stage2: {steps: 6, schedule: constant,"
    recipe.write_text(recipe.read_text().replace("stage2: {steps: 6,", constant))
    assert refused(recipe, "stage2.steps=4", "two-stage", 1, 4) == ""
    assert refused(recipe, "stage2.steps=3", "two-stage", 1, 4) == "stage2.steps"


def test_a_stopping_rule_counts_evaluations(recipe: Path) -> None:
    recipe.write_text(recipe.read_text().replace("{steps: 8,", "{steps: 8, stop: {patience: 2},"))
    assert refused(recipe, "evaluation.every=1", "two-stage", 0, 1) == "evaluation.every"
    assert refused(recipe, "evaluation.every=1", "two-stage", 0, 0) == ""
    assert refused(recipe, "evaluation.every=1", "baseline", 0, 1) == ""


def test_differing_keys_are_dotted_and_in_order() -> None:
    before = {"b": {"x": 1, "y": [1, 2]}, "a": 1, "c": None}
    now = {"b": {"x": 2, "y": [1, 3]}, "a": 1, "c": {"z": 1}, "d": 0}
    assert differing(before, now) == ["b.x", "b.y", "c", "d"]
