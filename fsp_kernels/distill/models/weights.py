"""Weights from files, into networks that may have another number of classes."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fsp_kernels.distill.errors import DistillError

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
# What torch.compile and FSDP put into the names of the modules that they wrap, wherever those are.
_WRAPPED = re.compile(r"\b(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_CLASS = re.compile(r"GLOBAL (\S+) was not")  # in what PyTorch says of a file that holds objects
_SHOWN = 3  # names of tensors in one message
_KEEP = """, as in
    import torch
    content = torch.load({path!r}, map_location="cpu", weights_only=False)
    torch.save(content["model"], "weights.pt")  # of a whole network: content.state_dict()"""

State = dict[str, Tensor]


def read_weights(path: str | Path, model: nn.Module, where: str) -> State:
    """The state dict for ``model`` that a file holds, on the CPU; runs no code from the file.

    The model's own names decide what is meant. Training scripts keep weights under keys, such as
    ``state_dict`` or ``model``, beside other things; DDP, ``torch.compile`` and Lightning put
    prefixes before the names, such as ``module.`` or ``_orig_mod.``. Both are taken off.

    Args:
        path: a ``.safetensors`` file, or any that ``torch.load`` reads with ``weights_only``.
        model: the network that the weights are for.
        where: what messages start with, as ``student.weights``.

    Raises:
        DistillError: the file cannot be read, holds something else, or holds two such networks.
    """
    path = Path(path).expanduser()
    states = dict(_states(_read(path, where)))
    if not states:
        raise DistillError(f"{where}: {path} holds no state dict, must hold tensors by name")
    own = set(model.state_dict())
    if not any(_WRAPPED.search(name) for name in own):
        states = {
            key: {_WRAPPED.sub("", name): x for name, x in state.items()}
            for key, state in states.items()
        }
    found = Counter(
        (key, name.removesuffix(ending))
        for key, state in states.items()
        for name in state
        for ending in _endings(name)
        if ending in own
    )
    if not found:
        return max(states.values(), key=len)  # load_weights says what it lacks
    [(place, most)] = found.most_common(1)
    equal = [".".join(filter(None, place)) for place, count in found.items() if count == most]
    if len(equal) > 1:
        raise DistillError(
            f"{where}: {path} holds the weights of several such networks, under "
            f"{' and '.join(map(repr, equal))}; keep one in a file of its own"
        )
    key, prefix = place
    named = states[key].items()
    return {name.removeprefix(prefix): x for name, x in named if name.startswith(prefix)}


def load_weights(model: nn.Module, state: Mapping[str, Tensor], where: str) -> None:
    """Copy ``state`` into ``model``: all of it, and nothing may be missing.

    But the classifier, the last linear layer or convolution, may be for other classes: the model
    then keeps the one it has.

    Args:
        model: changed in place.
        state: as ``model.state_dict()`` gives it.
        where: what messages start with, as ``teacher.weights``.

    Raises:
        DistillError: a tensor is missing, unexpected, or has another shape or layout.
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
    try:
        missing, unexpected = model.load_state_dict(state, strict=False)
    except RuntimeError as error:  # a tensor is sparse, quantized or without values
        reason = str(error).strip().rpartition("\n")[2].strip()
        raise DistillError(f"{where}: not of this network: {reason}") from error
    faults = {"lacks": missing, "has unknown": unexpected}
    if missing or unexpected:
        text = ", ".join(f"{verb} {_first(names)}" for verb, names in faults.items() if names)
        raise DistillError(f"{where}: not of this network: {text}")


def _read(path: Path, where: str) -> Any:
    load: Callable[[Path], Any] = partial(torch.load, map_location="cpu", weights_only=True)
    if path.suffix == ".safetensors":
        # Imported here: networks are built where safetensors need not be installed.
        from safetensors.torch import load_file as load
    try:
        return load(path)
    except OSError as error:
        reason = error.strerror or error
        raise DistillError(f"{where}: {path} cannot be read: {reason}") from error
    except Exception as error:  # a damaged file makes its reader raise anything
        reason = re.split(r"\.\s|\n", str(error))[0] or type(error).__name__
        found = _CLASS.search(str(error))
        if found:
            reason = (
                f"there is a {found[1]} in it, and to read such objects may run code; if you trust "
                f"the file, keep its weights alone{_KEEP.format(path=str(path))}"
            )
        raise DistillError(f"{where}: {path} holds no plain state dict: {reason}") from error


def _states(content: object, key: str = "") -> Iterator[tuple[str, State]]:
    """All mappings of names to tensors within ``content``, each with the keys that lead to it."""
    if not isinstance(content, Mapping):
        return
    named = {name: value for name, value in content.items() if isinstance(name, str)}
    tensors = {name: value for name, value in named.items() if isinstance(value, Tensor)}
    if tensors:
        yield key, tensors
    for name, value in named.items():
        yield from _states(value, f"{key}.{name}" if key else name)


def _endings(name: str) -> Iterator[str]:
    """``"a.b.c"``, ``"b.c"`` and ``"c"``."""
    parts = name.split(".")
    return (".".join(parts[index:]) for index in range(len(parts)))


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
