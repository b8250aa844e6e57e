"""Pairs of feature maps: finding them, checking that networks fit, projecting channels."""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from torch import Tensor, nn

from fsp_kernels import checks
from fsp_kernels.errors import DistillError, prefixed
from fsp_kernels.features.stages import (
    Inputs,
    NetworkStage,
    evaluation_mode,
    first_of,
    maps_within,
    run,
    stages_of,
    trace,
)
from fsp_kernels.features.taps import FeatureTaps
from fsp_kernels.functional import fsp_matrix

Paths = tuple[str, str]
Maps = tuple[Tensor, Tensor]

# The first and the last map of each stage (Yim et al., figure 3). In the ResNets of ImageNet, each
# stage's first block makes its first map, and layer1's is its input; torchdistill has these pairs.
_IMAGENET_RESNET: tuple[Paths, ...] = (
    ("layer1:input", "layer1"),
    ("layer2.1:input", "layer2"),
    ("layer3.1:input", "layer3"),
    ("layer4.1:input", "layer4"),
)
# By the class's full name, so that none of their packages is imported.
FAMILIES: dict[str, tuple[Paths, ...]] = {
    "fsp_kernels.distill.models.cifar.CifarResNet": tuple(
        (f"stage{i}.0.relu1", f"stage{i}") for i in (1, 2, 3)
    ),
    # Activation comes first here: relu1 still has the size and the channels of the stage before.
    "fsp_kernels.distill.models.cifar.WideResNet": tuple(
        (f"stage{i}.0.relu2", f"stage{i}") for i in (1, 2, 3)
    ),
    "torchvision.models.resnet.ResNet": _IMAGENET_RESNET,
    "timm.models.resnet.ResNet": _IMAGENET_RESNET,
}
_SHOWN = 4  # paths in one message
_CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


class PathPair(NamedTuple):
    """The two maps of one FSP matrix in each network, by module path.

    ``channel_dim`` is the axis of their channels, as in :func:`fsp_kernels.fsp_loss`.
    """

    student: Paths
    teacher: Paths
    channel_dim: int | None = None


class PairLike(Protocol):
    """What has the attributes of a :class:`PathPair`."""

    @property
    def student(self) -> Paths: ...
    @property
    def teacher(self) -> Paths: ...
    @property
    def channel_dim(self) -> int | None: ...


@dataclass(frozen=True)
class PairShapes:
    """Channels ``(m, n)`` of the first and the second map of one pair, and their spatial sizes."""

    student: tuple[int, int]
    teacher: tuple[int, int]
    student_sizes: tuple[tuple[int, ...], tuple[int, ...]]
    teacher_sizes: tuple[tuple[int, ...], tuple[int, ...]]


def find_pairs(
    how: str, student: nn.Module, teacher: nn.Module, example: Inputs | None
) -> tuple[PathPair, ...]:
    """The pairs that two networks offer.

    Args:
        how: ``"auto"`` for the first and the last map of each stage of equal spatial size, as
            ``stages.stages_of`` finds them; ``"family"`` for those of a known architecture.
        student, teacher: left as they were.
        example: what both networks take, on their device; for ``"auto"`` it begins with images
            ``(B, C, H, W)``.

    Raises:
        DistillError: there are none, or ``"family"`` has other numbers of them in both networks;
            or ``how`` is something else.
    """
    if how == "family":
        return _family_pairs(student, teacher)
    if how != "auto":
        raise DistillError(f"pairs: got {how!r}, expected 'auto', 'family' or a list of pairs")
    if example is None or not _begins_with_images(example):
        raise DistillError(
            "pairs: auto needs an example that begins with images (B, C, H, W); name the pairs"
        )
    ours, theirs = _stages(student, example, "student"), _stages(teacher, example, "teacher")
    return tuple(
        PathPair((s.first.path, s.last.path), (t.first.path, t.last.path))
        for s, t in _match(ours, theirs)
    )


def family_paths(model: nn.Module) -> tuple[Paths, ...] | None:
    """The pairs of the model's architecture; ``None`` if it is not known or lacks some modules."""
    modules = {path for path, _ in model.named_modules()}
    for kind in type(model).__mro__:
        paths = FAMILIES.get(f"{kind.__module__}.{kind.__qualname__}")
        if paths and all(path.partition(":")[0] in modules for pair in paths for path in pair):
            return paths
    return None


