"""Recording a model's feature maps by module path, without changing the model."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from fsp_kernels.errors import DistillError, did_you_mean
from fsp_kernels.features.paths import Path, parse_path, select


class FeatureTaps:
    """Records the inputs or outputs of submodules while a model runs.

    Each path is a name as in ``model.named_modules()``, followed by ``:output`` (the default) or
    ``:input``: ``"stage1.0.relu1"``, ``"layer2:input"``. The input of a module is its first tensor
    argument. Of a module that runs several times in one forward pass, the last time counts.

    Keys choose one value of a tuple, a mapping or an object: ``"encoder.layer.3:output[0]"``,
    ``"block:output.hidden_states[2]"``. ``[key]`` and ``.key`` both stand for items of mappings and
    for attributes. Of an input, the first key chooses the argument, by place or keyword:
    ``"layer:input[1]"``, ``"layer:input.mask"``. A path without a module, such as
    ``":output.hidden_states[2]"``, is of the model itself, before other hooks change its output.

    The hooks exist only inside a ``with`` block, or from ``attach()`` to ``detach()``::

        with FeatureTaps(model, ["stage1:input", "stage1"]) as taps:
            model(images)
            first, second = taps.take()

    Copies of ``model`` are not recorded, nor what checkpointing runs again in backward. Each thread
    takes the maps of its own forward pass. A model can be copied, pickled and saved whole while the
    hooks exist; to read such a file, this package has to be installed.

    ``torch.compile`` sees the hooks that exist when the model first runs, so attach them before and
    leave them. In compiled code and under ``torch.inference_mode`` the taps copy each map, since
    PyTorch does not count there how often a tensor is overwritten. ``torch.no_grad`` needs no copy.

    Args:
        model: any module; it is not changed.
        paths: what to record, in the order in which ``take()`` returns it.

    Raises:
        DistillError: a path names no submodule; the message lists close ones. When the model runs:
            it is a replica of ``nn.DataParallel``.
    """

    def __init__(self, model: nn.Module, paths: Sequence[str]) -> None:
        self._model = model
        self._points = {path: (_find(model, path), parse_path(path)) for path in paths}
        self._paths = list(paths)
        self._hooks: list[_Hook] = []
        self._passes = _Passes()

    def attach(self) -> FeatureTaps:
        """Register the hooks; a second call changes nothing."""
        if self._hooks:
            return self
        self._hooks.append(_Hook(self._model, self._start, before=True))
        for module, path in self._points.values():
            before = path.side == "input"
            record = self._record_input if before else self._record_output
            self._hooks.append(_Hook(module, partial(record, path), before, module is self._model))
        return self

    def detach(self) -> None:
        """Remove the hooks and forget what they recorded."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self._passes = _Passes()

    def take(self) -> list[Tensor]:
        """The maps of the forward pass just run, in the order of the paths; then forget them.

        Raises:
            DistillError: the hooks are not there; a module did not run, or gave no tensor where the
                path says; its map was overwritten in place afterwards (by ``ReLU(inplace=True)``,
                say), so the values are no longer the ones asked for; or reentrant checkpointing
                left the map without a graph.
        """
        if not self._hooks:
            raise DistillError(
                "the taps are not attached: call take() inside the with block, or attach() before "
                "the model runs; a copy of taps is never attached"
            )
        seen = dict(self._passes.last.seen)
        self._passes.last.seen.clear()
        maps = []
        for path in self._paths:
            found = seen.get(path)
            if found is None:
                raise DistillError(f"{path}: did not run in the model's forward pass")
            if isinstance(found, DistillError):
                raise found
            tensor, version, lost = found
            if version is not None and tensor._version != version:
                raise DistillError(
                    f"{path}: was overwritten in place by a later module; tap that module's "
                    "output, or make it not in-place"
                )
            if lost:
                raise DistillError(
                    f"{path}: has no graph, so no gradient can pass through it; an "
                    "autograd.Function computed it, as reentrant checkpointing does: "
                    "use checkpoint(..., use_reentrant=False)"
                )
            maps.append(tensor)
        return maps

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

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_hooks": []}  # a copy is not attached

    def _start(self, *_: object) -> None:
        # An earlier pass may have ended in an error, or have run modules that this one does not.
        this = self._passes.last
        this.seen.clear()
        this.has_gradient = torch.is_grad_enabled()

    def _record_input(self, path: Path, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        arguments: dict[Any, object] = dict(enumerate(args))
        arguments.update(kwargs)
        tensors = [x for x in arguments.values() if isinstance(x, Tensor)]
        self._record(path, tensors[0] if tensors and not path.keys else arguments)

    def _record_output(self, path: Path, _args: tuple[Any, ...], output: object) -> None:
        self._record(path, output)

    def _record(self, path: Path, given: object) -> None:
        this = self._passes.last
        try:
            value = select(given, path)
        except DistillError as error:  # take() raises it, as its caller knows the map's purpose
            this.seen[path.text] = error
            return
        lost = this.has_gradient and not value.requires_grad and _in_function()
        version = None
        # PyTorch does not count writes to these tensors, so a copy is kept, which costs as much as
        # a ReLU. To compare values later would cost the same and make the host wait for a GPU.
        if torch.compiler.is_compiling() or value.is_inference():
            value = value.clone()
        else:
            version = value._version
        this.seen[path.text] = _Seen(value, version, lost)


class _Seen(NamedTuple):
    """A map, how often it had been written to, and whether its gradient got lost."""

    tensor: Tensor
    version: int | None
    lost: bool


class _Pass:
    """What a forward pass has recorded so far, and whether it began with gradients enabled."""

    def __init__(self) -> None:
        self.seen: dict[str, _Seen | DistillError] = {}
        self.has_gradient = True


class _Passes(threading.local):
    """Each thread's last forward pass. A copy is empty, as maps with a graph can't be copied."""

    def __init__(self) -> None:
        # torch.compile would lose what is written to attributes of this object itself.
        self.last = _Pass()

    def __reduce__(self) -> tuple[type[_Passes], tuple[()]]:
        return _Passes, ()


class _Hook:
    """Calls ``act`` before or after ``module`` runs, but not when backward runs it again.

    ``first`` puts it before the module's other hooks. In a copy or a file of the module, the hook
    does nothing.
    """

    def __init__(
        self,
        module: nn.Module | None = None,
        act: Callable[..., None] | None = None,
        before: bool = False,
        first: bool = False,
    ) -> None:
        self._module, self._act = module, act
        self._handle: RemovableHandle | None = None
        if module is not None and before:
            self._handle = module.register_forward_pre_hook(self, with_kwargs=True)
        elif module is not None:
            self._handle = module.register_forward_hook(self, prepend=first)

    def __call__(self, module: nn.Module, args: object, other: object) -> None:
        if self._act is None:
            return
        if module is self._module:
            if not _in_backward():
                self._act(args, other)
        # Replicas of nn.DataParallel share the hooks of the module they are replicas of.
        elif getattr(module, "_is_replica", False):
            raise DistillError(
                "the taps see a replica of their model, which has a part of the batch only: "
                "use nn.parallel.DistributedDataParallel instead of nn.DataParallel"
            )

    def remove(self) -> None:
        if self._handle is not None:
            self._handle.remove()

    def __reduce__(self) -> tuple[type[_Hook], tuple[()], dict[str, Any]]:
        # PyTorch keeps hooks by number. The handle, once read from a file, reserves its number.
        return _Hook, (), {"_handle": self._handle}


def _in_backward() -> bool:
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def _in_function() -> bool:
    """Whether the forward pass of a ``torch.autograd.Function`` is running.

    It disables gradients of both modes, while ``torch.no_grad`` leaves forward mode as it is.
    """
    both_off = not torch.is_grad_enabled() and not torch._C._is_fwd_grad_enabled()
    return both_off and not torch.is_inference_mode_enabled()


# What torch.compiler.assume_constant_result does. That would import the compiler, and Triton.
_in_function._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _find(model: nn.Module, text: str) -> nn.Module:
    name, modules = parse_path(text).module, dict(model.named_modules())
    if name not in modules or not text:
        children = ", ".join(child for child, _ in model.named_children())
        hint = did_you_mean(name, filter(None, modules), limit=3) or f"; it has {children}"
        raise DistillError(f"{text}: {type(model).__name__} has no module {name!r}{hint}")
    return modules[name]
