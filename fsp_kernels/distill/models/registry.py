"""Names to networks: this package's, torchvision's, timm's, and any importable callable's."""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from fsp_kernels.distill.errors import DistillError, did_you_mean, explain
from fsp_kernels.distill.imports import find_callable
from fsp_kernels.distill.models.cifar import CifarResNet, WideResNet
from fsp_kernels.distill.models.logits import SelectLogits
from fsp_kernels.distill.models.weights import load_weights, read_weights

if TYPE_CHECKING:
    # Networks are built where the recipes' YAML need not be readable.
    from fsp_kernels.distill.config import Network

_NAMES = "cifar/NAME, torchvision/NAME, timm/NAME or package.module:callable"
_CIFAR: dict[str, Callable[..., nn.Module]] = {
    r"resnet(?P<depth>\d{1,9})": CifarResNet,
    r"wrn(?P<depth>\d{1,9})-(?P<width>\d{1,9})": WideResNet,
}
# Of torchvision, the networks that give more than logits while they train unless told not to, and
# their weights for that.
_AUXILIARY = {"googlenet": ("aux1.", "aux2."), "inception_v3": ("AuxLogits.",)}


def build_model(
    network: Network, *, in_channels: int, classes: int, where: str = "student"
) -> nn.Module:
    """The network that a recipe names, with its initial, given or published weights.

    ``cifar/resnet26`` is a ``CifarResNet`` (any depth ``6n + 2``), ``cifar/wrn16-2`` a
    ``WideResNet`` (any depth ``6n + 4`` and width). ``torchvision/NAME`` is any classification
    network there: what it does to three colours is spread over ``in_channels``. ``timm/NAME`` needs
    timm. ``package.module:callable`` is imported, also from the current directory, and called with
    the arguments, and with ``in_channels`` and ``classes`` where it takes them.

    Args:
        network: the recipe's section.
        in_channels: of the images.
        classes: number of logits.
        where: the section's name, for messages.

    Raises:
        DistillError: there is no such network, it refuses the arguments, or the weights are not to
            be had or of another network.
    """
    if network.weights is not None and network.pretrained:
        raise DistillError(f"{where}.weights: given beside pretrained, must be one of the two")
    source, slash, name = network.model.partition("/")
    if ":" in network.model:
        model = _imported(network, in_channels, classes, where)
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


def _cifar(network: Network, name: str, in_channels: int, classes: int, where: str) -> nn.Module:
    _refuse_pretrained(network, where)
    for pattern, kind in _CIFAR.items():
        match = re.fullmatch(pattern, name)
        if match:
            numbers = {key: int(number) for key, number in match.groupdict().items()}
            return _call(kind, network, where, **numbers, in_channels=in_channels, classes=classes)
    raise DistillError(
        f"{where}.model: is {network.model!r}, must be cifar/resnetDEPTH or cifar/wrnDEPTH-WIDTH, "
        "as cifar/resnet26 or cifar/wrn16-2"
    )


def _torchvision(
    network: Network, name: str, in_channels: int, classes: int, where: str
) -> nn.Module:
    models = _package("torchvision.models", network, where)
    _check_known(name, models.list_models(module=models), network, where)
    options: dict[str, Any] = {"weights": None, "num_classes": classes}
    if name in _AUXILIARY:
        # The published weights are for colours scaled by what transform_input does.
        transform = network.pretrained and in_channels == 3
        options |= {"aux_logits": False, "init_weights": True, "transform_input": transform}
    model = _call(partial(models.get_model, name), network, where, **options)
    if network.pretrained:
        key = f"{where}.pretrained"
        try:
            # By way of a network of theirs, which knows the names of its older weights.
            state = models.get_model(name, weights="DEFAULT", progress=False).state_dict()
        except (OSError, RuntimeError) as error:
            raise _no_download(network, where, error) from error
        auxiliary = _AUXILIARY.get(name, ())
        kept = {path: x for path, x in state.items() if not path.startswith(auxiliary)}
        load_weights(model, kept, key)
    if in_channels != 3:
        _spread_colours(model, in_channels, network, where)
    return model