def check_pairs(
    pairs: Sequence[PairLike],
    student: nn.Module,
    teacher: nn.Module,
    example: Inputs,
    projection: bool,
) -> list[PairShapes]:
    """Check that both networks have the maps, and that the FSP matrices of each pair fit.

    Args:
        pairs: as ``find_pairs`` gives them, or others.
        student, teacher: left as they were.
        example: what both networks take, on their device.
        projection: the student's channels may differ from the teacher's.

    Raises:
        DistillError: they do not; the message names the pair.
    """
    students = _run_pairs(pairs, "student", student, example)
    teachers = _run_pairs(pairs, "teacher", teacher, example)
    found = []
    for index, (ours, theirs) in enumerate(zip(students, teachers, strict=True)):
        m, n = (x.shape[1] for x in ours)
        wanted_m, wanted_n = (x.shape[1] for x in theirs)
        if (m, n) != (wanted_m, wanted_n) and not projection:
            raise DistillError(
                f"pairs.{index}: the student's FSP matrix is {m} x {n}, the teacher's "
                f"{wanted_m} x {wanted_n}; their feature maps must have equal channels, or "
                "projection must be true"
            )
        our_sizes, their_sizes = (
            (tuple(x.shape[2:]), tuple(y.shape[2:])) for x, y in (ours, theirs)
        )
        found.append(PairShapes((m, n), (wanted_m, wanted_n), our_sizes, their_sizes))
    return found


def channels_first(pairs: Sequence[Maps], channel_dims: Sequence[int | None]) -> list[Maps]:
    """Views ``(B, C, *spatial)`` of maps whose channels are last, where a pair's dim is -1."""
    return [
        (checks.channels_first(a), checks.channels_first(b)) if dim == -1 else (a, b)
        for (a, b), dim in zip(pairs, channel_dims, strict=True)
    ]


class Projection(nn.Module):
    """Learnt 1x1 convolutions, without bias, from the student's channels to the teacher's.

    Maps that have the teacher's channels stay as they are. ``shapes`` are those of ``check_pairs``.
    """

    def __init__(self, shapes: Sequence[PairShapes]) -> None:
        super().__init__()
        self.maps = nn.ModuleList(
            nn.Identity()
            if have == want
            else _CONVOLUTIONS[len(size)](have, want, kernel_size=1, bias=False)
            for pair in shapes
            for have, want, size in zip(pair.student, pair.teacher, pair.student_sizes, strict=True)
        )

    def forward(self, pairs: Sequence[Maps]) -> list[Maps]:
        """The student's pairs ``(B, C, *spatial)`` with the teacher's channels."""
        flat = [x for pair in pairs for x in pair]
        maps = [project(x) for project, x in zip(self.maps, flat, strict=True)]
        return list(zip(maps[::2], maps[1::2], strict=True))


def _begins_with_images(example: Inputs) -> bool:
    first = first_of(example)
    return isinstance(first, Tensor) and first.dim() == 4


def _stages(model: nn.Module, example: Inputs, role: str) -> list[NetworkStage]:
    runs, image = trace(model, example, role), first_of(example)
    stages = stages_of(runs, image)
    if not stages:
        within = ", ".join(maps_within(runs, image)[:_SHOWN])
        hint = f"; maps that auto does not look at are {within}" if within else ""
        raise DistillError(
            f"pairs: auto finds no stage in the {role}, a spatial size of two or more maps "
            f"(B, C, H, W){hint}; name the pairs, with paths of fsp-distill inspect --modules"
        )
    return stages


def _match(
    ours: list[NetworkStage], theirs: list[NetworkStage]
) -> list[tuple[NetworkStage, NetworkStage]]:
    """As many stages in both: in order. Else those of equal size; else from the last backwards."""
    if len(ours) != len(theirs):
        by_size = {stage.size: stage for stage in theirs}
        equal = [(stage, by_size[stage.size]) for stage in ours if stage.size in by_size]
        if equal:
            return equal
    count = min(len(ours), len(theirs))
    return list(zip(ours[-count:], theirs[-count:], strict=True))


def _family_pairs(student: nn.Module, teacher: nn.Module) -> tuple[PathPair, ...]:
    known = ", ".join(re.sub(r"\..*\.", " ", name) for name in FAMILIES)
    found = []
    for role, model in (("student", student), ("teacher", teacher)):
        paths = family_paths(model)
        if paths is None:
            raise DistillError(
                f"pairs: family knows no pairs of the {role}'s {type(model).__name__}; it knows "
                f"{known}; for others there is auto"
            )
        found.append(paths)
    if len(found[0]) != len(found[1]):
        raise DistillError(
            f"pairs: family has {len(found[0])} of the student and {len(found[1])} of the "
            "teacher, must have as many of both; there is auto"
        )
    return tuple(PathPair(s, t) for s, t in zip(*found, strict=True))


def _run_pairs(
    pairs: Sequence[PairLike], role: str, model: nn.Module, example: Inputs
) -> list[Maps]:
    """The maps (B, C, *spatial) of each pair of one network, which runs once."""
    found = []
    with ExitStack() as stack:
        stack.enter_context(evaluation_mode(model))
        all_taps = []
        for index, pair in enumerate(pairs):
            with prefixed(f"pairs.{index}.{role}"):
                taps = FeatureTaps(model, getattr(pair, role))
            all_taps.append(stack.enter_context(taps))
        run(model, example, role)
        for index, (pair, taps) in enumerate(zip(pairs, all_taps, strict=True)):
            with prefixed(f"pairs.{index}.{role}"):
                maps = taps.take_pairs()
                fsp_matrix(*maps[0], channel_dim=pair.channel_dim)  # checks that they make a pair
                found += channels_first(maps, [pair.channel_dim])
    return found
