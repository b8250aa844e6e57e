"""The schema of recipes, the YAML files in ``configs/``."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import AfterValidator, Discriminator, Field, Strict, Tag, model_validator

from fsp_kernels.distill.settings import (
    Settings,
    is_within,
    load_yaml,
    override,
    read,
    to_tree,
    wrong,
)
from fsp_kernels.errors import did_you_mean

T = TypeVar("T")

# Every value has an upper bound, so that a mistake is an error at once and not during training.
MOST_STEPS = 10**8  # checkpoints are named by as many digits
_LARGEST = 1e38  # about the largest number in single precision
Count = Annotated[int, Field(ge=1, le=MOST_STEPS)]
Images = Annotated[int, Field(ge=10, le=10**9)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
Positive = Annotated[float, Field(gt=0, le=_LARGEST)]
NotNegative = Annotated[float, Field(ge=0, le=_LARGEST)]
Share = Annotated[float, Field(gt=0, le=1)]
Part = Annotated[float, Field(ge=0, lt=1)]
FilePath = Annotated[str, Field(min_length=1, max_length=4096)]
ModulePath = Annotated[str, Field(min_length=1, max_length=1000)]
# YAML has lists, which become tuples here.
TwoPaths = Annotated[tuple[ModulePath, ModulePath], Strict(False)]
Many = Annotated[tuple[T, ...], Strict(False), Field(min_length=1, max_length=1000)]

ArmName = Literal[
    "baseline", "baseline-long", "two-stage", "one-stage", "kd", "two-stage-kd", "one-stage-kd"
]
# The data sets by name, and which of ``_SOME_USE`` each of them uses.
_DATASETS: dict[str, tuple[str, ...]] = {
    "digits": (),
    "mnist5k": (),
    "cifar10": ("root", "download"),
    "cifar100": ("root", "download"),
    "imagefolder": ("root", "corrupt"),
}
_CALLABLE = ("arguments", "corrupt")
_SOME_USE = ("root", "download", "arguments", "corrupt")


class Data(Settings):
    """The images, and how many of the training pool the networks may see."""

    # digits and mnist5k come with their packages; cifar10, cifar100 and imagefolder are in root;
    # package.module:callable returns your own images, see fsp_kernels.distill.data.sources.
    dataset: Annotated[str, Field(max_length=1000)] = "digits"
    # For cifar10 and cifar100 the folder where torchvision keeps them; for imagefolder a folder
    # with train/CLASS/* and val/CLASS/*, as for ImageNet.
    root: FilePath | None = None
    download: bool = False  # download cifar10 or cifar100 into root if it is not there
    arguments: dict[str, Any] = Field(default_factory=dict)  # of the callable
    # What to do with unreadable images of an imagefolder or a callable. All are read before
    # training; an unreadable one is an error (refuse) or left out (skip). unchecked reads none
    # before training, for large sets; an unreadable one is then an error in the step that needs it.
    corrupt: Literal["refuse", "skip", "unchecked"] = "refuse"
    # Height and width in pixels; null for the set's own (imagefolder: 224).
    image_size: Annotated[int, Field(ge=4, le=4096)] | None = None
    train_images: Images | None = None  # the student's, of the teacher's; null for all of those
    teacher_images: Images | None = None  # of the training pool; null for all of it
    # Held out of the training pool; null for the set's own number.
    validation_images: Annotated[int, Field(ge=0, le=10**9)] | None = None
    augment: bool = True  # crop at random, and flip if a mirrored image keeps its class
    # Images of one optimiser step, over all processes and accumulated passes; batch normalisation
    # needs two.
    batch_size: Annotated[int, Field(ge=2, le=10**6)] = 32
    workers: Annotated[int, Field(ge=0, le=256)] = 0  # that load images, for each process

    @model_validator(mode="after")
    def _check_keys_of_data_set(self) -> Data:
        name = self.dataset
        used = _CALLABLE if ":" in name else _DATASETS.get(name)
        if used is None:
            known = f"{', '.join(_DATASETS)}, or package.module:callable"
            near = did_you_mean(name, _DATASETS)
            raise wrong("dataset", f"is {name!r}, must be {known}{near}")
        for key in _SOME_USE:
            default = type(self).model_fields[key].get_default(call_default_factory=True)
            if key not in used and getattr(self, key) != default:
                raise wrong(key, f"{name} does not use it")
        if "root" in used and self.root is None:
            raise wrong("root", f"missing; the folder of {name}")
        return self


class Network(Settings):
    """A network by name; the names are in ``fsp_kernels.distill.models``."""

    # cifar/resnet26, cifar/wrn16-2, torchvision/resnet18, timm/resnet18, or package.module:callable
    model: ModulePath
    arguments: dict[str, Any] = Field(default_factory=dict)  # of its constructor
    weights: FilePath | None = None  # to start from: the file of a state dict or of a checkpoint
    pretrained: bool = False  # start from the weights that torchvision or timm publish, downloaded
    # The path of the logits in an output that is a tuple, a mapping or an object, such as
    # :output[0] or :output.logits.
    logits: ModulePath | None = None


class Stop(Settings):
    """End a stage early by its own loss on the validation split."""

    patience: Count  # evaluations in a row without a lower loss


class Training(Settings):
    """One run of an optimiser."""

    steps: Count | None = None  # give steps or epochs
    epochs: Count | None = None
    optimizer: Literal["sgd", "adam", "adamw"] = "sgd"
    learning_rate: Positive  # after the warm-up
    momentum: Part = 0.9  # of sgd
    weight_decay: NotNegative = 1e-4
    # multistep multiplies the rate by decay at each of milestones; cosine lowers it to 0.
    schedule: Literal["multistep", "cosine", "constant"] = "multistep"
    # Shares of the steps.
    milestones: Annotated[tuple[Share, ...], Strict(False), Field(max_length=1000)] = (0.5, 0.75)
    decay: Share = 0.1
    warmup: Part = 0.0  # the share of the steps in which the rate rises from nearly 0
    clip: Positive | None = None  # the largest norm of the gradient
    stop: Stop | None = None

    @model_validator(mode="after")
    def _check_length(self) -> Training:
        if (self.steps is None) == (self.epochs is None):
            raise wrong("", "must have steps or epochs, one of the two")
        return self


class Source(Settings):
    """Another data set, on which the teacher is trained first (section 4.3 of the paper)."""

    data: Data
    training: Training


class Pair(Settings):
    """The two feature maps of one FSP matrix, by module path, in each network."""

    student: TwoPaths
    teacher: TwoPaths
    weight: NotNegative = 1.0  # of the pair's loss
    # As in fsp_kernels.fsp_loss: 1 for maps (B, C, *spatial), -1 for (B, *spatial, C). Maps of
    # three axes, such as a transformer's (B, T, C), need it.
    channel_dim: Annotated[int, Field(ge=-1, le=1)] | None = None


# The tags make an error speak of one member of the union only.
Pairs = Annotated[
    Annotated[Literal["auto", "family"], Tag("[name]")] | Annotated[Many[Pair], Tag("[list]")],
    Discriminator(
        lambda value: {str: "[name]", list: "[list]", tuple: "[list]"}.get(type(value)),
        custom_error_type="pairs",
        custom_error_message="Input should be 'auto', 'family' or a list of pairs",
    ),
]


class Fsp(Settings):
    """The FSP loss; ``pool`` and ``norm`` are those of ``fsp_kernels.fsp_loss``."""

    pool: Literal["max", "avg"] = "max"
    norm: Literal["frobenius", "mse", "column"] = "frobenius"
    # Where channels differ, learn a 1x1 convolution from the student's channels to the teacher's;
    # it is trained with the student and not kept.
    projection: bool = False
    beta: Positive = 1.0  # the weight beside the task loss, where both are minimised together
    # Keep the teacher's FSP matrices and logits on disk; needs data.augment=false.
    cache_teacher: bool = False


class SoftTargets(Settings):
    """Soft targets (Hinton, Vinyals, Dean, 2015): ``(1 - weight) * task + weight * T^2 KL``."""

    weight: Share = 0.9
    temperature: Positive = 4.0


class Execution(Settings):
    """How the networks are computed."""

    precision: Literal["fp32", "bf16", "fp16"] = "fp32"  # of autocast; fp16 needs a GPU
    # The passes whose gradients make one step, each over a part of its batch.
    accumulation: Annotated[int, Field(ge=1, le=10**6)] = 1
    channels_last: bool = False  # the memory format of images and weights
    compile: bool = False  # compile the networks with torch.compile
    sync_batch_norm: bool = False  # normalise by all processes' images; needs GPUs
    # Of each process on the CPU; null for PyTorch's choice.
    threads: Annotated[int, Field(ge=1, le=512)] | None = None


class Evaluation(Settings):
    """What is measured during training, and what the report quotes."""

    split: Literal["validation", "test"] = "test"  # the one that is quoted
    every: Count = 10  # steps
    targets: Many[Share] = (0.8, 0.9)  # accuracies; the report has the steps to reach each


class Checkpoints(Settings):
    """What an interrupted run is resumed from."""

    every: Count = 500  # steps


def _check_unique(values: tuple[T, ...]) -> tuple[T, ...]:
    if len(set(values)) < len(values):
        raise wrong("", f"is {list(values)}, must not hold one twice")
    return values


class Config(Settings):
    """One whole recipe."""

    name: Annotated[str, Field(max_length=100, pattern=r"^\w[\w.-]*$")]
    seeds: Annotated[Many[Seed], AfterValidator(_check_unique)] = (0,)
    teacher_seed: Seed = 1000
    arms: Annotated[Many[ArmName], AfterValidator(_check_unique)] = (
        "baseline",
        "baseline-long",
        "two-stage",
    )
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

    @model_validator(mode="after")
    def _check_sections_together(self) -> Config:
        batch, accumulation = self.data.batch_size, self.execution.accumulation
        if self.teacher_training is None:
            if self.source is not None:
                raise wrong("teacher_training", "missing; the source is trained on before it")
            if not (self.teacher.weights or self.teacher.pretrained):
                problem = "missing; without it, teacher.weights or teacher.pretrained is needed"
                raise wrong("teacher_training", problem)
        if self.fsp.cache_teacher and self.data.augment:
            problem = "is true, must be false while data.augment is true: images differ each epoch"
            raise wrong("fsp.cache_teacher", problem)
        if batch % accumulation:
            problem = f"is {batch}, must be a multiple of execution.accumulation ({accumulation})"
            raise wrong("data.batch_size", problem)
        return self


def load_config(path: Path, overrides: Sequence[str] = ()) -> Config:
    """Read a recipe from a YAML file and apply ``section.key=value`` overrides.

    By default its ``name`` is the stem of the file, with ``-`` for characters that a name can't
    have.

    Raises:
        DistillError: the file, a key or a value is wrong; the message names file, line and key.
    """
    tree, lines = load_yaml(path)
    tree.setdefault("name", re.sub(r"[^\w.-]+", "-", path.stem).lstrip("-.") or "recipe")
    overridden = override(tree, overrides)

    def place(key: str) -> str:
        if is_within(key, overridden):
            return ""
        while key and key not in lines:  # the section that the key is missing in
            key = key.rpartition(".")[0]
        return f"{path}, line {lines[key]}: " if key else f"{path}: "

    return read(Config, tree, place)


def dump_config(config: Config) -> str:
    """The recipe with every default filled in, as YAML that ``load_config`` reads back."""
    return yaml.safe_dump(to_tree(config), sort_keys=False, default_flow_style=None)
