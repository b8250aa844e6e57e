"""Networks by name: this package's, torchvision's, timm's, and those of importable callables."""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from fsp_kernels.distill.errors import DistillError, did_you_mean, explain, prefixed
from fsp_kernels.distill.imports import find_callable
from fsp_kernels.distill.models.cifar import CifarResNet, WideResNet
from fsp_kernels.distill.models.weights import load_weights, read_weights
from fsp_kernels.distill.paths import parse_path, select

if TYPE_CHECKING:
    # Networks can be built where the packages that read recipes are not installed.
    from fsp_kernels.distill.config import Network

_NAMES = "cifar/NAME, torchvision/NAME, timm/NAME or package.module:callable"
# torchvision's networks that give more than logits in training unless told not to, and the weights
# of what is then left out.
_AUXILIARY = {"googlenet": ("aux1.", "aux2."), "inception_v3": ("AuxLogits.",)}


def build_model(
    network: Network, *, in_channels: int, classes: int, where: str = "student"
) -> nn.Module:
    """The network that a recipe names, with its initial, given or published weights.

    ``cifar/resnet26`` is a ``CifarResNet`` (any depth ``6n + 2``), ``cifar/wrn16-2`` a
    ``WideResNet`` (any depth ``6n + 4`` and width). ``torchvision/NAME`` is any classification
    network there; if images have no three channels, the weights of its colours are averaged.
    ``timm/NAME`` needs timm. ``package.module:callable`` is imported, also from the current
    directory, and called with the arguments, and with ``in_channels`` and ``classes`` if it takes
    them.

    Args:
        network: the recipe's section.
        in_channels: of the images.
        classes: number of logits.
        where: the section's name, for messages.

    Raises:
        DistillError: there is no such network, it refuses the arguments, or its weights cannot be
            read or downloaded, or are those of another network.
    """
    if network.weights is not None and network.pretrained:
        raise DistillError(f"{where}.weights: given beside pretrained, must be one of the two")
    source, slash, name = network.model.partition("/")
    if ":" in network.model:
        model = _build_imported(network, in_channels, classes, where)
    elif slash and source in _SOURCES:
        model = _SOURCES[source](network, name, in_channels, classes, where)
    else:
        hint = did_you_mean(source, _SOURCES) if slash else ""
        raise DistillError(f"{where}.model: is {network.model!r}, must be {_NAMES}{hint}")
    if network.logits is not None:
        model.register_forward_hook(SelectLogits(network.logits, f"{where}.logits"))
    if network.weights is not None:
        key = f"{where}.weights"
        load_weights(model, read_weights(network.weights, model, key), key)
    return model


