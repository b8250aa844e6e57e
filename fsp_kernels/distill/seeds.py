"""Seeds of random numbers that depend on the place in a run, so that a resumed run is the same."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager
from enum import IntEnum

import numpy as np
import torch


class Purpose(IntEnum):
    """What random numbers are for: a part of their seed, beside the run's seed and its step."""

    WEIGHTS = 0
    STEP = 1
    EVALUATION = 2
    PROJECTION = 3


def mixed(*numbers: int) -> int:
    """A 32-bit seed from whole numbers, for which other numbers or another order give another.

    It is the same in every process, unlike Python's ``hash``.
    """
    text = ",".join(str(int(number)) for number in numbers)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=4).digest(), "big")


def seed_everything(*numbers: int) -> None:
    """Seed Python's, NumPy's and PyTorch's generators, on every device, by ``mixed(*numbers)``."""
    seed = mixed(*numbers)
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002  # users' models may draw from it
    torch.manual_seed(seed)


@contextmanager
def kept_generators() -> Iterator[None]:
    """Restore the CPU generators of Python, NumPy and PyTorch at the end of the block."""
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002