def _timm(network: Network, name: str, in_channels: int, classes: int, where: str) -> nn.Module:
    timm = _package("timm", network, where)
    if not timm.is_model(name):
        _check_known(name, timm.list_models(), network, where)
    options = {"in_chans": in_channels, "num_classes": classes}
    create = partial(timm.create_model, name)
    model = _call(create, network, where, **options, pretrained=False)
    if not network.pretrained:
        return model
    try:  # the arguments are right, so what fails now is the download
        return create(**options, **network.arguments, pretrained=True)
    except Exception as error:  # of whichever library timm downloads by
        raise _no_download(network, where, error) from error


def _imported(network: Network, in_channels: int, classes: int, where: str) -> nn.Module:
    _refuse_pretrained(network, where)
    factory = find_callable(network.model, f"{where}.model", _NAMES)
    offered = {"in_channels": in_channels, "classes": classes}
    taken = {key: value for key, value in offered.items() if _takes(factory, key)}
    # The user's own number of classes, say, wins over the data's.
    fixed = {key: value for key, value in taken.items() if key not in network.arguments}
    return _call(factory, network, where, **fixed)


_SOURCES = {"cifar": _cifar, "torchvision": _torchvision, "timm": _timm}


def _call(factory: Callable[..., Any], network: Network, where: str, **keywords: Any) -> nn.Module:
    try:
        model = factory(**keywords, **network.arguments)
    except (Exception, SystemExit) as error:
        key = "arguments" if network.arguments else "model"
        raise DistillError(f"{where}.{key}: {network.model} refuses: {explain(error)}") from error
    if not isinstance(model, nn.Module):
        raise DistillError(
            f"{where}.model: {network.model} returned {type(model).__name__}, "
            "must return a torch.nn.Module"
        )
    # A program of torch.export has an eval of its own, which refuses.
    if isinstance(model, torch.jit.ScriptModule) or "eval" in vars(model):
        raise DistillError(
            f"{where}.model: {network.model} returned a program, by TorchScript or torch.export, "
            "must return the torch.nn.Module that it was made of"
        )
    if any(map(is_lazy, (*model.parameters(), *model.buffers()))):
        raise DistillError(
            f"{where}.model: {network.model} returned a network whose lazy modules have no weights "
            "yet; must run it once before"
        )
    return model


def _takes(factory: Callable[..., Any], keyword: str) -> bool:
    try:
        parameters = inspect.signature(factory).parameters
    except ValueError:  # written in C
        return False
    kinds = {parameter.kind for parameter in parameters.values()}
    if inspect.Parameter.VAR_KEYWORD in kinds:
        return True
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return keyword in parameters and parameters[keyword].kind in named


def _package(name: str, network: Network, where: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except Exception as error:  # where it does not go with this PyTorch, anything
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
            "published; a file of them can be given as weights"
        )


def _no_download(network: Network, where: str, error: Exception) -> DistillError:
    return DistillError(
        f"{where}.pretrained: the weights of {network.model} cannot be had: {error}"
    )


def _spread_colours(model: nn.Module, in_channels: int, network: Network, where: str) -> None:
    """Give the first convolution ``in_channels``, each with the mean of what the colours had.

    The sum over the channels stays, so on an image of equal channels nothing changes.
    """
    convolution = next((m for m in model.modules() if isinstance(m, nn.Conv2d)), None)
    if convolution is None or convolution.in_channels != 3:
        raise DistillError(f"{where}.model: {network.model} takes images of 3 channels alone")
    with torch.no_grad():
        weight = convolution.weight.sum(1, keepdim=True) / in_channels
        weight = weight.expand(-1, in_channels, -1, -1).contiguous()
    convolution.weight = nn.Parameter(weight)
    convolution.in_channels = in_channels
