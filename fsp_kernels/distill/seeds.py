"""Random numbers that depend on where a run is, not on how it came there."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager
from enum import IntEnum

import numpy as np
import torch


class Purpose(IntEnum):
    """What numbers are drawn for: it makes a seed together with the run's and where the run is."""

    WEIGHTS = 0
    STEP = 1
    EVALUATION = 2
    PROJECTION = 3


def mixed(*numbers: int) -> int:
    """A 32-bit seed from non-negative whole numbers, another one for any other sequence of them.

    Not Python's ``hash``, and not their sum: seeds 1, 0 and 0, 1 must not meet.
    """
    text = ",".join(str(int(number)) for number in numbers)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=4).digest(), "big")


def seed_everything(*numbers: int) -> None:
    """Python's, NumPy's and PyTorch's generators, on every device, from ``mixed(*numbers)``."""
    seed = mixed(*numbers)
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002  # users' models may draw from it
    torch.manual_seed(seed)


@contextmanager
def kept_generators() -> Iterator[None]:
    """Afterwards, Python's, NumPy's and PyTorch's generators of the CPU are as they were before."""
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002
