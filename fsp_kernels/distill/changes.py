"""Which settings of a run may change between two of its processes, and which would change it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from fsp_kernels.distill.arms import Stage
from fsp_kernels.distill.config import Training
from fsp_kernels.distill.errors import DistillError
from fsp_kernels.distill.schedule import rate
from fsp_kernels.distill.settings import is_within, read, to_tree

Tree = Mapping[str, Any]

# Where the images are, how fast it goes, and what is looked at on the way: not what is learnt.
_FREE = (
    *(
        f"{data}.{key}"
        for data in ("data", "source.data")
        for key in ("root", "download", "corrupt", "workers")
    ),
    "evaluation.every",
    "evaluation.targets",
    "execution.threads",
)
# What a stage's end and rates come from. They are free where the steps taken had the same rates.
_FREE_OF_A_STAGE = ("steps", "stop", "learning_rate", "schedule", "milestones", "decay", "warmup")


def settings_of(stages: Sequence[Stage]) -> dict[str, Any]:
    """The part of a run's settings that its stages make: by the recipe's section of each.

    Epochs are worked out: they are ``steps``, of all that the stage takes.
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


def differing(before: Tree, now: Tree) -> list[str]:
    """The dotted keys whose values are not the same in both trees."""
    return sorted(_differing(before, now, ""))


def check_changes(
    place: Path,
    before: Tree,
    now: Tree,
    stages: Sequence[Stage],
    done: int | None = None,
    step: int = 0,
) -> None:
    """What a run has learnt so far, it would have learnt under its new settings, too.

    Args:
        place: where it is, for messages.
        before: the settings that it was trained under so far.
        now: those that it is to go on under.
        stages: its stages now.
        done: how many of them are finished; ``None`` for all.
        step: the steps that the next one has taken.

    Raises:
        DistillError: it would not; the message names the keys.
    """
    done = len(stages) if done is None else done
    begun = stages[: done + (step > 0)]
    free = set(_FREE)
    if any(stage.training.stop for stage in begun):
        free.discard("evaluation.every")  # a stopping rule counts evaluations
    free |= {stage.section for stage in stages[len(begun) :]}
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


def _same_rates(before: Tree, stage: Stage, step: int) -> bool:
    """All steps so far had the learning rates that they would have now, and there are as many."""
    section = before.get(stage.section)
    if section is None:
        return False
    earlier = read(Training, {key: section[key] for key in Training.model_fields})
    return step <= stage.steps and all(
        rate(earlier, section["steps"], t) == rate(stage.training, stage.steps, t)
        for t in range(step)
    )


def _differing(before: Any, now: Any, dotted: str) -> Iterator[str]:
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        for key in before.keys() | now.keys():
            where = f"{dotted}.{key}" if dotted else key
            yield from _differing(before.get(key), now.get(key), where)
    elif before != now:
        yield dotted
