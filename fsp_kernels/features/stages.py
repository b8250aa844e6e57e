"""The outputs of a network's modules for an example, and its stages of equal spatial size."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fsp_kernels.errors import DistillError, explain
from fsp_kernels.features.paths import tensors_in

# Modules that compute but do not activate. They, and sequences of them alone, give raw maps, which
# are not the features of a stage.
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
# Height and width of an image shrink by the same factor. If the factors differ by more than this,
# one axis is something else, as in maps (B, H, W, C).
_DISTORTION = 1.5


@dataclass
class ModuleRun:
    """What one module did in a forward pass.

    Attributes:
        path: as in ``model.named_modules()``.
        module: the module.
        calls: how often it ran.
        output: of the last call, if it is a tensor.
        other: the output of the last call, if it is not a tensor.
        version: of ``output`` when the call ended; PyTorch counts writes to a tensor.
        rank: its place among all calls, in the order of their ends; -1 if it did not run.
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
        """Whether a later module changed the output in place."""
        return self.output is not None and self.output._version != self.version


class Map(NamedTuple):
    """A feature map ``(B, C, H, W)``, named by the shortest path that gives it."""

    path: str
    shape: tuple[int, ...]


class NetworkStage(NamedTuple):
    """The first and the last map of one spatial size."""

    first: Map
    last: Map

    @property
    def size(self) -> tuple[int, ...]:
        return self.first.shape[2:]


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[nn.Module]:
    """Put ``model`` in evaluation mode without gradients, then give back its modes."""
    training = [module for module in model.modules() if module.training]
    try:
        with torch.no_grad():
            yield model.eval()
    finally:
        for module in training:
            module.training = True


# What a network is called with: one tensor, or all its arguments by place or by keyword.
Inputs = Tensor | tuple[Any, ...] | Mapping[str, Any]


def run(model: nn.Module, inputs: Inputs, role: str) -> object:
    """The output of one forward pass.

    Raises:
        DistillError: the network cannot take such inputs; the message names ``role``.
    """
    try:
        if isinstance(inputs, Mapping):
            return model(**inputs)
        return model(*inputs) if isinstance(inputs, tuple) else model(inputs)
    except DistillError:
        raise
    except Exception as error:
        first = first_of(inputs)
        what = "the example"
        if isinstance(first, Tensor) and first.dim() == 4:
            what = f"images of {' x '.join(map(str, first.shape[1:]))}"
        raise DistillError(f"{role}: cannot take {what}: {explain(error)}") from error


def first_of(inputs: Inputs) -> Any:
    """The first argument."""
    if isinstance(inputs, Tensor):
        return inputs
    values = inputs.values() if isinstance(inputs, Mapping) else inputs
    return next(iter(values), None)


def trace(model: nn.Module, example: Inputs, role: str = "student") -> list[ModuleRun]:
    """Run ``model`` once in evaluation mode, and tell what each of its submodules did.

    Args:
        model: unchanged afterwards.
        example: what it takes.
        role: of the model, for messages.
    """
    entries = [ModuleRun(path, module) for path, module in model.named_modules() if path]
    finished = itertools.count()
    with ExitStack() as stack:
        stack.enter_context(evaluation_mode(model))
        for entry in entries:
            handle = entry.module.register_forward_hook(partial(_record, entry, finished))
            stack.callback(handle.remove)
        run(model, example, role)
    return entries


def stages_of(runs: list[ModuleRun], image: Tensor) -> list[NetworkStage]:
    """The stages of a traced network, in the order of execution.

    A stage has all maps of one spatial size from modules that ran once, were not overwritten and do
    more than convolve and normalise. Its first map is the first that is computed. Its last map is
    the last one of the outermost modules, since the first block of the next stage may hold maps of
    this size too. A single map, or a single position, makes no stage.
    """
    by_size: dict[tuple[int, ...], list[Map]] = {}
    for found in _maps(runs, image):
        by_size.setdefault(found.shape[2:], []).append(found)
    stages = []
    for maps in by_size.values():
        depth = min(_depth(found) for found in maps)
        last = [found for found in maps if _depth(found) == depth][-1]
        if maps[0] != last:
            stages.append(NetworkStage(maps[0], last))
    return stages


def maps_within(runs: list[ModuleRun], image: Tensor) -> list[str]:
    """Paths of maps inside tuples, mappings and objects, which ``stages_of`` does not see."""
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
    """Distinct maps in the order of execution; modules that give the same tensor count once."""
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
