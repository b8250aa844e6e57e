"""What a recipe says: the schema of the YAML files in ``configs/`` and nothing else."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import Discriminator, Field, Tag

from fsp_kernels.distill.errors import did_you_mean
from fsp_kernels.distill.settings import (
    AS_TUPLE,
    SettingError,
    Settings,
    load_yaml,
    must,
    override,
    read,
    to_tree,
)

T = TypeVar("T")

# No value is without an upper bound: what cannot be meant is told at once, not by what breaks.
MOST_STEPS = 10**8  # of which the names of checkpoints have digits
_LARGEST = 1e38  # about what single precision holds
Count = Annotated[int, Field(ge=1, le=MOST_STEPS)]
Images = Annotated[int, Field(ge=10, le=10**9)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
Positive = Annotated[float, Field(gt=0, le=_LARGEST)]
NotNegative = Annotated[float, Field(ge=0, le=_LARGEST)]
Share = Annotated[float, Field(gt=0, le=1)]
Part = Annotated[float, Field(ge=0, lt=1)]
FilePath = Annotated[str, Field(min_length=1, max_length=4096)]
ModulePath = Annotated[str, Field(min_length=1, max_length=1000)]
TwoPaths = Annotated[tuple[ModulePath, ModulePath], AS_TUPLE]
Many = Annotated[tuple[T, ...], Field(min_length=1, max_length=1000), AS_TUPLE]

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


class Data(Settings):
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

    dataset: Annotated[str, Field(max_length=1000)] = "digits"
    root: FilePath | None = None
    download: bool = False
    arguments: dict[str, Any] = Field(default_factory=dict)
    corrupt: Literal["refuse", "skip", "unchecked"] = "refuse"
    image_size: Annotated[int, Field(ge=4, le=4096)] | None = None
    train_images: Images | None = None
    teacher_images: Images | None = None
    validation_images: Annotated[int, Field(ge=0, le=10**9)] | None = None
    augment: bool = True
    # Batch normalisation needs two images.
    batch_size: Annotated[int, Field(ge=2, le=10**6)] = 32
    workers: Annotated[int, Field(ge=0, le=256)] = 0


class Network(Settings):
    """A network by name; ``fsp_kernels.distill.models`` says which names there are.

    Attributes:
        model: ``cifar/resnet26``, ``cifar/wrn16-2``, ``torchvision/resnet18``, ``timm/resnet18``,
            or ``package.module:callable``.
        arguments: handed to its constructor.
        weights: to start from: a file of a state dict, or one of a training script that holds it.
        pretrained: start from the weights that torchvision or timm publish, downloaded.
        logits: where they are, if the network gives a tuple, a mapping or an object: a path in that
            output, as ``:output[0]`` or ``:output.logits``.
    """

    model: ModulePath
    arguments: dict[str, Any] = Field(default_factory=dict)
    weights: FilePath | None = None
    pretrained: bool = False
    logits: ModulePath | None = None


class Stop(Settings):
    """End a stage early: after ``patience`` evaluations without a loss lower by ``min_delta``.

    The loss is the stage's own, on the validation split.
    """

    patience: Count
    min_delta: NotNegative = 0.0


class Training(Settings):
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

    steps: Count | None = None
    epochs: Count | None = None
    optimizer: Literal["sgd", "adam", "adamw"] = "sgd"
    learning_rate: Positive
    momentum: Part = 0.9
    nesterov: bool = False
    weight_decay: NotNegative = 1e-4
    schedule: Literal["multistep", "cosine", "constant"] = "multistep"
    milestones: Annotated[tuple[Share, ...], Field(max_length=1000), AS_TUPLE] = (0.5, 0.75)
    decay: Share = 0.1
    warmup: Part = 0.0
    clip: Positive | None = None
    stop: Stop | None = None


class Source(Settings):
    """Another data set, which the teacher is trained on first (the paper's section 4.3)."""

    data: Data
    training: Training


class Pair(Settings):
    """The two feature maps of one FSP matrix, by module path, in each network.

    ``channel_dim`` is the axis of the maps' channels, as in ``fsp_kernels.fsp_loss``: 1 for
    (B, C, *spatial), -1 for (B, *spatial, C); maps of three axes, as a transformer's (B, T, C),
    need it.
    """

    student: TwoPaths
    teacher: TwoPaths
    weight: NotNegative = 1.0
    channel_dim: Annotated[int, Field(ge=-1, le=1), must(bool, "1 or -1")] | None = None


def _kind_of_pairs(value: object) -> str | None:
    """Which member of ``Pairs`` a value is to be, so that an error is about that one."""
    if isinstance(value, (list, tuple)):
        return "list"
    return "name" if isinstance(value, str) else None


Pairs = Annotated[
    Annotated[Literal["auto", "family"], Tag("name")] | Annotated[Many[Pair], Tag("list")],
    Discriminator(
        _kind_of_pairs,
        custom_error_type="pairs",
        custom_error_message="'auto', 'family', or a list of pairs",
    ),
]


class Fsp(Settings):
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
    beta: Positive = 1.0
    cache_teacher: bool = False


class SoftTargets(Settings):
    """Soft targets (Hinton, Vinyals, Dean, 2015): ``(1 - weight) * task + weight * T^2 KL``."""

    weight: Share = 0.9
    temperature: Positive = 4.0


class Execution(Settings):
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
    accumulation: Annotated[int, Field(ge=1, le=10**6)] = 1
    channels_last: bool = False
    compile: bool = False
    sync_batch_norm: bool = False
    threads: Annotated[int, Field(ge=1, le=512)] | None = None


class Evaluation(Settings):
    """Which split is quoted, how often (steps), and which accuracies the step counts are about."""

    split: Literal["validation", "test"] = "test"
    every: Count = 10
    targets: Many[Share] = (0.8, 0.9)


class Checkpoints(Settings):
    """What a run can be resumed from: written each ``every`` steps, the last ``keep`` are kept."""

    every: Count = 500
    # Of a damaged one and the one before, the latter serves.
    keep: Annotated[int, Field(ge=2, le=1000)] = 2


class Config(Settings):
    """One whole recipe."""

    name: Annotated[
        str,
        Field(max_length=100),
        must(
            re.compile(r"\w[\w.-]*").fullmatch,
            "a folder name of letters, digits, '.', '_' and '-'",
        ),
    ]
    seeds: Many[Seed] = (0,)
    teacher_seed: Seed = 1000
    arms: Many[ArmName] = ("baseline", "baseline-long", "two-stage")
    data: Data
    source: Source | None = None
    teacher: Network
    teacher_training: Training | None = None
    student: Network
    pairs: Pairs = "auto"
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
        path: a YAML file; unless it sets ``name``, the recipe's name is its stem, with ``-`` for
            what a name can't have.
        overrides: applied in order, values read as YAML.

    Raises:
        DistillError: the file, a key or a value is wrong; the message names it.
    """
    tree, lines = load_yaml(path)
    tree.setdefault("name", re.sub(r"[^\w.-]+", "-", path.stem).lstrip("-.") or "recipe")
    overridden = override(tree, overrides)
    try:
        config = read(Config, tree)
        _check(config)
    except SettingError as error:
        raise error.in_file(path, lines, overridden) from None
    return config


def dump_config(config: Config) -> str:
    """The recipe with every default filled in, as YAML that ``load_config`` reads back."""
    return yaml.safe_dump(to_tree(config), sort_keys=False, default_flow_style=None)


def _check(config: Config) -> None:
    """What no single key can tell."""
    for key in ("seeds", "arms"):
        values = getattr(config, key)
        if len(set(values)) < len(values):
            raise SettingError((key, f"is {list(values)}, must not hold one twice"))
    _check_data(config.data, "data")
    trainings = {name: getattr(config, name) for name in ("stage1", "stage2", "teacher_training")}
    if config.source is not None:
        _check_data(config.source.data, "source.data")
        trainings["source.training"] = config.source.training
        if config.teacher_training is None:
            raise SettingError(("teacher_training", "missing; the source is trained on before it"))
    for name, training in trainings.items():
        if training is not None and (training.steps is None) == (training.epochs is None):
            raise SettingError((name, "must have steps or epochs, one of the two"))
    if config.teacher_training is None and not (
        config.teacher.weights or config.teacher.pretrained
    ):
        problem = "missing; a teacher needs it, or else teacher.weights or teacher.pretrained"
        raise SettingError(("teacher_training", problem))
    if config.fsp.cache_teacher and config.data.augment:
        problem = (
            "is true, must be false while data.augment is true: each epoch shows the teacher other "
            "images"
        )
        raise SettingError(("fsp.cache_teacher", problem))
    accumulation = config.execution.accumulation
    if config.data.batch_size % accumulation:
        problem = (
            f"is {config.data.batch_size}, must be a multiple of execution.accumulation "
            f"({accumulation})"
        )
        raise SettingError(("data.batch_size", problem))


def _check_data(data: Data, where: str) -> None:
    keys = _CALLABLE if ":" in data.dataset else _DATASETS.get(data.dataset)
    if keys is None:
        known = f"{', '.join(_DATASETS)}, or package.module:callable"
        near = did_you_mean(data.dataset, _DATASETS)
        raise SettingError((f"{where}.dataset", f"is {data.dataset!r}, must be {known}{near}"))
    for key in _SOME_HAVE:
        if key not in keys and getattr(data, key) != getattr(Data(), key):
            raise SettingError((f"{where}.{key}", f"{data.dataset} has none"))
    if "root" in keys and data.root is None:
        raise SettingError((f"{where}.root", f"missing; the folder that {data.dataset} is in"))
    counts = ("batch_size", "train_images", "teacher_images")
    given = [(key, getattr(data, key)) for key in counts if getattr(data, key) is not None]
    for (key, count), (limit_key, limit) in pairwise(given):
        if count > limit:
            problem = f"is {count}, must be at most {where}.{limit_key} ({limit})"
            raise SettingError((f"{where}.{key}", problem))
