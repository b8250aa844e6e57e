"""What a recipe says: the schema of the YAML files in ``configs/`` and nothing else."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import yaml

from fsp_kernels.distill.errors import DistillError, did_you_mean
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

_FOLDER_NAME = Rule(
    lambda name: re.fullmatch(r"\w[\w.-]*", name) is not None,
    "a folder name of letters, digits, '.', '_' and '-'",
)
_SHARE = Rule(lambda value: 0 < value <= 1, "more than 0 and at most 1")

# The keys of ``Data`` that not every data set has a use for, and who has.
_SOME_HAVE = ("root", "download", "arguments", "corrupt")
_DATASETS: dict[str, tuple[str, ...]] = {
    "digits": (),
    "mnist5k": (),
    "cifar10": ("root", "download"),
    "cifar100": ("root", "download"),
    "imagefolder": ("root", "corrupt"),
}
_CALLABLE = ("arguments", "corrupt")
ArmName = Literal[
    "baseline", "baseline-long", "two-stage", "one-stage", "kd", "two-stage-kd", "one-stage-kd"
]


@dataclass(frozen=True, kw_only=True)
class Data:
    """Which images, and how many of the training pool the networks may see.

    Attributes:
        dataset: ``digits`` and ``mnist5k`` come with their packages; ``cifar10``, ``cifar100`` and
            ``imagefolder`` are in ``root``; ``package.module:callable`` returns images of one's
            own, see ``fsp_kernels.distill.data.own``.
        root: of ``cifar10`` and ``cifar100`` the folder that torchvision keeps them in; of
            ``imagefolder`` one with ``train/CLASS/*`` and ``val/CLASS/*``, as ImageNet is kept.
        download: fetch ``cifar10`` or ``cifar100`` into ``root`` where it is not there.
        arguments: handed to the callable.
        corrupt: what becomes of images that cannot be read, of an ``imagefolder`` or a callable:
            all are read before training, and any such is an error (``refuse``) or left out
            (``skip``). ``unchecked`` leaves it to the step that draws one, for sets that are too
            large to be read at each start.
        image_size: height and width, pixels; ``None`` for the set's own (``imagefolder``: 224).
        train_images: the student's, drawn from the teacher's; ``None`` for all of those.
        teacher_images: drawn from the training pool; ``None`` for all of it.
        validation_images: held out of the training pool; ``None`` for the set's own number.
        augment: random crops and, where a mirrored image keeps its class, flips.
        batch_size: images of one optimiser step, over all processes and accumulated passes.
        workers: processes that load images, for each training process.
    """

    dataset: str = "digits"
    root: str | None = None
    download: bool = False
    arguments: dict[str, Any] = dataclasses.field(default_factory=dict)
    corrupt: Literal["refuse", "skip", "unchecked"] = "refuse"
    image_size: int | None = setting(at_least(4), None)
    train_images: int | None = setting(at_least(10), None)
    teacher_images: int | None = setting(at_least(10), None)
    validation_images: int | None = setting(at_least(0), None)
    augment: bool = True
    batch_size: int = setting(at_least(2), 32)  # batch normalisation needs two images
    workers: int = setting(at_least(0), 0)


@dataclass(frozen=True, kw_only=True)
class Network:
    """A network by name; ``fsp_kernels.distill.models`` says which names there are.

    Attributes:
        model: ``cifar/resnet26``, ``cifar/wrn16-2``, ``torchvision/resnet18``, ``timm/resnet18``,
            or ``package.module:callable``.
        arguments: handed to its constructor.
        weights: a ``.safetensors`` or ``.pt`` file of a state dict to start from.
        pretrained: start from the weights that torchvision or timm publish, downloaded.
    """

    model: str
    arguments: dict[str, Any] = dataclasses.field(default_factory=dict)
    weights: str | None = None
    pretrained: bool = False


@dataclass(frozen=True, kw_only=True)
class Stop:
    """End a stage early: after ``patience`` evaluations without a loss lower by ``min_delta``.

    The loss is the stage's own, on the validation split.
    """

    patience: int = setting(at_least(1))
    min_delta: float = setting(at_least(0), 0.0)


@dataclass(frozen=True, kw_only=True)
class Training:
    """One run of an optimiser.

    Attributes:
        steps: of the optimiser; or else ``epochs`` over the images.
        optimizer: by ``torch.optim``; ``momentum`` and ``nesterov`` are of ``sgd``.
        learning_rate: at the start, or at the end of the warm-up.
        weight_decay: as the optimiser takes it.
        schedule: ``multistep`` multiplies the rate by ``decay`` at each of ``milestones`` (shares
            of the steps), ``cosine`` takes it to 0.
        warmup: share of the steps in which the rate rises linearly from nearly 0.
        clip: largest norm of the gradient.
        stop: when to stop before ``steps``.
    """

    steps: int | None = setting(at_least(1), None)
    epochs: int | None = setting(at_least(1), None)
    optimizer: Literal["sgd", "adam", "adamw"] = "sgd"
    learning_rate: float = setting(more_than(0))
    momentum: float = setting(between(0, 1), 0.9)
    nesterov: bool = False
    weight_decay: float = setting(at_least(0), 1e-4)
    schedule: Literal["multistep", "cosine", "constant"] = "multistep"
    milestones: tuple[float, ...] = setting(_SHARE, (0.5, 0.75))
    decay: float = setting(_SHARE, 0.1)
    warmup: float = setting(between(0, 1), 0.0)
    clip: float | None = setting(more_than(0), None)
    stop: Stop | None = None


@dataclass(frozen=True, kw_only=True)
class Source:
    """Another data set, which the teacher is trained on first (the paper's section 4.3)."""

    data: Data
    training: Training


@dataclass(frozen=True, kw_only=True)
class Pair:
    """The two feature maps of one FSP matrix, by module path, in each network.

    ``channel_dim`` is the axis of the maps' channels, as in ``fsp_kernels.fsp_loss``: 1 for
    (B, C, *spatial), -1 for (B, *spatial, C); maps of three axes, as a transformer's (B, T, C),
    need it.
    """

    student: tuple[str, str]
    teacher: tuple[str, str]
    weight: float = setting(at_least(0), 1.0)
    channel_dim: int | None = setting(Rule(lambda value: value in (1, -1), "1 or -1"), None)


@dataclass(frozen=True, kw_only=True)
class Fsp:
    """The FSP loss: ``pool`` and ``norm`` as in ``fsp_kernels.fsp_loss``.

    Attributes:
        projection: where channels differ, a learnt 1x1 convolution takes the student's maps to the
            teacher's channels; it is trained with the student and not kept.
        beta: the loss's weight beside the task's, where both are minimised together.
        cache_teacher: keep the teacher's FSP matrices and logits on disk; needs ``augment: false``.
    """

    pool: Literal["max", "avg"] = "max"
    norm: Literal["frobenius", "mse", "column"] = "frobenius"
    projection: bool = False
    beta: float = setting(more_than(0), 1.0)
    cache_teacher: bool = False


@dataclass(frozen=True, kw_only=True)
class SoftTargets:
    """Soft targets (Hinton, Vinyals, Dean, 2015): ``(1 - weight) * task + weight * T^2 KL``."""

    weight: float = setting(_SHARE, 0.9)
    temperature: float = setting(more_than(0), 4.0)


@dataclass(frozen=True, kw_only=True)
class Execution:
    """How the arithmetic is done.

    Attributes:
        precision: of the forward passes, by autocast; ``fp16`` scales the loss and needs a GPU.
        accumulation: passes whose gradients make one step, each over a part of its batch.
        channels_last: the memory format of images and weights.
        compile: ``torch.compile`` the networks.
        sync_batch_norm: normalise by the statistics of all processes' images.
        threads: of each process on the CPU; ``None`` leaves PyTorch's choice.
    """

    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    accumulation: int = setting(at_least(1), 1)
    channels_last: bool = False
    compile: bool = False
    sync_batch_norm: bool = False
    threads: int | None = setting(at_least(1), None)


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Which split is quoted, how often (steps), and which accuracies the step counts are about."""

    split: Literal["validation", "test"] = "test"
    every: int = setting(at_least(1), 10)
    targets: tuple[float, ...] = setting(_SHARE, (0.8, 0.9))


@dataclass(frozen=True, kw_only=True)
class Checkpoints:
    """What a run can be resumed from: written each ``every`` steps, the last ``keep`` are kept."""

    every: int = setting(at_least(1), 500)
    keep: int = setting(at_least(2), 2)  # of a damaged one and the one before, the latter serves


@dataclass(frozen=True, kw_only=True)
class Config:
    """One whole recipe."""

    name: str = setting(_FOLDER_NAME)
    seeds: tuple[int, ...] = setting(at_least(0), (0,))
    teacher_seed: int = setting(at_least(0), 1000)
    arms: tuple[ArmName, ...] = ("baseline", "baseline-long", "two-stage")
    data: Data
    source: Source | None = None
    teacher: Network
    teacher_training: Training | None = None
    student: Network
    pairs: Literal["auto", "family"] | tuple[Pair, ...] = "auto"
    fsp: Fsp = Fsp()
    stage1: Training
    stage2: Training
    kd: SoftTargets = SoftTargets()
    execution: Execution = Execution()
    evaluation: Evaluation = Evaluation()
    checkpoints: Checkpoints = Checkpoints()


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
    _check(config)
    return config


def dump_config(config: Config) -> str:
    """The recipe with every default filled in, as YAML that ``load_config`` reads back."""
    return yaml.safe_dump(to_tree(config), sort_keys=False, default_flow_style=None)


def _check(config: Config) -> None:
    """What no single key can tell."""
    for key in ("seeds", "arms"):
        values = getattr(config, key)
        if len(set(values)) < len(values):
            raise DistillError(f"{key}: is {list(values)}, must not hold one twice")
    _check_data(config.data, "data")
    trainings = {name: getattr(config, name) for name in ("stage1", "stage2", "teacher_training")}
    if config.source is not None:
        _check_data(config.source.data, "source.data")
        trainings["source.training"] = config.source.training
        if config.teacher_training is None:
            raise DistillError("teacher_training: missing; the source is trained on before it")
    for name, training in trainings.items():
        if training is not None and (training.steps is None) == (training.epochs is None):
            raise DistillError(f"{name}: must have steps or epochs, one of the two")
    if config.teacher_training is None and not (
        config.teacher.weights or config.teacher.pretrained
    ):
        raise DistillError(
            "teacher_training: missing; a teacher needs it, or else teacher.weights or "
            "teacher.pretrained"
        )
    if config.fsp.cache_teacher and config.data.augment:
        raise DistillError(
            "fsp.cache_teacher: is true, must be false while data.augment is true: each epoch "
            "shows the teacher other images"
        )
    if config.data.batch_size % config.execution.accumulation:
        raise DistillError(
            f"data.batch_size: is {config.data.batch_size}, must be a multiple of "
            f"execution.accumulation ({config.execution.accumulation})"
        )


def _check_data(data: Data, where: str) -> None:
    keys = _CALLABLE if ":" in data.dataset else _DATASETS.get(data.dataset)
    if keys is None:
        raise DistillError(
            f"{where}.dataset: is {data.dataset!r}, must be one of {', '.join(_DATASETS)}, or "
            f"package.module:callable{did_you_mean(data.dataset, _DATASETS)}"
        )
    for key in _SOME_HAVE:
        if key not in keys and getattr(data, key) != getattr(Data(), key):
            raise DistillError(f"{where}.{key}: {data.dataset} has none")
    if "root" in keys and data.root is None:
        raise DistillError(f"{where}.root: missing; the folder that {data.dataset} is in")
    counts = ("batch_size", "train_images", "teacher_images")
    given = [(key, getattr(data, key)) for key in counts if getattr(data, key) is not None]
    for (key, count), (limit_key, limit) in pairwise(given):
        if count > limit:
            raise DistillError(
                f"{where}.{key}: is {count}, must be at most {where}.{limit_key} ({limit})"
            )
