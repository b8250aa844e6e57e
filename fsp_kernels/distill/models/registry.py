"""Networks by name: this package's, torchvision's, timm's, and those of importable callables."""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from fsp_kernels.distill.imports import find_callable
from fsp_kernels.distill.models.cifar import CifarResNet, WideResNet
from fsp_kernels.distill.models.weights import load_weights, read_weights
from fsp_kernels.errors import DistillError, did_you_mean, explain, prefixed
from fsp_kernels.features.paths import parse_path, select

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
    model = _Builder(network, in_channels, classes, where).build()
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


@dataclass
class _Builder:
    """Builds one network with its initial or published weights, by a method for each source."""

    network: Network
    in_channels: int
    classes: int
    where: str

    def build(self) -> nn.Module:
        model = self.network.model
        source, slash, name = model.partition("/")
        sources = {"cifar": self.cifar, "torchvision": self.torchvision, "timm": self.timm}
        if ":" in model:
            return self.imported()
        if slash and source in sources:
            return sources[source](name)
        hint = did_you_mean(source, sources) if slash else ""
        raise self.error("model", f"is {model!r}, must be {_NAMES}{hint}")

    def error(self, key: str, problem: str) -> DistillError:
        return DistillError(f"{self.where}.{key}: {problem}")

    def cifar(self, name: str) -> nn.Module:
        self.refuse_pretrained()
        match = re.fullmatch(r"resnet(\d{1,9})|wrn(\d{1,9})-(\d{1,9})", name)
        if not match:
            raise self.error(
                "model",
                f"is {self.network.model!r}, must be cifar/resnetDEPTH or cifar/wrnDEPTH-WIDTH, as "
                "cifar/resnet26 or cifar/wrn16-2",
            )
        kind = WideResNet if name.startswith("wrn") else CifarResNet
        create = partial(kind, *(int(number) for number in match.groups() if number))
        return self.call(create, in_channels=self.in_channels, classes=self.classes)

    def torchvision(self, name: str) -> nn.Module:
        models = self.package("torchvision.models")
        self.check_known(name, models.list_models(module=models))
        pretrained, auxiliary = self.network.pretrained, _AUXILIARY.get(name)
        options: dict[str, Any] = {"weights": None, "num_classes": self.classes}
        if auxiliary:
            # The published weights are for colours scaled by what transform_input does.
            transform = pretrained and self.in_channels == 3
            options |= {"aux_logits": False, "init_weights": True, "transform_input": transform}
        model = self.call(partial(models.get_model, name), **options)
        if pretrained:
            try:
                # The builder would run code that is pickled in the file. This downloads the same
                # file, and refuses one that holds more than tensors.
                weights = models.get_model_weights(name).DEFAULT
                weights.get_state_dict(progress=False, check_hash=True, weights_only=True)
                # From a network of theirs, as it can read the names in its older weights.
                state = models.get_model(name, weights="DEFAULT", progress=False).state_dict()
            except (OSError, RuntimeError, UnpicklingError) as error:
                raise self.download_error(error) from error
            kept = {key: x for key, x in state.items() if not key.startswith(auxiliary or ())}
            load_weights(model, kept, f"{self.where}.pretrained")
        if self.in_channels != 3:
            self.average_colours(model)
        return model

    def average_colours(self, model: nn.Module) -> None:
        """Give the first convolution ``in_channels``, each with the mean weights of the colours.

        Their sum stays, so on an image of equal channels nothing changes.
        """
        convolution = next((m for m in model.modules() if isinstance(m, nn.Conv2d)), None)
        if convolution is None or convolution.in_channels != 3:
            raise self.error("model", f"{self.network.model} takes images of 3 channels alone")
        with torch.no_grad():
            weight = convolution.weight.sum(1, keepdim=True) / self.in_channels
            weight = weight.expand(-1, self.in_channels, -1, -1).contiguous()
        convolution.weight = nn.Parameter(weight)
        convolution.in_channels = self.in_channels

    def timm(self, name: str) -> nn.Module:
        timm = self.package("timm")
        if not timm.is_model(name):
            self.check_known(name, timm.list_models())
        options = {"in_chans": self.in_channels, "num_classes": self.classes}
        create = partial(timm.create_model, name)
        model = self.call(create, **options, pretrained=False)
        if not self.network.pretrained:
            return model
        try:  # the arguments are right, so an error is one of the download
            return create(**options, **self.network.arguments, pretrained=True)
        except Exception as error:  # of whichever library timm downloads by
            raise self.download_error(error) from error

    def imported(self) -> nn.Module:
        self.refuse_pretrained()
        factory = find_callable(self.network.model, f"{self.where}.model", _NAMES)
        try:
            parameters = [*inspect.signature(factory).parameters.values()]
        except ValueError:  # written in C
            parameters = []
        names = {x.name for x in parameters if x.kind in (x.POSITIONAL_OR_KEYWORD, x.KEYWORD_ONLY)}
        takes_any = any(x.kind is x.VAR_KEYWORD for x in parameters)
        offered = {"in_channels": self.in_channels, "classes": self.classes}
        # What the recipe gives, such as another number of classes, counts more than the data's.
        left = {key: x for key, x in offered.items() if key not in self.network.arguments}
        return self.call(
            factory, **{key: x for key, x in left.items() if takes_any or key in names}
        )

    def call(self, factory: Callable[..., Any], **keywords: Any) -> nn.Module:
        name, arguments = self.network.model, self.network.arguments
        try:
            model = factory(**keywords, **arguments)
        except (Exception, SystemExit) as error:
            key = "arguments" if arguments else "model"
            raise self.error(key, f"{name} refuses: {explain(error)}") from error
        problem = None
        if not isinstance(model, nn.Module):
            problem = f"{type(model).__name__}, must return a torch.nn.Module"
        # A program of torch.export has an eval of its own, which raises an error.
        elif isinstance(model, torch.jit.ScriptModule) or "eval" in vars(model):
            problem = (
                "a program, by TorchScript or torch.export, must return the torch.nn.Module that "
                "it was made from"
            )
        elif any(map(is_lazy, (*model.parameters(), *model.buffers()))):
            problem = "a network with lazy modules, which have no weights; must run it once before"
        if problem:
            raise self.error("model", f"{name} returned {problem}")
        return model

    def package(self, name: str) -> Any:
        try:
            return importlib.import_module(name)
        except Exception as error:  # any, if it was built for another PyTorch
            package = name.partition(".")[0]
            problem = f"{self.network.model} needs {package} ({error}); pip install {package}"
            raise self.error("model", problem) from error

    def check_known(self, name: str, known: list[str]) -> None:
        if name not in known:
            source, near = self.network.model.partition("/")[0], did_you_mean(name, known, limit=3)
            raise self.error("model", f"{source} has no classification model {name!r}{near}")

    def refuse_pretrained(self) -> None:
        if self.network.pretrained:
            raise self.error(
                "pretrained",
                f"is true, must be false: of {self.network.model} no weights are published; "
                "weights may name a file of them",
            )

    def download_error(self, error: Exception) -> DistillError:
        problem = f"the weights of {self.network.model} cannot be downloaded or read: {error}"
        return self.error("pretrained", problem)
