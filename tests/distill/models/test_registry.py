"""Networks by name: each source gives logits, and what cannot be had is said plainly."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fsp_kernels.distill.config import Network
from fsp_kernels.distill.errors import DistillError
from fsp_kernels.distill.models import CifarResNet, WideResNet, build_model, parameter_count

TIMM = pytest.mark.skipif("not __import__('importlib').util.find_spec('timm')", reason="needs timm")
TORCHVISION = pytest.mark.skipif(
    "not __import__('importlib').util.find_spec('torchvision')", reason="needs torchvision"
)
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


def test_a_cifar_resnet_is_named_by_its_depth() -> None:
    model = build("cifar/resnet14", in_channels=1)
    assert isinstance(model, CifarResNet)
    assert parameter_count(model) == parameter_count(CifarResNet(14, 1, 1, 7))
    assert model(torch.randn(2, 1, 8, 8)).shape == (2, 7)


def test_a_wide_resnet_is_named_by_depth_and_width() -> None:
    model = build("cifar/wrn10-3", in_channels=1)
    assert isinstance(model, WideResNet)
    assert parameter_count(model) == parameter_count(WideResNet(10, 3, 1, 7))
    assert model(torch.randn(2, 1, 8, 8)).shape == (2, 7)


def test_arguments_reach_a_cifar_network() -> None:
    model = build("cifar/resnet8", arguments={"width": 2})
    assert parameter_count(model) == parameter_count(CifarResNet(8, 2, 3, 7))


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
    model = build("torchvision/resnet18", arguments={"width_per_group": 64, "groups": 1})
    assert parameter_count(model) == parameter_count(build("torchvision/resnet18"))
    with pytest.raises(DistillError, match=r"teacher\.arguments: torchvision/resnet18 refuses"):
        build("torchvision/resnet18", arguments={"groups": 2})


@TIMM
def test_timm_networks_take_any_channels_and_arguments() -> None:
    model = build("timm/resnet10t", in_channels=1, arguments={"drop_rate": 0.25})
    assert model.drop_rate == 0.25
    assert model(torch.randn(2, 1, 32, 32)).shape == (2, 7)


@TIMM
def test_a_tag_of_timm_is_part_of_the_name() -> None:
    assert build("timm/resnet10t.c3_in1k")(torch.randn(2, 3, 32, 32)).shape == (2, 7)


def test_without_timm_its_networks_say_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(DistillError, match=r"teacher\.model: timm/resnet10t needs timm .*pip in"):
        build("timm/resnet10t")


def test_a_callable_of_the_current_directory_is_called_with_what_it_takes(
    users_module: str,
) -> None:
    model = build(f"{users_module}:Nets.linear", in_channels=2, arguments={"bias": False})
    assert model(torch.randn(3, 2, 4, 4)).shape == (3, 7)
    assert model[1].bias is None


def test_a_callable_that_takes_any_keyword_is_given_the_datas_and_the_users_win(
    users_module: str,
) -> None:
    model = build(f"{users_module}:takes_all", arguments={"classes": 2, "extra": "x"})
    assert model.keywords == {"in_channels": 3, "classes": 2, "extra": "x"}


def test_a_callable_that_takes_nothing_is_given_nothing(users_module: str) -> None:
    assert isinstance(build(f"{users_module}:takes_none"), nn.Identity)


@pytest.mark.filterwarnings("ignore:.torch.jit:FutureWarning")
@pytest.mark.parametrize(
    ("attribute", "message"),
    [
        ("no_module", r"teacher\.model: users_nets:no_module returned int, must return a torch"),
        ("number", r"teacher\.model: users_nets:number is of type int, must be callable"),
        ("Nets.linaer", r"teacher\.model: 'users_nets' has no 'Nets\.linaer'; did you mean 'line"),
        ("a b", r"teacher\.model: is 'users_nets:a b', must be cifar/NAME"),
        ("scripted", r"teacher\.model: users_nets:scripted returned a program, by TorchScript or"),
        ("traced", r"teacher\.model: users_nets:traced returned a program, by TorchScript or"),
        ("frozen", r"teacher\.model: users_nets:frozen returned a program, by TorchScript or"),
        ("exported", r"teacher\.model: users_nets:exported returned a program, by TorchScript or"),
        (
            "lazy",
            r"teacher\.model: users_nets:lazy returned a network whose lazy modules have no we",
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


def test_logits_are_chosen_where_the_recipe_says(users_module: str) -> None:
    assert build(f"{users_module}:twice", logits=":output[1]")(torch.zeros(3, 4)).shape == (3, 7)
    with pytest.raises(
        DistillError, match=r"^teacher\.logits: is 'fc', must choose in the network's"
    ):
        build(f"{users_module}:twice", logits="fc")


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


def test_a_broken_package_of_networks_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def import_module(_name: str) -> None:
        raise RuntimeError("operator torchvision::nms does not exist")

    monkeypatch.setattr("importlib.import_module", import_module)
    with pytest.raises(DistillError, match=r"needs torchvision \(operator torchvision::nms does"):
        build("torchvision/resnet18")


def test_a_module_that_cannot_be_imported_is_named() -> None:
    with pytest.raises(DistillError, match=r"teacher\.model: cannot import 'no_such_nets': No mod"):
        build("no_such_nets:net")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resnet26", r"teacher\.model: is 'resnet26', must be cifar/NAME, torchvision/NAME"),
        ("torchvison/resnet18", r"must be cifar/NAME.*; did you mean 'torchvision'\?"),
        ("cifar/resnet", r"teacher\.model: is 'cifar/resnet', must be cifar/resnetDEPTH or cifar"),
        ("cifar/resnet27", r"teacher\.model: cifar/resnet27 refuses: depth is 27, must be 6n \+ 2"),
        ("cifar/wrn16-0", r"teacher\.model: cifar/wrn16-0 refuses: width is 0, must be 1 to 45 at"),
        ("cifar/resnet99999998", r"refuses: depth is 99999998, must be 6n \+ 2 .* at most 1202$"),
        ("cifar/wrn10-99999999", r"refuses: width is 99999999, must be 1 to 57 at depth 10$"),
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
