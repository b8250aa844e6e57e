"""Networks that cannot be trained are found before training, and the check changes nothing."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fsp_kernels.distill.arms import TrainingStage
from fsp_kernels.distill.config import Fsp, Pair, SoftTargets, Training
from fsp_kernels.distill.dry_run import check_logits, check_steps
from fsp_kernels.distill.models import CifarResNet
from fsp_kernels.errors import DistillError
from fsp_kernels.features.pairs import check_pairs

IMAGES = torch.randn(2, 1, 8, 8)
TRAINING = Training(steps=1, learning_rate=0.1)
TASK = TrainingStage("task", "stage2", TRAINING, 1)
FSP = TrainingStage("stage 1", "stage1", TRAINING, 1, task=False, fsp=1.0)
ALL = TrainingStage("all", "stage2", TRAINING, 1, fsp=1.0, kd=SoftTargets())
PAIR = Pair(student=("stage1.0.relu1", "stage2"), teacher=("stage1.0.relu1", "stage2"))
NO_WEIGHT = "no weight that its loss depends on requires a gradient"


class Gives(nn.Module):
    """Logits changed by ``change``; ``training`` limits this to one mode."""

    def __init__(self, change: Callable[[Tensor], object], training: bool | None = None) -> None:
        super().__init__()
        self.change, self.when = change, training
        self.net = student()

    def forward(self, x: Tensor) -> object:
        y = self.net(x)
        return y if self.when not in (None, self.training) else self.change(y)


class Draws(CifarResNet):
    """Draws from every generator and has a module that is in a mode of its own."""

    def __init__(self) -> None:
        super().__init__(8, in_channels=1)
        self.bn.eval()

    def forward(self, x: Tensor) -> Tensor:
        x = x + torch.rand(1) + random.random() + float(np.random.rand())  # noqa: NPY002
        return super().forward(x)


def student() -> CifarResNet:
    return CifarResNet(8, in_channels=1)


def around(model: nn.Module, projection: bool = False) -> tuple[Any, ...]:
    """What ``check_steps`` takes after the images: a teacher and the pairs with it."""
    teacher = CifarResNet(8, width=1 + projection, in_channels=1)
    shapes = check_pairs([PAIR], model, teacher, IMAGES[:1], projection)
    return "student", Fsp(projection=projection), [PAIR], shapes, teacher


def state_of(model: nn.Module) -> list[object]:
    generators = torch.get_rng_state().tolist(), random.getstate(), list(np.random.get_state()[1])  # noqa: NPY002
    modules = [
        (m.training, len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()
    ]
    gradients = [parameter.grad for parameter in model.parameters()]
    return [generators, modules, gradients, [x.tolist() for x in model.state_dict().values()]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda y: (y, y),
            r"tuple of 2, must give .* choose :output\[0\] or :output\[1\] as student\.logits, or "
            "name a module:callable",
        ),
        (lambda y: {"logits": y}, r"dict of 1, .*choose :output\.logits as student\.logits, or"),
        (lambda _: None, "NoneType, must give .*; name a module:callable"),
        (lambda y: y[:, :7], r"shape \(2, 7\), must give .*, here \(2, 10\)"),
        (lambda y: y.mean(0), r"shape \(10,\), must"),
        (lambda y: y[:1], r"shape \(1, 10\), must"),
        (lambda y: y[..., None, None], r"shape \(2, 10, 1, 1\), must"),
        (lambda y: y.argmax(1, keepdim=True).expand(2, 10), r"torch\.int64, must"),
    ],
)
@pytest.mark.parametrize("training", [False, True])
def test_a_network_that_gives_no_logits_is_refused_in_either_mode(
    change: Callable[[Tensor], object], message: str, training: bool
) -> None:
    mode = "while it trains, " if training else ""
    with pytest.raises(DistillError, match=rf"^student\.model: {mode}gives (a )?{message}"):
        check_logits(Gives(change, training), IMAGES, 10, "student")
    if training:
        check_logits(Gives(change, training), IMAGES, 10, "teacher", trained=False)


def test_logits_that_are_not_finite_are_refused_in_the_mode_that_counts() -> None:
    def overflow(y: Tensor) -> Tensor:
        return y * torch.inf

    message = "gives numbers that are not finite"
    with pytest.raises(DistillError, match=rf"^student\.model: while it trains, {message}"):
        check_logits(Gives(overflow, training=True), IMAGES, 10, "student")
    with pytest.raises(DistillError, match=rf"^teacher\.model: {message}"):
        check_logits(Gives(overflow, training=False), IMAGES, 10, "teacher", trained=False)
    # Before training, running statistics are not those of any images.
    check_logits(Gives(overflow, training=False), IMAGES, 10, "student")


@pytest.mark.parametrize("stages", [[TASK], [FSP], [FSP, TASK], [ALL]])
@pytest.mark.parametrize("projection", [False, True])
def test_a_network_that_can_be_trained_stays_as_it_was(
    stages: list[TrainingStage], projection: bool
) -> None:
    model = Draws()
    given = around(model, projection)
    before = state_of(model)
    check_logits(model, IMAGES, 10, "student")
    check_steps(model, stages, IMAGES, *given)
    assert state_of(model) == before


def test_a_network_that_waits_for_other_processes_is_not_run_in_training_mode(
    tmp_path: Path,
) -> None:
    model = nn.SyncBatchNorm.convert_sync_batchnorm(student())
    store = f"file://{tmp_path}/store"
    torch.distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    try:
        check_logits(model, IMAGES, 10, "student")
        check_steps(model, [TASK, FSP], IMAGES, *around(model))
    finally:
        torch.distributed.destroy_process_group()


class NoBackward(torch.autograd.Function):
    @staticmethod
    def forward(_ctx: object, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(_ctx: object, _gradient: Tensor) -> Tensor:
        raise KeyError("missing")


@pytest.mark.parametrize(
    ("model", "problem"),
    [
        (student().requires_grad_(False), NO_WEIGHT),
        (Gives(Tensor.detach), NO_WEIGHT),
        (Gives(NoBackward.apply), r"KeyError: 'missing'\n  .*, in backward: raise"),
    ],
    ids=["frozen", "without a graph", "an error in the backward pass"],
)
def test_a_step_that_fails_is_found(model: nn.Module, problem: str) -> None:
    message = rf"^student\.model: cannot be trained by task: {problem}"
    with pytest.raises(DistillError, match=message):
        check_steps(model, [TASK], IMAGES, "student", Fsp())
    check_logits(model, IMAGES, 10, "teacher", trained=False)


def test_the_fsp_loss_alone_needs_weights_before_the_maps() -> None:
    model = student().requires_grad_(False)
    model.fc.requires_grad_(True)
    check_steps(model, [TASK, ALL], IMAGES, *around(model))
    with pytest.raises(DistillError, match=f"cannot be trained by stage 1: {NO_WEIGHT}"):
        check_steps(model, [FSP, TASK], IMAGES, *around(model))


def test_a_map_that_has_no_graph_in_training_is_found() -> None:
    class Reentrant(CifarResNet):
        def forward(self, x: Tensor) -> Tensor:
            x = self.relu(self.bn(self.conv(x)))
            x = checkpoint(self.stage1, x, use_reentrant=True) if self.training else self.stage1(x)
            return self.fc(self.pool(self.stage3(self.stage2(x))).flatten(1))

    model = Reentrant(8, in_channels=1)
    message = r"^pairs: while it trains, the student's stage1\.0\.relu1: has no graph"
    with pytest.raises(DistillError, match=message):
        check_steps(model, [FSP], IMAGES, *around(model))
