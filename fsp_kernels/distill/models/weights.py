"""Weights from files, into networks that may have another number of classes."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fsp_kernels.errors import DistillError

_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
# What torch.compile and FSDP put into the names of the modules that they wrap, wherever those are.
_WRAPPERS = re.compile(r"\b(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_CLASS = re.compile(r"GLOBAL (\S+) was not")  # in PyTorch's message about a file of objects
_SHOWN = 3  # names of tensors in one message
_KEEP = """, as in
    import torch
    content = torch.load({path!r}, map_location="cpu", weights_only=False)
    torch.save(content["model"], "weights.pt")  # of a whole network: content.state_dict()"""

State = dict[str, Tensor]


def read_weights(path: str | Path, model: nn.Module, where: str) -> State:
    """The state dict for ``model`` that a file holds, on the CPU; runs no code from the file.

    Training scripts keep weights under keys, such as ``state_dict`` or ``model``, beside other
    things; DDP, ``torch.compile`` and Lightning put prefixes before the names, such as ``module.``
    or ``_orig_mod.``. The model's own names tell which key and prefix to take off.

    Args:
        path: a ``.safetensors`` file, or any that ``torch.load`` reads with ``weights_only``.
        model: the network that the weights are for.
        where: the beginning of messages, as ``student.weights``.

    Raises:
        DistillError: the file cannot be read, holds something else, or holds two such networks.
    """
    path = Path(path).expanduser()
    states = dict(_find_states(_read(path, where)))
    if not states:
        raise DistillError(f"{where}: {path} holds no state dict, must hold tensors by name")
    own = set(model.state_dict())
    if not any(map(_WRAPPERS.search, own)):
        states = {
            key: {_WRAPPERS.sub("", name): x for name, x in state.items()}
            for key, state in states.items()
        }
    # How many of the model's names there are under each key and behind each prefix.
    found = Counter(
        (key, name[:start])
        for key, state in states.items()
        for name in state
        for start in (0, *(dot.end() for dot in re.finditer(r"\.", name)))
        if name[start:] in own
    )
    if not found:
        return max(states.values(), key=len)  # load_weights says what it lacks
    [((key, prefix), most)] = found.most_common(1)
    equal = [".".join(filter(None, place)) for place, count in found.items() if count == most]
    if len(equal) > 1:
        raise DistillError(
            f"{where}: {path} holds the weights of several such networks, under "
            f"{' and '.join(map(repr, equal))}; keep one in a file of its own"
        )
    state = states[key]
    return {name.removeprefix(prefix): state[name] for name in state if name.startswith(prefix)}


def load_weights(model: nn.Module, state: Mapping[str, Tensor], where: str) -> None:
    """Copy ``state`` into ``model``: all of it, and nothing may be missing.

    The classifier, which is the last linear layer or convolution, may be for other classes; the
    model then keeps its own.

    Args:
        model: changed in place.
        state: as ``model.state_dict()`` gives it.
        where: the beginning of messages, as ``teacher.weights``.

    Raises:
        DistillError: a tensor is missing, unexpected, or has another shape or layout.
    """
    own, state = model.state_dict(), dict(state)
    wrong = [name for name in own if name in state and state[name].shape != own[name].shape]
    last = [path for path, module in model.named_modules() if isinstance(module, _LAYERS)][-1:]
    head = {f"{path}.{name}" for path in last for name in ("weight", "bias")} & own.keys()
    if all(own[name].shape[1:] == state[name].shape[1:] for name in head & state.keys()):
        state |= {name: own[name] for name in wrong if name in head}
        wrong = [name for name in wrong if name not in head]
    if wrong:
        shapes = [f"{n} {_times(state[n])} for {_times(own[n])}" for n in wrong]
        raise DistillError(f"{where}: not of this network: has {_list(shapes)}")
    # PyTorch compares names, since modules know which names of older versions to forgive.
    try:
        missing, unexpected = model.load_state_dict(state, strict=False)
    except RuntimeError as error:  # a tensor is sparse, quantized or without values
        reason = str(error).strip().rpartition("\n")[2].strip()
        raise DistillError(f"{where}: not of this network: {reason}") from error
    if missing or unexpected:
        problems = {"lacks": missing, "has unknown": unexpected}
        text = ", ".join(f"{verb} {_list(names)}" for verb, names in problems.items() if names)
        raise DistillError(f"{where}: not of this network: {text}")


def _read(path: Path, where: str) -> Any:
    load: Callable[[Path], Any] = partial(torch.load, map_location="cpu", weights_only=True)
    if path.suffix == ".safetensors":
        # Imported here, as networks can be built where safetensors is not installed.
        from safetensors.torch import load_file as load
    try:
        return load(path)
    except OSError as error:
        reason = error.strerror or error
        raise DistillError(f"{where}: {path} cannot be read: {reason}") from error
    except Exception as error:  # a damaged file makes its reader raise errors of many types
        reason = re.split(r"\.\s|\n", str(error))[0] or type(error).__name__
        if found := _CLASS.search(str(error)):
            reason = (
                f"there is a {found[1]} in it, and to read such objects may run code; if you trust "
                f"the file, keep its weights alone{_KEEP.format(path=str(path))}"
            )
        raise DistillError(f"{where}: {path} holds no plain state dict: {reason}") from error


def _find_states(content: object, key: str = "") -> Iterator[tuple[str, State]]:
    """All mappings of names to tensors within ``content``, each with the keys that lead to it."""
    if not isinstance(content, Mapping):
        return
    named = {name: value for name, value in content.items() if isinstance(name, str)}
    if tensors := {name: value for name, value in named.items() if isinstance(value, Tensor)}:
        yield key, tensors
    for name, value in named.items():
        yield from _find_states(value, f"{key}.{name}" if key else name)


def _times(tensor: Tensor) -> str:
    return " x ".join(map(str, tensor.shape)) or "scalar"


def _list(names: Collection[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join([*names][:_SHOWN]) + more
