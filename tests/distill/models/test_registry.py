"""Networks by name: each source gives logits, and what cannot be had is said plainly."""

from __future__ import annotations

import copy
import io
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fsp_kernels.distill.config import Network
from fsp_kernels.distill.models import CifarResNet, WideResNet, build_model, parameter_count
from fsp_kernels.distill.models.registry import SelectLogits
from fsp_kernels.errors import DistillError

TIMM = pytest.mark.skipif("not __import__('importlib').util.find_spec('timm')", reason="needs timm")
TORCHVISION = pytest.mark.skipif(
    "not __import__('importlib').util.find_spec('torchvision')", reason="needs torchvision"
)
PROGRAMS = ("scripted", "traced", "frozen", "exported")
USERS_MODULE = """\
import torch
from torch import nn


class Nets:
    @staticmethod
    def linear(in_channels, classes, bias=True):
        return nn.Sequential(nn.Flatten(), nn.Linear(in_channels * 16, classes, bias=bias))


def takes_all(**keywords):
    net = nn.Identity()
    net.keywords = keywords
    return net


def takes_none():
    return nn.Identity()


def no_module():
    return 3


def lacks_a_key():
    return build({})


def build(widths):
    return nn.Linear(4, widths["last"])


def needs_torch():
    return nn.Linear(4, -1)


def asserts():
    assert number < 3


def ends():
    raise SystemExit(0)


def scripted():
    return torch.jit.script(nn.Linear(4, 2))


def traced():
    return torch.jit.trace(nn.Linear(4, 2), torch.zeros(1, 4))


def frozen():
    return torch.jit.freeze(torch.jit.script(nn.Linear(4, 2)).eval())


def exported():
    return torch.export.export(nn.Linear(4, 2), (torch.zeros(1, 4),)).module()


def lazy():
    return nn.Sequential(nn.Flatten(), nn.LazyLinear(2))


def twice(classes):
    net = nn.Linear(4, classes)
    net.register_forward_hook(lambda _net, _args, output: (output, output))
    return net


def is_interrupted():
    raise KeyboardInterrupt


number = 3
"""


def build(name: str, in_channels: int = 3, classes: int = 7, **settings: Any) -> nn.Module:
    return build_model(
        Network(model=name, **settings), in_channels=in_channels, classes=classes, where="teacher"
    )


