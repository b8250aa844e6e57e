"""What a network's modules give on one image, and the stages of equal spatial size in that."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fsp_kernels.distill.errors import DistillError, explain
from fsp_kernels.distill.paths import tensors_in

# What computes but doesn't activate. These, and sequences of nothing else, give raw maps, which
# aren't the features that a stage is known by.
_RAW = (
    nn.modules.conv._ConvNd,
    nn.modules.batchnorm._NormBase,
    nn.GroupNorm,
    nn.LayerNorm,
    nn.LocalResponseNorm,
    nn.Linear,
    nn.Identity,
    nn.modules.dropout._DropoutNd,
)
# Height and width of an image shrink alike. By more than this apart, an axis is something else, as
# in maps (B, H, W, C).
_DISTORTION = 1.5


@dataclass
class ModuleRun:
    """What one module did in a forward pass.

    Attributes:
        path: as in ``model.named_modules()``.
        module: itself.
        calls: how often it ran.
        output: of the last call; ``None`` where that is no tensor.
        other: of the last call, what is no tensor.
        version: how often ``output`` had been written to by then.
        rank: its place among all calls, by when they ended; -1 where it did not run.
    """

    path: str
    module: nn.Module
    calls: int = 0
    output: Tensor | None = None
    other: object = field(default=None, repr=False)
    version: int = field(default=0, repr=False)
    rank: int = -1

    @property
    def overwritten(self) -> bool:
        """The output was changed in place by a later module."""
        return self.output is not None and self.output._version != self.version


class Map(NamedTuple):
    """A feature map ``(B, C, H, W)``, by the shortest path that gives it."""

    path: str
    shape: tuple[int, ...]


class Stage(NamedTuple):
    """The first and the last map of one spatial size."""

    first: Map
    last: Map

    @property
    def size(self) -> tuple[int, ...]:
        return self.first.shape[2:]


@contextmanager
def looking(model: nn.Module) -> Iterator[nn.Module]:
    """``model`` in evaluation mode and without gradients, then in the modes it was in."""
    training = [module for module in model.modules() if module.training]
    try:
        with torch.no_grad():
            yield model.eval()
    finally:
        for module in training:
            module.training = True


def run(model: nn.Module, images: Tensor, role: str) -> object:
    """What one forward pass gives.

    Raises:
        DistillError: the network does not take such images; ``role`` is named.
    """
    try:
        return model(images)
    except DistillError:
        raise
    except Exception as error:
        size = " x ".join(map(str, images.shape[1:]))
        raise DistillError(
            f"{role}.model: cannot take images of {size}: {explain(error)}"
        ) from error


def trace(model: nn.Module, image: Tensor, role: str = "student") -> list[ModuleRun]:
    """Run ``model`` once in evaluation mode; what each of its submodules did, in their order.

    Args:
        model: left as it was.
        image: ``(1, C, H, W)``.
        role: of the model, for messages.
    """
    entries = [ModuleRun(path, module) for path, module in model.named_modules() if path]
    finished = itertools.count()
    with ExitStack() as stack:
        stack.enter_context(looking(model))
        for entry in entries:
            handle = entry.module.register_forward_hook(partial(_record, entry, finished))
            stack.callback(handle.remove)
        run(model, image, role)
    return entries


def stages_of(runs: list[ModuleRun], image: Tensor) -> list[Stage]:
    """The stages of a traced network, in the order of execution.

    A stage is all maps of one spatial size of modules that ran once, were not overwritten and are
    more than convolutions and normalisations. Its first map is the first to be computed. Its last
    is the last of the outermost modules, as the first block of the next stage may hold maps of
    this size too. Of one map, and of a single position, there is no stage.
    """
    by_size: dict[tuple[int, ...], list[Map]] = {}
    for found in _maps(runs, image):
        by_size.setdefault(found.shape[2:], []).append(found)
    stages = []
    for maps in by_size.values():
        depth = min(_depth(found) for found in maps)
        last = [found for found in maps if _depth(found) == depth][-1]
        if maps[0] != last:
            stages.append(Stage(maps[0], last))
    return stages


def maps_within(runs: list[ModuleRun], image: Tensor) -> list[str]:
    """Paths of the maps within tuples, mappings and objects, which ``stages_of`` does not see."""
    return [
        f"{entry.path}:output{keys}"
        for entry in runs
        for keys, x in tensors_in(entry.other)
        if _is_spatial(x, image)
    ]


def _record(
    entry: ModuleRun, finished: Iterator[int], _module: nn.Module, _args: Any, output: object
) -> None:
    entry.calls += 1
    entry.rank = next(finished)
    entry.output, entry.other = (output, None) if isinstance(output, Tensor) else (None, output)
    entry.version = 0 if entry.output is None else entry.output._version


def _maps(runs: list[ModuleRun], image: Tensor) -> list[Map]:
    """Distinct maps in the order of execution; modules that give the very same are one."""
    found: dict[int, list[ModuleRun]] = {}
    for entry in sorted(runs, key=lambda entry: entry.rank):
        if _is_map(entry, image):
            found.setdefault(id(entry.output), []).append(entry)
    maps = []
    for same in found.values():
        shortest = min(same, key=lambda entry: (entry.path.count("."), len(entry.path)))
        assert shortest.output is not None
        maps.append(Map(shortest.path, tuple(shortest.output.shape)))
    return maps


def _is_map(entry: ModuleRun, image: Tensor) -> bool:
    x = entry.output
    if x is None or entry.calls != 1 or entry.overwritten or _is_raw(entry.module):
        return False
    return _is_spatial(x, image)


def _is_spatial(x: Tensor, image: Tensor) -> bool:
    if x.dim() != 4:
        return False
    (high, wide), (height, width) = x.shape[2:], image.shape[2:]
    if high * wide <= 1:
        return False
    shrunk = sorted((height / high, width / wide))
    return shrunk[1] <= _DISTORTION * shrunk[0]


def _is_raw(module: nn.Module) -> bool:
    # A forward method of its own may activate without a module for it.
    if type(module).forward is nn.Sequential.forward and len(module):  # type: ignore[arg-type]
        return all(map(_is_raw, module.children()))
    return isinstance(module, _RAW) and not any(True for _ in module.children())


def _depth(found: Map) -> int:
    return found.path.count(".")
