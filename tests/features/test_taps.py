"""Feature maps by module path, from models that know nothing of it."""

from __future__ import annotations

import copy
import io
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from threading import Barrier

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from torch.utils.hooks import RemovableHandle

from fsp_kernels.distill.models import CifarResNet
from fsp_kernels.errors import DistillError
from fsp_kernels.features.taps import FeatureTaps

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


class Checkpointed(nn.Module):
    """Runs ``first`` and ``second`` within a checkpoint, or without one where ``kind`` is None."""

    def __init__(self, kind: str | None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.kind = kind
        self.stem, self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        if self.kind is None:
            return self.block(x)
        return checkpoint(self.block, x, use_reentrant=self.kind == "reentrant")

    def block(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).tanh())


class EarlyExit(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.near, self.far = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor, exits: bool = False) -> Tensor:
        return self.near(x) if exits else self.far(self.near(x))


class WritesOver(nn.Module):
    """Writes to the map of ``norm`` in place: by a module, or by a statement."""

    def __init__(self, by: str) -> None:
        super().__init__()
        self.by, self.norm, self.relu = by, nn.BatchNorm1d(4).eval(), nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        if self.by == "statement":
            x += 1
        return self.relu(x)


both_kinds = pytest.mark.parametrize("kind", ["reentrant", "not reentrant"])


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


def test_maps_of_any_depth_have_gradients_and_change_no_value() -> None:
    model, x = CifarResNet(14).eval(), torch.randn(2, 3, 16, 16)
    expected = model(x)
    with FeatureTaps(model, ["stage2.1.conv2:input", "stage2.1.relu1", "stage3:input"]) as taps:
        assert torch.equal(model(x), expected)
        before, same, after = taps.take()
    assert before.shape == after.shape == (2, 32, 8, 8)
    assert torch.equal(before, same)
    before.square().sum().backward()
    assert model.stage1[0].conv1.weight.grad is not None
    assert model.stage3[0].conv1.weight.grad is None


def test_no_hook_stays_behind_even_after_an_error() -> None:
    model = Branchy()
    taps = FeatureTaps(model, ["twice", "split:input"])
    assert hook_count(model) == 0
    with taps:
        once = hook_count(model)
        assert once > 0
        taps.attach()
        assert hook_count(model) == once
    assert hook_count(model) == 0
    with pytest.raises(DistillError, match="not attached: call take"):
        taps.take()
    with pytest.raises(RuntimeError, match="shapes"), taps:
        model(torch.randn(1, 5))
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
        (
            "stage1:output[0",
            r"ends in 'output\[0', must end in .* as ':output\[0\]' or ':output\.lo",
        ),
        ("zzz:output[0]", r"CifarResNet has no module 'zzz'; it has conv, bn, relu, stage1"),
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


def test_a_value_within_a_tuple_must_be_chosen() -> None:
    model, x = Branchy(), torch.randn(3, 4)
    with FeatureTaps(model, ["split:output[0]", "split:output[-1]", "split:input.x"]) as taps:
        model(x)
        first, second, given = taps.take()
    assert first is given
    assert torch.equal(second, first + 1)
    message = r"^split: is a tuple of 2, not a tensor; choose :output\[0\] or :output\[1\]$"
    with FeatureTaps(model, ["split"]) as taps:
        model(x)
        with pytest.raises(DistillError, match=message):
            taps.take()


def test_of_several_arguments_one_can_be_chosen() -> None:
    model, x, y = nn.Bilinear(4, 3, 2), torch.randn(5, 4), torch.randn(5, 3)
    with FeatureTaps(model, [":input[1]", ":input.input1", ":input"]) as taps:
        model(input1=x, input2=y)
        with pytest.raises(
            DistillError, match=r"^:input\[1\]: has no 1, .* choose :input\.input1 or"
        ):
            taps.take()
    with FeatureTaps(model, [":input[1]", ":input"]) as taps:
        model(x, y)
        second, first = taps.take()
    assert second is y
    assert first is x


@pytest.mark.parametrize("compiled", [False, True])
def test_values_of_the_model_itself_are_chosen_from_what_it_gives(compiled: bool) -> None:
    torch._dynamo.reset()
    model, x = Splitter(), torch.randn(3, 4)
    model.register_forward_hook(lambda _module, _args, output: output[0])  # the logits, say
    with FeatureTaps(model, [":output[1]", ":output[0]"]) as taps:
        y = (torch.compile(model, backend="eager", fullgraph=True) if compiled else model)(x)
        second, first = taps.take()
    assert torch.equal(y, x)
    assert torch.equal(first, x)
    assert torch.equal(second, x + 1)


def test_a_map_overwritten_in_place_is_refused_not_returned_wrong() -> None:
    model = nn.Sequential(nn.BatchNorm2d(2), nn.ReLU(inplace=True))
    with FeatureTaps(model, ["0"]) as taps, torch.no_grad():
        model(torch.randn(2, 2, 4, 4))
        with pytest.raises(DistillError, match="0: was overwritten in place by a later module"):
            taps.take()
    identity, x = nn.Sequential(nn.Identity()), torch.randn(3)
    with FeatureTaps(identity, ["0"]) as taps, torch.no_grad():
        identity(x)
        assert taps.take()[0] is x  # not a copy


