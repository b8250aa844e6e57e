"""Optimisers, their learning rates by step, and when to stop early."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from fsp_kernels.distill.config import Stop, Training


def make_optimizer(training: Training, parameters: Iterable[nn.Parameter]) -> Optimizer:
    """The optimiser of ``training``, at its full rate."""
    lr, decay = training.learning_rate, training.weight_decay
    if training.optimizer == "adam":
        return torch.optim.Adam(parameters, lr, weight_decay=decay)
    if training.optimizer == "adamw":
        return torch.optim.AdamW(parameters, lr, weight_decay=decay)
    return torch.optim.SGD(parameters, lr, training.momentum, weight_decay=decay)


def rate(training: Training, steps: int, step: int) -> float:
    """The learning rate of ``step`` (the first is 0) of ``steps``; no earlier step matters."""
    warm = round(training.warmup * steps)
    if step < warm:
        return training.learning_rate * (step + 1) / (warm + 1)
    if training.schedule == "cosine":
        share = (step - warm) / (steps - warm)
        return training.learning_rate * 0.5 * (1 + math.cos(math.pi * share))
    if training.schedule == "multistep":
        passed = sum(step >= round(share * steps) for share in training.milestones)
        return training.learning_rate * training.decay**passed
    return training.learning_rate


def set_rate(optimizer: Optimizer, value: float) -> None:
    """Set the learning rate of all parameters."""
    for group in optimizer.param_groups:
        group["lr"] = value


class Patience:
    """Counts evaluations without a lower loss; without a rule it never ends a stage."""

    def __init__(self, rule: Stop | None) -> None:
        self._limit = math.inf if rule is None else rule.patience
        self.best, self.waited = math.inf, 0

    @property
    def exhausted(self) -> bool:
        return self.waited >= self._limit

    def note(self, loss: float) -> None:
        """Count one more evaluation."""
        if loss < self.best:
            self.best, self.waited = loss, 0
        else:
            self.waited += 1

    def state(self) -> dict[str, Any]:
        # JSON has no infinity.
        return {"best": None if math.isinf(self.best) else self.best, "waited": self.waited}

    def load(self, state: dict[str, Any]) -> None:
        self.best = math.inf if state["best"] is None else state["best"]
        self.waited = state["waited"]
