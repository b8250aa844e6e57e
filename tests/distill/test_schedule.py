"""Learning rates against PyTorch's own schedulers, step by step; and when to stop early."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.optim.lr_scheduler import (
    ConstantLR,
    CosineAnnealingLR,
    LinearLR,
    LRScheduler,
    MultiStepLR,
    SequentialLR,
)

from fsp_kernels.distill.config import Stop, Training
from fsp_kernels.distill.schedule import Patience, make_optimizer, rate, set_rate

STEPS = 40


def training(**settings: Any) -> Training:
    return Training(**({"steps": STEPS, "learning_rate": 0.3} | settings))


def rates(make: Callable[[Optimizer], LRScheduler]) -> list[float]:
    """The rates of ``STEPS`` steps by one of PyTorch's schedulers."""
    optimizer = SGD([nn.Parameter(torch.zeros(1))], 0.3)
    scheduler, found = make(optimizer), []
    for _ in range(STEPS):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


def ours(settings: Training) -> list[float]:
    return [rate(settings, STEPS, step) for step in range(STEPS)]


def warmed_up(optimizer: Optimizer) -> LRScheduler:
    warm = STEPS // 4
    linear = LinearLR(optimizer, 1 / (warm + 1), 1.0, warm)
    return SequentialLR(optimizer, [linear, CosineAnnealingLR(optimizer, STEPS - warm)], [warm])


def multistep(*milestones: float) -> tuple[dict[str, Any], Callable[[Optimizer], LRScheduler]]:
    steps = [round(x * STEPS) for x in milestones]
    settings = {"schedule": "multistep", "milestones": milestones, "decay": 0.2}
    return settings, lambda optimizer: MultiStepLR(optimizer, steps, 0.2)


@pytest.mark.parametrize(
    ("settings", "theirs"),
    [
        ({"schedule": "constant"}, lambda optimizer: ConstantLR(optimizer, 1.0)),
        *(multistep(*x) for x in [(0.5, 0.75), (0.1,), (0.5, 0.5), (1.0,), ()]),
        ({"schedule": "cosine"}, lambda optimizer: CosineAnnealingLR(optimizer, STEPS)),
        ({"schedule": "cosine", "warmup": 0.25}, warmed_up),
    ],
)
def test_rates_are_torchs(
    settings: dict[str, Any], theirs: Callable[[Optimizer], LRScheduler]
) -> None:
    assert ours(training(**settings)) == pytest.approx(rates(theirs), rel=1e-9)


def test_cosine_ends_one_step_short_of_0() -> None:
    found = ours(training(schedule="cosine"))
    assert 0 < found[-1] < 0.01 * 0.3
    assert rate(training(schedule="cosine"), STEPS, STEPS) == pytest.approx(0, abs=1e-12)


def test_warm_up_moves_no_milestone() -> None:
    plain = ours(training(schedule="multistep"))
    assert ours(training(schedule="multistep", warmup=0.25))[10:] == plain[10:]


def test_warm_up_rises_evenly_and_is_never_0() -> None:
    found = ours(training(schedule="constant", warmup=0.1))
    assert found[:5] == pytest.approx([0.06, 0.12, 0.18, 0.24, 0.3])


@pytest.mark.parametrize("warmup", [0.0, 0.3, 0.99])
@pytest.mark.parametrize("schedule", ["multistep", "cosine", "constant"])
@pytest.mark.parametrize("steps", [1, 2, 3, 7])
def test_a_rate_is_more_than_0_and_at_most_the_full_one(
    schedule: str, warmup: float, steps: int
) -> None:
    settings = training(schedule=schedule, warmup=warmup)
    assert all(0 < rate(settings, steps, step) <= 0.3 for step in range(steps))


def test_a_set_rate_is_that_of_all_parameters() -> None:
    groups = [{"params": [nn.Parameter(torch.zeros(1))]} for _ in range(2)]
    optimizer = SGD(groups, 0.3)
    set_rate(optimizer, 0.1)
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.1]


@pytest.mark.parametrize(
    ("settings", "kind", "expected"),
    [
        ({"momentum": 0.8}, SGD, {"momentum": 0.8}),
        ({"optimizer": "adam"}, Adam, {}),
        ({"optimizer": "adamw"}, AdamW, {}),
    ],
)
def test_the_optimizer_is_torchs_with_the_recipes_settings(
    settings: dict[str, Any], kind: type[Optimizer], expected: dict[str, Any]
) -> None:
    parameters = [nn.Parameter(torch.zeros(1))]
    optimizer = make_optimizer(training(weight_decay=0.02, **settings), parameters)
    [group] = optimizer.param_groups
    assert type(optimizer) is kind
    expected = expected | {"lr": 0.3, "weight_decay": 0.02, "params": parameters}
    assert {key: group[key] for key in expected} == expected


def test_patience_ends_after_so_many_losses_that_are_no_lower() -> None:
    patience, found = Patience(Stop(patience=2)), []
    for loss in (3.0, 3.0, 2.0, 2.5, 2.0):
        patience.note(loss)
        found.append(patience.exhausted)
    assert found == [False, False, False, False, True]


def test_a_loss_that_is_no_number_is_not_lower() -> None:
    patience = Patience(Stop(patience=1))
    patience.note(3.0)
    patience.note(math.nan)
    assert patience.exhausted


def test_without_a_rule_patience_never_ends() -> None:
    patience = Patience(None)
    for _ in range(100):
        patience.note(1.0)
    assert not patience.exhausted


@pytest.mark.parametrize("losses", [[], [3.0], [3.0, 4.0], [3.0, 2.0, 2.0]])
def test_patience_comes_back_as_it_was(losses: list[float]) -> None:
    first, second = Patience(Stop(patience=2)), Patience(Stop(patience=2))
    for loss in losses:
        first.note(loss)
    second.load(first.state())
    for loss in (2.5, 2.0):
        first.note(loss)
        second.note(loss)
        assert second.exhausted == first.exhausted
        assert second.state() == first.state()