@pytest.mark.parametrize("by", ["module", "statement"])
@pytest.mark.parametrize("path", ["norm", "relu:input"])
def test_an_inference_map_is_as_it_was_before_it_was_overwritten(by: str, path: str) -> None:
    model, x = WritesOver(by), torch.randn(3, 4)
    with FeatureTaps(model, [path]) as taps:
        with torch.inference_mode():
            model(x)
        plus = 1 if by == "statement" and path == "relu:input" else 0
        torch.testing.assert_close(taps.take()[0], model.norm(x) + plus)


@both_kinds
def test_a_checkpointed_map_has_its_gradient_or_is_refused(kind: str) -> None:
    x, gradients = torch.randn(3, 4), []
    for model in (Checkpointed(None), Checkpointed(kind)):
        with FeatureTaps(model, ["stem", "first"]) as taps:
            model(x)
            if model.kind == "reentrant":
                with pytest.raises(DistillError, match=r"first: has no graph.*use_reentrant=False"):
                    taps.take()
                break
            loss = sum(y.square().sum() for y in taps.take())
            gradients.append(torch.autograd.grad(loss, [model.stem.weight, model.first.weight]))
    else:
        torch.testing.assert_close(gradients[1], gradients[0])
    with FeatureTaps(model, ["stem", "first:input"]) as taps:  # before the checkpoint
        model(x)
        assert all(x.requires_grad for x in taps.take())


@both_kinds
def test_what_backward_runs_again_is_not_recorded(kind: str) -> None:
    model = Checkpointed(kind)
    with FeatureTaps(model, ["first", "second:input"]) as taps:
        loss = model(torch.randn(3, 4)).sum()
        with pytest.raises(DistillError) if kind == "reentrant" else nullcontext():
            taps.take()
        loss.backward()
        assert model.first.weight.grad is not None
        with pytest.raises(DistillError, match="first: did not run"):
            taps.take()


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@both_kinds
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_checkpointed_teacher_needs_no_graph(kind: str, mode: type) -> None:
    model, x = Checkpointed(kind), torch.randn(3, 4)
    with FeatureTaps(model, ["first"]) as taps:
        with mode():
            model(x)
        assert torch.equal(taps.take()[0], model.first(model.stem(x)))


def test_a_frozen_part_gives_maps_without_a_graph() -> None:
    class Frozen(Checkpointed):
        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                x = self.stem(x)
            return self.block(x)

    model, x = Frozen(None), torch.randn(3, 4)
    model.first.requires_grad_(False)
    with FeatureTaps(model, ["stem", "first", "second"]) as taps:
        model(x)
        assert [y.requires_grad for y in taps.take()] == [False, False, True]


def test_a_copy_of_the_model_is_not_recorded() -> None:
    model, x = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), torch.randn(3, 4)
    with FeatureTaps(model, ["0", "1:input"]) as taps:
        average = copy.deepcopy(model).requires_grad_(False)
        y = model(x)
        assert torch.equal(average(2 * x), average[1](average[0](2 * x)))
        hidden, same = taps.take()
        assert hidden.requires_grad
        assert torch.equal(model[1](hidden), y)
        assert same is hidden
        average(x)
        with pytest.raises(DistillError, match="0: did not run"):
            taps.take()


def test_a_tapped_model_can_be_saved_whole_and_the_file_has_no_taps() -> None:
    model, x, file = Branchy(), torch.randn(3, 4), io.BytesIO()
    with FeatureTaps(model, ["twice", "split:input"]) as taps:
        y = model(x)  # the taps hold maps with a graph, which no file can
        torch.save(model, file)
        file.seek(0)
        read = torch.load(file, weights_only=False)
        assert torch.equal(read(x), y)
        assert torch.equal(taps.take()[0], y)
        read(x)
        with pytest.raises(DistillError, match="twice: did not run"):
            taps.take()
    with FeatureTaps(read, ["twice"]) as taps:
        read(x)
        assert torch.equal(taps.take()[0], y)


