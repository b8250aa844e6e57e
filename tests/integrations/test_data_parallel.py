"""DDP and FSDP2 on two gloo processes: the gradients of one process on the whole batch."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from distilled_steps import (
    BOUND,
    PAIRS,
    PATHS,
    REASON,
    WEIGHT,
    batch,
    naive_gradients,
    networks,
)
from processes import run_group
from tolerances import assert_near
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import fsp_kernels as fsp

pytestmark = pytest.mark.slow

# Gives the student's output and the FSP loss of some images.
Forward = Callable[[Tensor], tuple[Tensor, Tensor]]


def distilled(model: nn.Module) -> Forward:
    return lambda images: model(images)[:2]


def ddp_of_the_distiller(student: nn.Module, teacher: nn.Module, **options: bool) -> Forward:
    return distilled(DistributedDataParallel(fsp.Distiller(student, teacher, PAIRS), **options))


def ddp_in_a_distiller(student: nn.Module, teacher: nn.Module, **options: bool) -> Forward:
    parallel = DistributedDataParallel(student, **options)
    pairs = [(tuple(f"module.{path}" for path in pair), pair) for pair in PAIRS]
    return distilled(fsp.Distiller(parallel, teacher, pairs))


def ddp_with_taps(student: nn.Module, teacher: nn.Module, **options: bool) -> Forward:
    return with_taps(DistributedDataParallel(student, **options), student, teacher)


def with_taps(model: nn.Module, student: nn.Module, teacher: nn.Module) -> Forward:
    """The FSP loss outside of forward; ``model`` runs ``student``."""
    ours, theirs = (fsp.FeatureTaps(x, PATHS).attach() for x in (student, teacher))

    def forward(images: Tensor) -> tuple[Tensor, Tensor]:
        output = model(images)
        with torch.no_grad():
            teacher(images)
        return output, fsp.fsp_loss(ours.take_pairs(), theirs.take_pairs())

    return forward


def shard_stages(student: nn.Module, **options: bool) -> None:
    for stage in (student.stage1, student.stage2, student.stage3):
        fully_shard(stage, **options)


def fsdp_of_the_distiller(student: nn.Module, teacher: nn.Module, **options: bool) -> Forward:
    shard_stages(student, **options)
    return distilled(fully_shard(fsp.Distiller(student, teacher, PAIRS), **options))


def fsdp_in_a_distiller(student: nn.Module, teacher: nn.Module, **options: bool) -> Forward:
    shard_stages(student, **options)
    return distilled(fsp.Distiller(fully_shard(student, **options), teacher, PAIRS))


def fsdp_with_taps(student: nn.Module, teacher: nn.Module, **options: bool) -> Forward:
    shard_stages(student, **options)
    return with_taps(fully_shard(student, **options), student, teacher)


LOSSES = {
    "both losses": lambda output, loss, labels: F.cross_entropy(output, labels) + WEIGHT * loss,
    "the FSP loss alone": lambda output, loss, labels: loss,  # noqa: ARG005
    # What Distiller's docstring says to write; the classifier's gradient is zero instead of None.
    "the FSP loss and 0 * output": lambda output, loss, labels: loss + 0 * output.sum(),  # noqa: ARG005
}


def check(rank: int, wrap: Callable[..., Forward], options: dict[str, bool], total: str) -> None:
    """Hold the gradients of this process to those of the whole batch, three times in a row."""
    student, teacher = networks()
    images, labels = batch()
    expected = naive_gradients(student, teacher, images, labels, task=total == "both losses")
    forward = wrap(student, teacher, **options)
    for _ in range(3):  # DDP rebuilds its buckets after the first
        student.zero_grad()
        output, loss = forward(images[rank::2])
        LOSSES[total](output, loss, labels[rank::2]).backward()
        found = {name: full(x.grad) for name, x in student.named_parameters() if x.grad is not None}
        for name in found.keys() - expected.keys():
            assert not found[name].any()
        for name, gradient in expected.items():
            assert_near(found[name], gradient, BOUND, REASON)


def full(gradient: Tensor) -> Tensor:
    return gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient


@pytest.mark.parametrize("options", [{}, {"static_graph": True}], ids=str)
@pytest.mark.parametrize("total", ["both losses", "the FSP loss and 0 * output"])
@pytest.mark.parametrize("wrap", [ddp_of_the_distiller, ddp_in_a_distiller, ddp_with_taps])
def test_ddp(wrap: Callable[..., Forward], total: str, options: dict[str, bool]) -> None:
    run_group(2, check, wrap, options, total)


def test_ddp_of_the_distiller_can_search_for_parameters_that_the_fsp_loss_does_not_use() -> None:
    options = {"find_unused_parameters": True}
    run_group(2, check, ddp_of_the_distiller, options, "the FSP loss alone")


@pytest.mark.parametrize("reshard", [True, False])
@pytest.mark.parametrize("total", ["both losses", "the FSP loss and 0 * output"])
@pytest.mark.parametrize("wrap", [fsdp_of_the_distiller, fsdp_in_a_distiller, fsdp_with_taps])
def test_fsdp(wrap: Callable[..., Forward], total: str, reshard: bool) -> None:
    run_group(2, check, wrap, {"reshard_after_forward": reshard}, total)


def test_fsdp_without_resharding_needs_no_output_in_the_loss() -> None:
    options = {"reshard_after_forward": False}
    run_group(2, check, fsdp_with_taps, options, "the FSP loss alone")