def parameter_count(model: nn.Module) -> int:
    """Number of trainable scalars."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


class SelectLogits:
    """A forward hook that replaces what a network gives by its logits.

    Copies and files of the network have it too, and DDP, ``torch.compile`` and ``torch.export`` run
    it. A tensor stays as it is, since some networks give more than logits only in training.

    Args:
        path: of the logits, as ``:output[0]`` or ``:output.logits``.
        where: the path's key in a recipe, for messages.

    Raises:
        DistillError: ``path`` is not a path in the network's own output. When the network runs:
            there is no tensor.
    """

    def __init__(self, path: str, where: str) -> None:
        self._where = where
        with prefixed(where):
            self._path = parse_path(path)
        if self._path.module or self._path.side != "output":
            raise DistillError(
                f"{where}: is {path!r}, must choose in the network's own output, as ':output[0]'"
            )

    def __call__(self, _network: nn.Module, _args: object, output: object) -> Tensor:
        if isinstance(output, Tensor):
            return output
        with prefixed(self._where):
            return select(output, self._path)


def _build_cifar(
    network: Network, name: str, in_channels: int, classes: int, where: str
) -> nn.Module:
    _refuse_pretrained(network, where)
    kind = WideResNet if name.startswith("wrn") else CifarResNet
    match = re.fullmatch(r"resnet(\d{1,9})|wrn(\d{1,9})-(\d{1,9})", name)
    if not match:
        raise DistillError(
            f"{where}.model: is {network.model!r}, must be cifar/resnetDEPTH or "
            "cifar/wrnDEPTH-WIDTH, as cifar/resnet26 or cifar/wrn16-2"
        )
    create = partial(kind, *(int(number) for number in match.groups() if number))
    return _call(create, network, where, in_channels=in_channels, classes=classes)


def _build_torchvision(
    network: Network, name: str, in_channels: int, classes: int, where: str
) -> nn.Module:
    models = _import("torchvision.models", network, where)
    _check_known(name, models.list_models(module=models), network, where)
    options: dict[str, Any] = {"weights": None, "num_classes": classes}
    if name in _AUXILIARY:
        # The published weights are for colours scaled by what transform_input does.
        transform = network.pretrained and in_channels == 3
        options |= {"aux_logits": False, "init_weights": True, "transform_input": transform}
    model = _call(partial(models.get_model, name), network, where, **options)
    if network.pretrained:
        try:
            # From a network of theirs, as it can read the names in its older weights.
            state = models.get_model(name, weights="DEFAULT", progress=False).state_dict()
        except (OSError, RuntimeError) as error:
            raise _download_error(network, where, error) from error
        left_out = _AUXILIARY.get(name, ())
        state = {key: x for key, x in state.items() if not key.startswith(left_out)}
        load_weights(model, state, f"{where}.pretrained")
    if in_channels != 3:
        _average_colours(model, in_channels, network, where)
    return model


def _average_colours(model: nn.Module, in_channels: int, network: Network, where: str) -> None:
    """Give the first convolution ``in_channels``, each with the mean weights of the colours.

    Their sum stays, so on an image of equal channels nothing changes.
    """
    convolution = next((m for m in model.modules() if isinstance(m, nn.Conv2d)), None)
    if convolution is None or convolution.in_channels != 3:
        raise DistillError(f"{where}.model: {network.model} takes images of 3 channels alone")
    with torch.no_grad():
        weight = convolution.weight.sum(1, keepdim=True) / in_channels
        weight = weight.expand(-1, in_channels, -1, -1).contiguous()
    convolution.weight = nn.Parameter(weight)
    convolution.in_channels = in_channels


def _build_timm(
    network: Network, name: str, in_channels: int, classes: int, where: str
) -> nn.Module:
    timm = _import("timm", network, where)
    if not timm.is_model(name):
        _check_known(name, timm.list_models(), network, where)
    create = partial(timm.create_model, name, in_chans=in_channels, num_classes=classes)
    model = _call(create, network, where, pretrained=False)
    if not network.pretrained:
        return model
    try:  # the arguments are right, so an error is one of the download
        return create(**network.arguments, pretrained=True)
    except Exception as error:  # of whichever library timm downloads by
        raise _download_error(network, where, error) from error


_SOURCES = {"cifar": _build_cifar, "torchvision": _build_torchvision, "timm": _build_timm}


def _build_imported(network: Network, in_channels: int, classes: int, where: str) -> nn.Module:
    _refuse_pretrained(network, where)
    factory = find_callable(network.model, f"{where}.model", _NAMES)
    try:
        parameters: Mapping[str, inspect.Parameter] = inspect.signature(factory).parameters
    except ValueError:  # written in C
        parameters = {}
    kinds = {parameter.kind for parameter in parameters.values()}
    by_name = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    taken = {
        key: value
        for key, value in {"in_channels": in_channels, "classes": classes}.items()
        if inspect.Parameter.VAR_KEYWORD in kinds
        or (key in parameters and parameters[key].kind in by_name)
    }
    # What the recipe gives, such as another number of classes, counts more than the data's.
    taken = {key: value for key, value in taken.items() if key not in network.arguments}
    return _call(factory, network, where, **taken)


def _call(factory: Callable[..., Any], network: Network, where: str, **keywords: Any) -> nn.Module:
    try:
        model = factory(**keywords, **network.arguments)
    except (Exception, SystemExit) as error:
        key = "arguments" if network.arguments else "model"
        raise DistillError(f"{where}.{key}: {network.model} refuses: {explain(error)}") from error
    problem = None
    if not isinstance(model, nn.Module):
        problem = f"{type(model).__name__}, must return a torch.nn.Module"
    # A program of torch.export has an eval of its own, which raises an error.
    elif isinstance(model, torch.jit.ScriptModule) or "eval" in vars(model):
        problem = (
            "a program, by TorchScript or torch.export, must return the torch.nn.Module that it "
            "was made from"
        )
    elif any(map(is_lazy, (*model.parameters(), *model.buffers()))):
        problem = "a network with lazy modules, which have no weights yet; must run it once before"
    if problem:
        raise DistillError(f"{where}.model: {network.model} returned {problem}")
    return model


def _import(name: str, network: Network, where: str) -> Any:
    try:
        return importlib.import_module(name)
    except Exception as error:  # any, if it was built for another PyTorch
        package = name.partition(".")[0]
        raise DistillError(
            f"{where}.model: {network.model} needs {package} ({error}); pip install {package}"
        ) from error


def _check_known(name: str, known: list[str], network: Network, where: str) -> None:
    if name not in known:
        source = network.model.partition("/")[0]
        near = did_you_mean(name, known, limit=3)
        raise DistillError(f"{where}.model: {source} has no classification model {name!r}{near}")


def _refuse_pretrained(network: Network, where: str) -> None:
    if network.pretrained:
        raise DistillError(
            f"{where}.pretrained: is true, must be false: of {network.model} no weights are "
            "published; weights may name a file of them"
        )


def _download_error(network: Network, where: str, error: Exception) -> DistillError:
    return DistillError(
        f"{where}.pretrained: the weights of {network.model} cannot be downloaded: {error}"
    )
