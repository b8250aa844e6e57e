"""What one contender made of one workload: durations, or the reason why there are none."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Outcome:
    """``durations`` in seconds, in the order of the rounds, and what is recorded beside them.

    Where ``reason`` says why there are none, ``fault`` tells a defect from a limit of the device.
    """

    durations: list[float] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    reason: str | None = None
    fault: bool = False
