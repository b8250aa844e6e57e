"""Which settings of a run may change when it is resumed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fsp_kernels.distill.arms import TrainingStage
from fsp_kernels.distill.config import Training
from fsp_kernels.distill.schedule import rate
from fsp_kernels.distill.settings import is_within, read, to_tree
from fsp_kernels.errors import DistillError

Tree = Mapping[str, Any]

# These change where the images are, how fast training is and what is measured, not what is learnt.
_FREE = (
    *(f"data.{key}" for key in ("root", "download", "corrupt", "workers")),
    *(f"source.data.{key}" for key in ("root", "download", "corrupt", "workers")),
    "evaluation.every",
    "evaluation.targets",
    "execution.threads",
)
# A stage's end and rates depend on these. They may change if the steps taken had the same rates.
_FREE_OF_A_STAGE = ("steps", "stop", "learning_rate", "schedule", "milestones", "decay", "warmup")


def settings_of(stages: Sequence[TrainingStage]) -> dict[str, Any]:
    """The settings of stages, by the section of the recipe that each is trained by.

    ``steps`` is the number of steps of the stage, also where the recipe gives epochs.
    """
    tree: dict[str, Any] = {}
    for stage in stages:
        tree[stage.section] = to_tree(stage.training) | {
            "steps": stage.steps,
            "epochs": None,
            "losses": stage.losses,
            "fsp": stage.fsp,
        }
        if stage.kd is not None:
            tree["kd"] = to_tree(stage.kd)
    return tree


def differing(before: Any, now: Any, key: str = "") -> list[str]:
    """The dotted keys, below ``key``, of the values that differ between two trees."""
    if not (isinstance(before, Mapping) and isinstance(now, Mapping)):
        return [] if before == now else [key]
    found = []
    for name in sorted(before.keys() | now.keys()):
        found += differing(before.get(name), now.get(name), f"{key}.{name}" if key else name)
    return found


def check_changes(
    place: Path,
    before: Tree,
    now: Tree,
    stages: Sequence[TrainingStage],
    done: int | None = None,
    step: int = 0,
) -> None:
    """Check that a run would be at the same weights if it had been trained under ``now``.

    ``stages`` are those of ``now``, of which ``done`` are finished (``None``: all); the next one
    has taken ``step`` steps. ``place`` names the run in the message.

    Raises:
        DistillError: it would not; the message names the keys.
    """
    done = len(stages) if done is None else done
    begun = stages[: done + (step > 0)]
    free = {*_FREE, *(stage.section for stage in stages[len(begun) :])}
    if any(stage.training.stop for stage in begun):
        free.remove("evaluation.every")  # a stopping rule counts evaluations
    if not any(stage.kd for stage in begun):
        free.add("kd")
    if step and _same_rates(before, stages[done], step):
        free |= {f"{stages[done].section}.{key}" for key in _FREE_OF_A_STAGE}
    others = [key for key in differing(before, now) if not is_within(key, free)]
    if others:
        raise DistillError(
            f"{place}: was trained under other settings than these: {', '.join(others)}; --restart "
            f"begins again, --output with another folder keeps both"
        )


def _same_rates(before: Tree, stage: TrainingStage, step: int) -> bool:
    """Whether the first ``step`` steps of a stage had the learning rates of ``stage``."""
    section = before.get(stage.section)
    if section is None or step > stage.steps:
        return False
    earlier = read(Training, {key: section[key] for key in Training.model_fields})
    return all(
        rate(earlier, section["steps"], t) == rate(stage.training, stage.steps, t)
        for t in range(step)
    )
