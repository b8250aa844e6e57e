"""The contenders: each backend of ours, and the loss as others write it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

import fsp_kernels as fsp
from benchmarks import peers
from benchmarks.workloads import DTYPES, Case, Loss
from fsp_kernels.backends import registered_backends


@dataclass(frozen=True)
class Contender:
    """One way to compute the loss.

    ``build`` makes the function anew for each case. ``max_rounds`` limits the rounds of a contender
    that is too slow to be timed as often as the others.
    """

    name: str
    build: Callable[[], Loss]
    max_rounds: int | None = None
    ours: bool = False


def by_backend(name: str) -> Contender:
    """Ours, computed by one backend."""
    # channel_dim=1 for tokens too: workloads.py makes them (B, channels, tokens).
    loss = partial(fsp.fsp_loss, backend=name, channel_dim=1)
    return Contender(f"ours ({name})", lambda: loss, ours=True)


PEERS = (
    Contender("einsum", lambda: peers.loss_over(peers.einsum_matrix)),
    Contender("bmm", lambda: peers.loss_over(peers.bmm_matrix)),
    Contender("broadcast", lambda: peers.loss_over(peers.broadcast_matrix), max_rounds=2),
    Contender("torch.compile", peers.compiled_einsum),
)
ALL = (*map(by_backend, registered_backends()), *PEERS)
BY_NAME = {contender.name: contender for contender in ALL}


def serves(name: str, device: str, timed: bool = True) -> bool:
    """Whether a backend runs on this machine, on that device, in every dtype of the benchmark.

    Triton's interpreter is never chosen by default, so its errors are measured but not its times.
    """
    backend = registered_backends()[name]
    if (timed and not backend.automatic) or backend.why_unavailable() is not None:
        return False
    return backend.why_unsupported(torch.device(device), tuple(DTYPES.values())) is None


def backends_on(device: str, timed: bool = True) -> list[str]:
    """Our backends that serve a device, best first."""
    return [name for name in registered_backends() if serves(name, device, timed)]


def on(device: str, timed: bool = True) -> tuple[Contender, ...]:
    """All contenders on a device: our backends, best first, then the peers.

    The first contender is what users get by default.
    """
    return (*map(by_backend, backends_on(device, timed)), *PEERS)


def why_not_run(contender: Contender, case: Case, device: str) -> str | None:
    """The reason why a contender is not run on a case; ``None`` if it is run."""
    size = peers.broadcast_bytes(case.workload, case.batch)
    if device == "cpu" and contender.name == "broadcast" and size > peers.BROADCAST_LIMIT:
        return f"not run: holds {size / 2**30:.1f} GiB"
    return None