@pytest.fixture
def users_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module in the current directory, which is not on ``sys.path``."""
    (tmp_path / "users_nets.py").write_text(USERS_MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    monkeypatch.delitem(sys.modules, "users_nets", raising=False)
    return "users_nets"


@pytest.mark.parametrize(
    ("name", "arguments", "expected"),
    [
        ("cifar/resnet14", {}, CifarResNet(14, 1, 1, 7)),
        ("cifar/resnet8", {"width": 2}, CifarResNet(8, 2, 1, 7)),
        ("cifar/wrn10-3", {}, WideResNet(10, 3, 1, 7)),
    ],
)
def test_cifar_networks_are_named_by_depth_and_width(
    name: str, arguments: dict[str, int], expected: nn.Module
) -> None:
    model = build(name, in_channels=1, arguments=arguments)
    assert type(model) is type(expected)
    assert parameter_count(model) == parameter_count(expected)
    assert model(torch.randn(2, 1, 8, 8)).shape == (2, 7)


@TORCHVISION
@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small", "squeezenet1_1"])
@pytest.mark.parametrize("in_channels", [1, 3, 4])
def test_torchvision_networks_take_any_channels(name: str, in_channels: int) -> None:
    model = build(f"torchvision/{name}", in_channels)
    assert model(torch.randn(2, in_channels, 64, 64)).shape == (2, 7)


@TORCHVISION
def test_a_grey_image_is_seen_as_by_three_channels() -> None:
    torch.manual_seed(1)
    colour = build("torchvision/resnet18").eval()
    torch.manual_seed(1)
    grey = build("torchvision/resnet18", in_channels=1).eval()
    x = torch.randn(1, 1, 32, 32)
    torch.testing.assert_close(grey(x), colour(x.expand(-1, 3, -1, -1)), rtol=1e-3, atol=1e-4)


@TORCHVISION
@pytest.mark.parametrize(("name", "size"), [("googlenet", 32), ("inception_v3", 75)])
def test_networks_with_auxiliary_classifiers_give_logits_alone(name: str, size: int) -> None:
    with torch.device("meta"):
        model = build(f"torchvision/{name}").train()
        assert model(torch.randn(2, 3, size, size)).shape == (2, 7)


@TORCHVISION
def test_arguments_reach_a_torchvision_network() -> None:
    model = build("torchvision/resnet18", arguments={"zero_init_residual": True})
    assert not model.layer1[0].bn2.weight.any()
    with pytest.raises(DistillError, match=r"teacher\.arguments: torchvision/resnet18 refuses"):
        build("torchvision/resnet18", arguments={"groups": 2})


@TIMM
@pytest.mark.parametrize("name", ["resnet10t", "resnet10t.c3_in1k"])  # a tag is part of the name
def test_timm_networks_take_any_channels_and_arguments(name: str) -> None:
    model = build(f"timm/{name}", in_channels=1, arguments={"drop_rate": 0.25})
    assert model.drop_rate == 0.25
    assert model(torch.randn(2, 1, 32, 32)).shape == (2, 7)


def test_a_package_that_is_missing_or_broken_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(DistillError, match=r"teacher\.model: timm/resnet10t needs timm .*pip in"):
        build("timm/resnet10t")

    def import_module(_name: str) -> None:
        raise RuntimeError("operator torchvision::nms does not exist")

    monkeypatch.setattr("importlib.import_module", import_module)
    with pytest.raises(DistillError, match=r"needs torchvision \(operator torchvision::nms does"):
        build("torchvision/resnet18")


def test_a_callable_of_the_current_directory_gets_what_it_takes(users_module: str) -> None:
    model = build(f"{users_module}:Nets.linear", in_channels=2, arguments={"bias": False})
    assert model(torch.randn(3, 2, 4, 4)).shape == (3, 7)
    assert model[1].bias is None
    assert isinstance(build(f"{users_module}:takes_none"), nn.Identity)
    model = build(f"{users_module}:takes_all", arguments={"classes": 2, "extra": "x"})
    assert model.keywords == {"in_channels": 3, "classes": 2, "extra": "x"}


@pytest.mark.filterwarnings("ignore:.torch.jit:FutureWarning")
@pytest.mark.parametrize(
    ("attribute", "message"),
    [
        ("no_module", r"teacher\.model: users_nets:no_module returned int, must return a torch"),
        ("number", r"teacher\.model: users_nets:number is of type int, must be callable"),
        ("Nets.linaer", r"teacher\.model: 'users_nets' has no 'Nets\.linaer'; did you mean 'line"),
        ("a b", r"teacher\.model: is 'users_nets:a b', must be cifar/NAME"),
        *((name, rf"users_nets:{name} returned a program, by TorchScript or") for name in PROGRAMS),
        (
            "lazy",
            r"teacher\.model: users_nets:lazy returned a network with lazy modules, which have ",
        ),
    ],
)
def test_what_is_no_network_factory_is_refused(
    users_module: str, attribute: str, message: str
) -> None:
    with pytest.raises(DistillError, match=message):
        build(f"{users_module}:{attribute}")


@pytest.mark.parametrize(
    ("attribute", "message"),
    [
        (
            "lacks_a_key",
            r"KeyError: 'last'\n.*, in lacks_a_key: .*\n  .*, in build: return nn\.Lin",
        ),
        (
            "needs_torch",
            r"negative dimension -1.*\n  \S+users_nets\.py:\d+, in needs_torch: return",
        ),
        ("asserts", r"AssertionError\n  .*, in asserts: assert number < 3"),
        ("ends", r"SystemExit: 0\n  .*, in ends: raise SystemExit\(0\)"),
    ],
)
def test_an_error_of_a_users_constructor_is_shown_with_the_users_own_lines(
    users_module: str, attribute: str, message: str
) -> None:
    name = f"{users_module}:{attribute}"
    with pytest.raises(
        DistillError, match=rf"^teacher\.model: {name} refuses: .*{message}"
    ) as error:
        build(name)
    assert "torch/nn" not in str(error.value)


def test_an_interruption_passes_a_users_constructor(users_module: str) -> None:
    with pytest.raises(KeyboardInterrupt):
        build(f"{users_module}:is_interrupted")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "import os\nos.environ['NO_SUCH']",
            r"KeyError: 'NO_SUCH'\n  \S+wrong\.py:2, in <module>: os",
        ),
        ("import no_such_package", r"No module named 'no_such_package'\n  .*, in <module>: import"),
        ("raise SystemExit(0)", r"SystemExit: 0\n"),
        ("def net(:", r"invalid syntax \(wrong\.py, line 1\)$"),
        ("x = '", r"unterminated string literal .*wrong\.py, line 1\)$"),
    ],
)
def test_an_error_of_a_users_module_is_shown_with_the_users_own_lines(
    users_module: str, tmp_path: Path, text: str, message: str
) -> None:
    del users_module  # its current directory is what counts
    (tmp_path / "wrong.py").write_text(text)
    with pytest.raises(DistillError, match=rf"^teacher\.model: cannot import 'wrong': {message}"):
        build("wrong:net")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resnet26", r"teacher\.model: is 'resnet26', must be cifar/NAME, torchvision/NAME"),
        ("torchvison/resnet18", r"must be cifar/NAME.*; did you mean 'torchvision'\?"),
        ("cifar/resnet", r"teacher\.model: is 'cifar/resnet', must be cifar/resnetDEPTH or cifar"),
        ("cifar/resnet27", r"teacher\.model: cifar/resnet27 refuses: depth is 27, must be 6n \+ 2"),
        ("cifar/wrn16-0", r"teacher\.model: cifar/wrn16-0 refuses: width is 0, must be 1 to 45 at"),
        (f"cifar/resnet{'9' * 900}", r"must be cifar/resnetDEPTH or cifar/wrnDEPTH-WIDTH"),
        pytest.param(
            "torchvision/resnet81",
            r"teacher\.model: torchvision has no classification model 'resnet81'; did you mean 're",
            marks=TORCHVISION,
        ),
        pytest.param(
            "torchvision/deeplabv3_resnet50", "no classification model", marks=TORCHVISION
        ),
        pytest.param("timm/resnet10x", r"timm has no .* 'resnet10x'; did you mean", marks=TIMM),
        ("no_such_nets:net", r"teacher\.model: cannot import 'no_such_nets': No module named"),
    ],
)
def test_unknown_names_are_refused_with_close_ones(name: str, message: str) -> None:
    with pytest.raises(DistillError, match=message):
        build(name)


@pytest.mark.parametrize(
    "name",
    [
        "cifar/resnet8",
        pytest.param("torchvision/resnet18", marks=TORCHVISION),
        pytest.param("timm/resnet10t", marks=TIMM),
    ],
)
def test_a_wrong_keyword_is_refused(name: str) -> None:
    with pytest.raises(DistillError, match=rf"teacher\.arguments: {name} refuses: .*'depht'"):
        build(name, arguments={"depht": 8})


@dataclass
class Output:
    logits: Tensor
    states: tuple[Tensor, ...]


class Net(nn.Module):
    """Gives its logits in a ``kind`` of output."""

    def __init__(self, kind: str = "object") -> None:
        super().__init__()
        self.kind, self.fc = kind, nn.Linear(4, 3)

    def forward(self, x: Tensor) -> object:
        y = self.fc(x)
        outputs = {
            "object": Output(y, (x,)),
            "tuple": (y, x),
            "mapping": {"logits": y},
            "tensor": y,
        }
        return outputs[self.kind]


X = torch.randn(5, 4)


def selecting(path: str, kind: str = "object") -> Net:
    model = Net(kind)
    model.register_forward_hook(SelectLogits(path, "student.logits"))
    return model


@pytest.mark.parametrize(
    ("kind", "path"),
    [
        ("object", ":output.logits"),
        ("tuple", ":output[0]"),
        ("mapping", ":output.logits"),
        ("tensor", ":output[0]"),  # what some networks give in one of their modes
    ],
)
def test_the_logits_take_the_place_of_all_that_the_network_gives(kind: str, path: str) -> None:
    model = selecting(path, kind)
    assert torch.equal(model(X), model.fc(X))


def test_copies_and_files_of_the_network_give_logits_too_and_names_stay() -> None:
    model, file = selecting(":output.logits"), io.BytesIO()
    assert list(model.state_dict()) == ["fc.weight", "fc.bias"]
    assert [name for name, _ in model.named_modules()] == ["", "fc"]
    torch.save(model, file)
    file.seek(0)
    for other in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        assert torch.equal(other(X), model(X))


def test_a_compiled_or_exported_network_gives_logits() -> None:
    torch._dynamo.reset()
    model = selecting(":output.logits")
    assert torch.equal(torch.compile(model, backend="eager", fullgraph=True)(X), model(X))
    shapes = ({0: torch.export.Dim("batch", min=1)},)
    program = torch.export.export(model, (X,), dynamic_shapes=shapes).module()
    assert torch.equal(program(X[:2]), model(X[:2]))


@pytest.mark.parametrize(
    ("path", "message"),
    [
        (":out", r"^student\.logits: :out: ends in 'out', must end in ':input' or ':output'"),
        ("fc:output", r"^student\.logits: is 'fc:output', must choose in the network's own output"),
        (":input[0]", r"^student\.logits: is ':input\[0\]', must choose in the network's own out"),
        ("logits", r"^student\.logits: is 'logits', must choose in the network's own output"),
    ],
)
def test_another_path_is_refused(path: str, message: str) -> None:
    with pytest.raises(DistillError, match=message):
        selecting(path)


def test_logits_that_are_not_there_are_named() -> None:
    message = r"^student\.logits: :output\[2\]: has no 2, as :output is a tuple of 2; choose"
    with pytest.raises(DistillError, match=message):
        selecting(":output[2]", "tuple")(X)


def test_the_recipe_says_which_output_has_the_logits(users_module: str) -> None:
    assert build(f"{users_module}:twice", logits=":output[1]")(torch.zeros(3, 4)).shape == (3, 7)
    with pytest.raises(DistillError, match=r"^teacher\.logits: is 'fc', must choose in the netwo"):
        build(f"{users_module}:twice", logits="fc")
