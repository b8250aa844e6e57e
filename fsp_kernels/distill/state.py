"""Where a run is between two optimiser steps, as a checkpoint holds it.

Learning rates, random numbers and the order of images are functions of the step, so they need no
place here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fsp_kernels.distill.checkpoint import Checkpoint
from fsp_kernels.distill.records import Phase


@dataclass
class State:
    """A run's position.

    Attributes:
        phases: the stages that are done.
        step: optimiser steps of the stage at hand.
        history: its evaluations so far, as ``Phase.history``.
        seconds: spent in its steps.
        loss_sum: of the training losses since the last evaluation.
        patience: of its stopping rule.
        scaler: of the loss, in fp16.
        tensors: weights (``network/...``, ``projection/...``), the optimiser's state
            (``optimizer/...``), and the student's FSP matrices before the stage (``before/...``).
    """

    phases: list[Phase] = field(default_factory=list)
    step: int = 0
    history: list[dict[str, float]] = field(default_factory=list)
    seconds: float = 0.0
    loss_sum: float = 0.0
    patience: dict[str, Any] | None = None
    scaler: dict[str, Any] | None = None
    tensors: dict[str, Tensor] = field(default_factory=dict)

    def note(self) -> dict[str, Any]:
        """All but the tensors, for JSON."""
        return {name: value for name, value in asdict(self).items() if name != "tensors"}

    @classmethod
    def of(cls, stored: Checkpoint) -> State:
        """What a checkpoint holds."""
        note = dict(stored.note)
        phases = [Phase(**phase) for phase in note.pop("phases")]
        note.pop("settings", None)
        return cls(phases=phases, tensors=stored.tensors, **note)

    def part(self, name: str) -> dict[str, Tensor]:
        """The tensors under ``name/``."""
        prefix = f"{name}/"
        return {k[len(prefix) :]: v for k, v in self.tensors.items() if k.startswith(prefix)}


def named(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors under ``prefix/``."""
    return {f"{prefix}/{name}": tensor for name, tensor in tensors.items()}


def optimizer_tensors(optimizer: Optimizer) -> dict[str, Tensor]:
    """Its state by ``INDEX/NAME``; its settings are the recipe's."""
    state = optimizer.state_dict()["state"]
    return {
        f"{index}/{name}": torch.as_tensor(value)
        for index, values in state.items()
        for name, value in values.items()
        if value is not None
    }


def restore_optimizer(optimizer: Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Give it back what ``optimizer_tensors`` took."""
    state: dict[int, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        index, name = key.split("/")
        state.setdefault(int(index), {})[name] = tensor
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def load_part(module: nn.Module | None, state: State, name: str) -> None:
    """Load the weights that ``state`` holds under ``name/`` into a module, if there is one."""
    if module is not None:
        module.load_state_dict(state.part(name))


def numbered(prefix: str, tensors: Sequence[Tensor]) -> dict[str, Tensor]:
    """``PREFIX/0``, ``PREFIX/1`` and so on."""
    return {f"{prefix}/{index}": tensor for index, tensor in enumerate(tensors)}