def test_hooks_of_a_file_do_not_take_the_numbers_of_later_ones(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = nn.Sequential(nn.Identity())
    monkeypatch.setattr(RemovableHandle, "next_id", 0)
    with FeatureTaps(model, ["0:input"]):
        file = pickle.dumps(model)
    monkeypatch.setattr(RemovableHandle, "next_id", 0)  # as in another process
    read, calls = pickle.loads(file), []
    for module in read.modules():
        for _ in range(3):
            module.register_forward_pre_hook(lambda *given: calls.append(len(given)))
    read(torch.ones(1))
    assert calls == [2] * 6  # none is called with keywords, as those of the taps are


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_taps_copied_with_their_model_have_to_be_attached(copied: Callable) -> None:
    model, x = Branchy(), torch.randn(3, 4)
    taps = FeatureTaps(model, ["twice"]).attach()
    model(x)
    other_model, other = copied((model, taps))
    other_model(2 * x)
    with pytest.raises(DistillError, match=r"not attached.*a copy of taps is never"):
        other.take()
    with other:
        y = other_model(2 * x)
        assert torch.equal(other.take()[0], y)
    assert torch.equal(taps.take()[0], model(x))


@pytest.mark.parametrize("path", ["0", "0:input"])
def test_replicas_of_data_parallel_are_refused(path: str) -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    with FeatureTaps(model, [path]):
        # What nn.parallel.replicate does for each GPU.
        replica = model._replicate_for_data_parallel()
        replica._modules["0"] = child = model[0]._replicate_for_data_parallel()
        child._parameters = {k: v.clone() for k, v in model[0].named_parameters()}
        for part in (replica, child):
            with pytest.raises(DistillError, match=r"replica.*DistributedDataParallel"):
                part(torch.randn(3, 4))


def test_a_model_inside_ddp_is_recorded(tmp_path: Path) -> None:
    store = f"file://{tmp_path}/store"
    torch.distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    try:
        model = Branchy()
        wrapped, x = DistributedDataParallel(model), torch.randn(3, 4)
        with FeatureTaps(model, ["split:input", "twice"]) as taps:
            for _ in range(2):
                y = wrapped(x)
                first, second = taps.take()
                assert second is y
                (first.square().sum() + y.sum()).backward()
    finally:
        torch.distributed.destroy_process_group()


def test_a_pass_has_no_maps_of_an_earlier_one() -> None:
    model, x = EarlyExit(), torch.randn(3, 4)
    with FeatureTaps(model, ["near", "far"]) as taps:
        model(x)
        model(x, exits=True)
        with pytest.raises(DistillError, match="far: did not run"):
            taps.take()
        model(x)
        with pytest.raises(RuntimeError, match="shapes"):
            model(torch.randn(3, 5))
        with pytest.raises(DistillError, match="near: did not run"):
            taps.take()
        near = model.near(x)  # parts can be run without the whole
        far = model.far(near)
        assert all(a is b for a, b in zip(taps.take(), (near, far), strict=True))


def test_two_taps_of_one_model_are_two() -> None:
    model, x = Branchy(), torch.randn(3, 4)
    with FeatureTaps(model, ["twice"]) as outer:
        with FeatureTaps(model, ["twice", "split:input"]) as inner:
            y = model(x)
            assert inner.take()[0] is y
        assert outer.take()[0] is y
        y = model(x)
        assert outer.take()[0] is y


def test_each_thread_takes_the_maps_of_its_own_pass() -> None:
    model, both_have_run = nn.Sequential(nn.Linear(4, 4)), Barrier(2, timeout=60)

    def run(x: Tensor) -> bool:
        y = model(x)
        both_have_run.wait()
        return taps.take()[0] is y

    with FeatureTaps(model, ["0"]) as taps, ThreadPoolExecutor(2) as threads:
        assert all(threads.map(run, torch.randn(2, 3, 4)))


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


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_a_compiled_map_is_as_it_was_before_it_was_overwritten(mode: type) -> None:
    torch._dynamo.reset()
    model, x = WritesOver("module"), torch.randn(3, 4)
    with FeatureTaps(model, ["norm", "relu"]) as taps:
        with mode():
            y = torch.compile(model, backend="eager", fullgraph=True)(x)
        before, after = taps.take()
    torch.testing.assert_close(before, model.norm(x))
    assert torch.equal(after, y)


@both_kinds
def test_a_compiled_checkpoint_is_as_an_eager_one(kind: str) -> None:
    torch._dynamo.reset()
    model, x = Checkpointed(kind), torch.randn(3, 4)
    with FeatureTaps(model, ["stem", "first"]) as taps:
        loss = torch.compile(model, backend="eager")(x).sum()
        if kind == "reentrant":
            with pytest.raises(DistillError, match="first: has no graph"):
                taps.take()
        else:
            first = taps.take()[1]
            [found] = torch.autograd.grad(first.sum(), [model.first.bias], retain_graph=True)
            torch.testing.assert_close(found, torch.full((4,), 3.0))  # of three rows
        loss.backward()
        with pytest.raises(DistillError, match="stem: did not run"):
            taps.take()


def test_the_public_name_needs_pytorch_alone() -> None:
    code = (
        "import sys\n"
        f"sys.modules.update(dict.fromkeys({EXTRAS}))\n"
        "from fsp_kernels.distill import FeatureTaps\n"
        "from fsp_kernels.distill.models import CifarResNet\n"
        "FeatureTaps(CifarResNet(8), ['stage1'])"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_maps_are_taken_two_by_two_unless_their_number_is_odd() -> None:
    model, x = Branchy(), torch.randn(1, 4)
    with FeatureTaps(model, ["split:input", "twice", "twice", "split:input"]) as taps:
        model(x)
        (a, b), (c, d) = taps.take_pairs()
    assert a is d
    assert b is c
    assert a is not b
    with pytest.raises(DistillError, match="twice: has no second map to make a pair with"):
        FeatureTaps(model, ["twice"]).take_pairs()
