"""What a recipe says: the schema of the YAML files in ``configs/`` and nothing else."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import yaml

from fsp_kernels.distill.errors import DistillError
from fsp_kernels.distill.settings import (
    Rule,
    at_least,
    between,
    load_yaml,
    more_than,
    override,
    read,
    setting,
    to_tree,
)

_RESNET_DEPTH = Rule(lambda d: d >= 8 and d % 6 == 2, "6n + 2, as in 8, 14, 20, 26, 32, 56")
_FOLDER_NAME = Rule(
    lambda name: re.fullmatch(r"\w[\w.-]*", name) is not None,
    "a folder name of letters, digits, '.', '_' and '-'",
)
_SHARE = Rule(lambda value: 0 < value <= 1, "more than 0 and at most 1")


@dataclass(frozen=True, kw_only=True)
class Data:
    """Which images, and how many of the training pool the networks may see.

    The student's ``train_images`` are among the teacher's ``teacher_images``.
    """

    dataset: Literal["digits"] = "digits"
    train_images: int = setting(at_least(10), 200)
    teacher_images: int = setting(at_least(10), 200)
    batch_size: int = setting(at_least(2), 32)  # batch normalisation needs two images


@dataclass(frozen=True, kw_only=True)
class Network:
    """A CIFAR-style ResNet: ``depth = 6n + 2``, channels 16-32-64 times ``width``."""

    depth: int = setting(_RESNET_DEPTH)
    width: int = setting(at_least(1), 1)


@dataclass(frozen=True, kw_only=True)
class Training:
    """SGD with momentum; the rate is multiplied by ``decay`` at each milestone.

    ``steps`` and ``milestones`` count optimiser steps; a milestone is a share of ``steps``.
    """

    steps: int = setting(at_least(1))
    learning_rate: float = setting(more_than(0))
    momentum: float = setting(between(0, 1), 0.9)
    weight_decay: float = setting(at_least(0), 1e-4)
    milestones: tuple[float, ...] = setting(_SHARE, (0.5, 0.75))
    decay: float = setting(_SHARE, 0.1)


@dataclass(frozen=True, kw_only=True)
class Pair:
    """The two feature maps of one FSP matrix, by module path, in each network."""

    student: tuple[str, str]
    teacher: tuple[str, str]
    weight: float = setting(at_least(0), 1.0)


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Which split is quoted, how often, and which accuracies the step counts are about."""

    split: Literal["validation", "test"] = "test"
    every: int = setting(at_least(1), 10)
    targets: tuple[float, ...] = setting(_SHARE, (0.8, 0.9))


@dataclass(frozen=True, kw_only=True)
class Config:
    """One whole recipe."""

    name: str = setting(_FOLDER_NAME)
    seeds: tuple[int, ...] = setting(at_least(0))
    teacher_seed: int = setting(at_least(0), 1000)
    threads: int = setting(at_least(1), 1)
    data: Data = Data()
    teacher: Network
    teacher_training: Training
    student: Network
    pairs: tuple[Pair, ...]
    stage1: Training
    stage2: Training
    evaluation: Evaluation = Evaluation()


def load_config(path: Path, overrides: Sequence[str] = ()) -> Config:
    """Read a recipe and apply ``section.key=value`` overrides.

    Args:
        path: a YAML file; its stem is the recipe's name unless the file sets ``name``.
        overrides: applied in order, values read as YAML.

    Raises:
        DistillError: the file, a key or a value is wrong; the message names it.
    """
    tree = load_yaml(path)
    tree.setdefault("name", path.stem)
    override(tree, overrides)
    config = read(Config, tree)
    if len(set(config.seeds)) < len(config.seeds):
        raise DistillError(f"seeds: is {list(config.seeds)}, must not hold a seed twice")
    data = config.data
    if data.batch_size > data.train_images:
        raise DistillError(
            f"data.batch_size: is {data.batch_size}, must be at most "
            f"data.train_images ({data.train_images})"
        )
    if data.train_images > data.teacher_images:
        raise DistillError(
            f"data.train_images: is {data.train_images}, must be at most "
            f"data.teacher_images ({data.teacher_images})"
        )
    return config


def dump_config(config: Config) -> str:
    """The recipe with every default filled in, as YAML that ``load_config`` reads back."""
    return yaml.safe_dump(to_tree(config), sort_keys=False, default_flow_style=None)
