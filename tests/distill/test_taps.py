"""Feature maps by module path, from models that know nothing of it."""

from __future__ import annotations

import shutil
import subprocess
import sys

import pytest
import torch
from torch import Tensor, nn

from fsp_kernels.distill.errors import DistillError
from fsp_kernels.distill.models import CifarResNet
from fsp_kernels.distill.taps import FeatureTaps

EXTRAS = ("accelerate", "matplotlib", "rich", "safetensors", "sklearn", "yaml")


class Branchy(nn.Module):
    """Returns tuples inside, calls by keyword, reuses a module, leaves one out."""

    def __init__(self) -> None:
        super().__init__()
        self.twice = nn.Linear(4, 4)
        self.split = Splitter()
        self.idle = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.split(x=self.twice(x))
        return self.twice(first + second)


class Splitter(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, x + 1


def hook_count(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_inputs_and_outputs_come_in_the_order_of_the_paths() -> None:
    model, x = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)), torch.randn(5, 4)
    with FeatureTaps(model, ["2", "0:input", "1:output", "2:input"]) as taps:
        y = model(x)
        last, first, hidden, same = taps.take()
    assert torch.equal(last, y)
    assert torch.equal(first, x)
    assert torch.equal(hidden, model[1](model[0](x)))
    assert torch.equal(same, hidden)


def test_any_depth_of_a_network_can_be_tapped() -> None:
    model = CifarResNet(14).eval()
    with FeatureTaps(model, ["stage2.1.conv2:input", "stage2.1.relu1", "stage3:input"]) as taps:
        model(torch.randn(1, 3, 16, 16))
        before, same, after = taps.take()
    assert before.shape == (1, 32, 8, 8)
    assert torch.equal(before, same)
    assert after.shape == (1, 32, 8, 8)


def test_gradients_flow_through_the_maps() -> None:
    model = CifarResNet(8)
    with FeatureTaps(model, ["stage1"]) as taps:
        model(torch.randn(2, 3, 8, 8))
        taps.take()[0].square().sum().backward()
    assert model.stage1[0].conv1.weight.grad is not None
    assert model.stage2[0].conv1.weight.grad is None


def test_tapping_changes_no_value() -> None:
    model, x = CifarResNet(8).eval(), torch.randn(2, 3, 8, 8)
    with FeatureTaps(model, ["stage1", "fc:input"]):
        tapped = model(x)
    assert torch.equal(tapped, model(x))


def test_no_hook_stays_behind_even_after_an_error() -> None:
    model = Branchy()
    taps = FeatureTaps(model, ["twice", "split:input"])
    assert hook_count(model) == 0
    with taps:
        assert hook_count(model) == 2
    assert hook_count(model) == 0
    with pytest.raises(RuntimeError, match="shapes"), taps:
        model(torch.randn(1, 5))
    assert hook_count(model) == 0


def test_attaching_twice_is_attaching_once() -> None:
    model = Branchy()
    taps = FeatureTaps(model, ["twice"]).attach().attach()
    assert hook_count(model) == 1
    taps.detach()
    assert hook_count(model) == 0


def test_an_input_given_by_keyword_is_found_and_the_last_call_counts() -> None:
    model, x = Branchy(), torch.randn(1, 4)
    with FeatureTaps(model, ["split:input", "twice"]) as taps:
        y = model(x)
        split_input, twice = taps.take()
    assert torch.equal(split_input, model.twice(x))
    assert torch.equal(twice, y)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("stage1.0.relu", r"no module 'stage1\.0\.relu'; did you mean 'stage1\.0\.relu[12]' or"),
        ("zzz", r"CifarResNet has no module 'zzz'; it has conv, bn, relu, stage1"),
        ("", "has no module ''"),
        ("stage1:ouput", r"ends in 'ouput', must end in ':input' or ':output'"),
    ],
)
def test_a_wrong_path_is_refused_with_close_ones(path: str, message: str) -> None:
    with pytest.raises(DistillError, match=message):
        FeatureTaps(CifarResNet(8), [path])


def test_a_module_that_did_not_run_is_named_and_old_maps_are_not_given_again() -> None:
    model = Branchy()
    with FeatureTaps(model, ["twice", "idle"]) as taps:
        model(torch.randn(1, 4))
        with pytest.raises(DistillError, match="idle: did not run"):
            taps.take()
        with pytest.raises(DistillError, match="twice: did not run"):
            taps.take()


def test_a_value_that_is_no_tensor_is_refused() -> None:
    model = Branchy()
    with FeatureTaps(model, ["split"]), pytest.raises(DistillError, match="split: is a tuple"):
        model(torch.randn(1, 4))


def test_a_map_overwritten_in_place_is_refused_not_returned_wrong() -> None:
    model = nn.Sequential(nn.BatchNorm2d(2), nn.ReLU(inplace=True))
    with FeatureTaps(model, ["0"]) as taps, torch.no_grad():
        model(torch.randn(2, 2, 4, 4))
        with pytest.raises(DistillError, match="0: was overwritten in place by a later module"):
            taps.take()


@pytest.mark.parametrize(
    "backend",
    [
        "eager",
        pytest.param(
            "inductor",
            marks=pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler"),
        ),
    ],
)
def test_a_compiled_model_gives_the_same_maps_and_gradients(backend: str) -> None:
    torch._dynamo.reset()
    model = nn.Sequential(nn.Conv2d(2, 3, 1), nn.Sequential(nn.Tanh(), nn.Conv2d(3, 2, 1)))
    x, maps, gradients = torch.randn(2, 2, 4, 4), [], []
    with FeatureTaps(model, ["1.0", "1:input"]) as taps:
        for run in (model, torch.compile(model, backend=backend, fullgraph=True)):
            for _ in range(2):  # the second time, nothing is traced
                run(x)
                maps.append(taps.take())
            gradients.append(torch.autograd.grad(maps[-1][0].sum(), [model[0].weight])[0])
    for compiled in maps[1:]:
        torch.testing.assert_close(compiled, maps[0])
    torch.testing.assert_close(gradients[1], gradients[0])


def test_a_compiled_model_that_works_in_place_still_runs() -> None:
    torch._dynamo.reset()
    model = nn.Sequential(nn.BatchNorm2d(2), nn.ReLU(inplace=True)).eval()
    with FeatureTaps(model, ["1"]) as taps, torch.no_grad():
        y = torch.compile(model, backend="eager")(torch.randn(2, 2, 4, 4))
        assert torch.equal(taps.take()[0], y)


def test_the_public_name_needs_pytorch_alone() -> None:
    code = (
        "import sys\n"
        f"sys.modules.update(dict.fromkeys({EXTRAS}))\n"
        "from fsp_kernels.distill import FeatureTaps\n"
        "from fsp_kernels.distill.models import CifarResNet\n"
        "FeatureTaps(CifarResNet(8), ['stage1'])"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_maps_are_taken_two_by_two() -> None:
    model, x = Branchy(), torch.randn(1, 4)
    with FeatureTaps(model, ["split:input", "twice", "twice", "split:input"]) as taps:
        model(x)
        (a, b), (c, d) = taps.take_pairs()
    assert a is d
    assert b is c
    assert a is not b


def test_an_odd_map_has_no_pair() -> None:
    with pytest.raises(DistillError, match="twice: has no second map to make a pair with"):
        FeatureTaps(Branchy(), ["twice"]).take_pairs()
