"""A run's state comes back from a checkpoint, the optimiser's with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fsp_kernels.distill import checkpoint
from fsp_kernels.distill.config import Training
from fsp_kernels.distill.records import Phase
from fsp_kernels.distill.schedule import make_optimizer
from fsp_kernels.distill.state import (
    State,
    load_part,
    named,
    numbered,
    optimizer_tensors,
    restore_optimizer,
)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))


def step(model: nn.Module, optimizer: Optimizer, number: int) -> None:
    generator = torch.Generator().manual_seed(number)
    model[0](torch.randn(5, 3, generator=generator)).square().mean().backward()  # not the last
    optimizer.step()
    optimizer.zero_grad()


OPTIMIZERS = pytest.mark.parametrize(
    "settings",
    [
        {"momentum": 0.0},
        {"momentum": 0.9},
        {"optimizer": "adam"},
        {"optimizer": "adamw"},
    ],
    ids=lambda settings: "-".join(map(str, settings.values())),
)


@OPTIMIZERS
def test_an_optimizer_goes_on_to_the_same_bits(tmp_path: Path, settings: dict[str, Any]) -> None:
    training = Training(steps=6, learning_rate=0.1, **settings)
    model, other = network(), network()
    optimizer = make_optimizer(training, model.parameters())
    for number in range(3):
        step(model, optimizer, number)
    tensors = named("network", model.state_dict()) | named(
        "optimizer", optimizer_tensors(optimizer)
    )
    checkpoint.save(tmp_path / "a", tensors, {})

    state = State(tensors=checkpoint.load(tmp_path / "a").tensors)
    load_part(other, state, "network")
    resumed = make_optimizer(training, other.parameters())
    restore_optimizer(resumed, state.part("optimizer"))
    for number in range(3, 6):
        step(model, optimizer, number)
        step(other, resumed, number)
    for ours, theirs in zip(other.parameters(), model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


@OPTIMIZERS
def test_a_fresh_optimizers_state_comes_back(settings: dict[str, Any]) -> None:
    training = Training(steps=6, learning_rate=0.1, **settings)
    optimizer = make_optimizer(training, network().parameters())
    restore_optimizer(optimizer, optimizer_tensors(optimizer))
    assert optimizer_tensors(optimizer) == {}


def test_a_restored_optimizer_keeps_its_settings() -> None:
    old = make_optimizer(Training(steps=6, learning_rate=0.1), network().parameters())
    model = network()
    new = make_optimizer(Training(steps=6, learning_rate=0.7), model.parameters())
    step(model, old, 0)
    restore_optimizer(new, optimizer_tensors(old))
    assert new.param_groups[0]["lr"] == 0.7


def full_state() -> State:
    return State(
        phases=[Phase("stage 1", ["FSP loss"], [{"step": 0, "fsp_loss": 0.1}], 1.5, False)],
        step=7,
        history=[{"step": 4, "accuracy": 1 / 3}],
        seconds=0.1 + 0.2,
        loss_sum=1e-300,
        patience={"best": None, "waited": 2},
        scaler={"scale": 65536.0},
        tensors={"network/a.b": torch.ones(2), "before/0": torch.zeros(1)},
    )


def test_a_state_comes_back_from_a_checkpoint(tmp_path: Path) -> None:
    state = full_state()
    note = state.note() | {"settings": {}}
    checkpoint.save(tmp_path / "a", state.tensors, note)
    back = State.of(checkpoint.load(tmp_path / "a"))
    assert back.note() == state.note()
    assert back.phases == state.phases
    assert back.tensors.keys() == state.tensors.keys()


def test_a_part_is_the_tensors_of_one_prefix() -> None:
    one, two = torch.ones(1), torch.zeros(2)
    tensors = named("network", {"a.b": one}) | named("networks", {"a.b": two})
    found: dict[str, Tensor] = State(tensors=tensors).part("network")
    assert list(found) == ["a.b"]
    assert found["a.b"] is one


def test_numbered_tensors_keep_their_order() -> None:
    tensors = [torch.tensor(i) for i in range(12)]
    found = State(tensors=numbered("before", tensors)).part("before")
    assert [int(found[str(i)]) for i in range(12)] == list(range(12))


def test_no_module_takes_no_part() -> None:
    load_part(None, State(), "projection")


def test_a_module_wants_all_of_its_part() -> None:
    with pytest.raises(RuntimeError, match="Missing key"):
        load_part(network(), State(), "network")
