"""Feature maps by module path, from models that know nothing of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from fsp_kernels.distill.errors import DistillError, did_you_mean


class FeatureTaps:
    """Records the inputs or outputs of submodules while a model runs.

    Each path is a name as in ``model.named_modules()``, followed by ``:output`` (the default) or
    ``:input``: ``"stage1.0.relu1"``, ``"layer2:input"``. The input of a module is its first tensor
    argument. A module that runs several times in one forward pass gives the last time.

    The hooks are there inside a ``with`` block (or from ``attach()`` to ``detach()``) only::

        with FeatureTaps(model, ["stage1:input", "stage1"]) as taps:
            model(images)
            first, second = taps.take()

    ``torch.compile`` sees the hooks that are there when the model first runs: attach them before,
    and leave them. Compiled code does not tell whether a map was overwritten in place.

    Args:
        model: any module; it is not changed.
        paths: what to record, in the order ``take()`` returns it.

    Raises:
        DistillError: a path names no submodule; the message lists close ones.
    """

    def __init__(self, model: nn.Module, paths: Sequence[str]) -> None:
        self._points = {path: _find(model, path) for path in paths}
        self._paths = list(paths)
        self._handles: list[RemovableHandle] = []
        self._seen: dict[str, tuple[Tensor, int | None]] = {}

    def attach(self) -> FeatureTaps:
        """Register the hooks; a second call changes nothing."""
        if self._handles:
            return self
        for path, (module, side) in self._points.items():
            if side == "input":
                hook = self._input_hook(path)
                self._handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
            else:
                self._handles.append(module.register_forward_hook(self._output_hook(path)))
        return self

    def detach(self) -> None:
        """Remove the hooks and let go of what they recorded."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._seen.clear()

    def take(self) -> list[Tensor]:
        """The maps of the forward pass just run, in the order of the paths; then forget them.

        Raises:
            DistillError: a module did not run, or its map was overwritten in place afterwards
                (by ``ReLU(inplace=True)``, say), so the values are no longer the ones asked for.
        """
        seen, self._seen = self._seen, {}
        for path in self._paths:
            if path not in seen:
                raise DistillError(f"{path}: did not run in the model's forward pass")
            tensor, version = seen[path]
            if version is not None and _version(tensor) != version:
                raise DistillError(
                    f"{path}: was overwritten in place by a later module; "
                    f"tap that module's output, or make it not in-place"
                )
        return [seen[path][0] for path in self._paths]

    def take_pairs(self) -> list[tuple[Tensor, Tensor]]:
        """The same two by two, as ``fsp_loss`` takes them; paths come first, second, first, ...

        Raises:
            DistillError: as ``take``; or the number of paths is odd.
        """
        if len(self._paths) % 2:
            raise DistillError(f"{self._paths[-1]}: has no second map to make a pair with")
        maps = self.take()
        return list(zip(maps[::2], maps[1::2], strict=True))

    def __enter__(self) -> FeatureTaps:
        return self.attach()

    def __exit__(self, *_: object) -> None:
        self.detach()

    def _input_hook(self, path: str) -> Any:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            tensors = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]
            self._record(path, tensors[0] if tensors else args)

        return hook

    def _output_hook(self, path: str) -> Any:
        def hook(_module: nn.Module, _args: tuple[Any, ...], output: object) -> None:
            self._record(path, output)

        return hook

    def _record(self, path: str, value: object) -> None:
        if not isinstance(value, Tensor):
            raise DistillError(
                f"{path}: is a {type(value).__name__}, not a tensor; tap a submodule of it"
            )
        self._seen[path] = (value, _version(value))


def _find(model: nn.Module, path: str) -> tuple[nn.Module, str]:
    name, colon, side = path.partition(":")
    if colon and side not in ("input", "output"):
        raise DistillError(f"{path}: ends in {side!r}, must end in ':input' or ':output'")
    modules = dict(model.named_modules())
    if not name or name not in modules:
        known = [known for known in modules if known]
        hint = did_you_mean(name, known, limit=3) or _children(model)
        raise DistillError(f"{path}: {type(model).__name__} has no module {name!r}{hint}")
    return modules[name], side or "output"


def _children(model: nn.Module) -> str:
    return "; it has " + ", ".join(name for name, _ in model.named_children())


def _version(tensor: Tensor) -> int | None:
    """How often ``tensor`` was written to; ``None`` where nobody counts."""
    # Inference tensors keep no version counter, and can't be changed in place outside of it.
    if torch.compiler.is_compiling() or tensor.is_inference():
        return None
    return tensor._version
