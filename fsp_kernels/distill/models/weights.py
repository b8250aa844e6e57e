"""Weights from files, into networks that may have another number of classes."""

from __future__ import annotations

import pickle
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fsp_kernels.distill.errors import DistillError

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_WRAPPERS = ("state_dict", "model")  # what training scripts keep the weights under
_SHOWN = 3  # names of tensors in one message


def read_weights(path: str | Path, where: str) -> dict[str, Tensor]:
    """The state dict a file holds, on the CPU; runs no code from the file.

    Args:
        path: ``.safetensors``; or ``.pt`` or ``.pth``, a state dict or a dict with one under
            ``state_dict`` or ``model``. A prefix ``module.`` that all names have is taken off.
        where: what messages start with, as ``student.weights``.

    Raises:
        DistillError: the file cannot be read, or holds something else.
    """
    path = Path(path)
    if path.suffix not in (".safetensors", ".pt", ".pth"):
        raise DistillError(f"{where}: is {str(path)!r}, must end in .safetensors, .pt or .pth")
    state = _read(path, where)
    for key in _WRAPPERS:
        if isinstance(state, Mapping) and isinstance(state.get(key), Mapping):
            state = state[key]
    if not isinstance(state, Mapping) or not state or not all(map(_is_entry, state.items())):
        raise DistillError(f"{where}: {path} holds no state dict, must hold tensors by name")
    if all(name.startswith("module.") for name in state):  # saved from DistributedDataParallel
        return {name.removeprefix("module."): value for name, value in state.items()}
    return dict(state)


def load_weights(model: nn.Module, state: Mapping[str, Tensor], where: str) -> None:
    """Copy ``state`` into ``model``: all of it, and nothing may be missing.

    But the classifier, the last linear layer or convolution, may be for other classes: the model
    then keeps the one it has.

    Args:
        model: changed in place.
        state: as ``model.state_dict()`` gives it.
        where: what messages start with, as ``teacher.weights``.

    Raises:
        DistillError: a tensor is missing, unexpected, or has another shape.
    """
    own, state = model.state_dict(), dict(state)
    wrong = {name for name, x in state.items() if name in own and x.shape != own[name].shape}
    head = {name for name in _classifier(model) if name in own and name in state}
    if all(own[name].shape[1:] == state[name].shape[1:] for name in head):
        wrong -= head
        state |= {name: own[name] for name in head if own[name].shape != state[name].shape}
    if wrong:
        shapes = (f"{n} {_shape(state[n])} for {_shape(own[n])}" for n in own if n in wrong)
        raise DistillError(f"{where}: not of this network: has {_first(shapes)}")
    # Not compared by hand: modules know which names of older versions to forgive.
    missing, unexpected = model.load_state_dict(state, strict=False)
    if missing:
        raise DistillError(f"{where}: not of this network: lacks {_first(missing)}")
    if unexpected:
        raise DistillError(f"{where}: not of this network: has unknown {_first(unexpected)}")


def _read(path: Path, where: str) -> Any:
    try:
        if path.suffix == ".safetensors":
            # Imported here: networks are built where safetensors need not be installed.
            from safetensors import SafetensorError
            from safetensors.torch import load_file

            try:
                return load_file(path)
            except SafetensorError as error:
                raise DistillError(f"{where}: {path} is damaged: {error}") from error
        return torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        reason = error.strerror or error
        raise DistillError(f"{where}: {path} cannot be read: {reason}") from error
    except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
        reason = str(error).partition("\n")[0]
        raise DistillError(f"{where}: {path} holds no plain state dict: {reason}") from error


def _is_entry(item: tuple[Any, Any]) -> bool:
    return isinstance(item[0], str) and isinstance(item[1], Tensor)


def _classifier(model: nn.Module) -> list[str]:
    """The names of the classifier's tensors."""
    kinds = (nn.Linear, *_CONVOLUTIONS)
    paths = [path for path, module in model.named_modules() if isinstance(module, kinds)]
    return [f"{paths[-1]}.{name}" for name in ("weight", "bias")] if paths else []


def _shape(tensor: Tensor) -> str:
    return " x ".join(map(str, tensor.shape)) or "scalar"


def _first(names: Iterable[str]) -> str:
    names = list(names)
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
