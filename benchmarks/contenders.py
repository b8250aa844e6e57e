"""Who competes: ours first, then its peers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

import fsp_kernels as fsp
from benchmarks import peers
from benchmarks.peers import Loss
from benchmarks.workloads import DTYPES, Case
from fsp_kernels.backends import registered_backends


@dataclass(frozen=True)
class Contender:
    """One way to compute the loss.

    ``build`` makes the function anew for each case; ``max_rounds`` bounds the rounds of one too
    slow on a CPU to be timed as often as the others.
    """

    name: str
    build: Callable[[], Loss]
    max_rounds: int | None = None
    ours: bool = False


def by_backend(name: str) -> Contender:
    """Ours, made to use one backend."""
    loss = partial(fsp.fsp_loss, backend=name, channel_dim=1)  # of tokens, too: see feature_maps
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
    """Whether a backend works here, on that device, in every dtype of the benchmark.

    Triton's interpreter, which nobody gets unasked, has errors to be measured, but no times.
    """
    backend = registered_backends()[name]
    if (timed and not backend.automatic) or backend.why_unavailable() is not None:
        return False
    return backend.why_unsupported(torch.device(device), tuple(DTYPES.values())) is None


def backends_on(device: str, timed: bool = True) -> list[str]:
    """Our backends that serve a device, best first."""
    return [name for name in registered_backends() if serves(name, device, timed)]


def on(device: str, timed: bool = True) -> tuple[Contender, ...]:
    """Who competes on a device: each of our backends that serves it, best first, and the peers.

    So the first contender is always what users get by default.
    """
    return (*map(by_backend, backends_on(device, timed)), *PEERS)


def why_not(contender: Contender, case: Case, device: str) -> str | None:
    """Why one is not even tried on a case; ``None`` if it is."""
    size = peers.broadcast_bytes(case.workload, case.batch)
    if device == "cpu" and contender.name == "broadcast" and size > peers.BROADCAST_LIMIT:
        return f"not run: holds {size / 2**30:.1f} GiB"
    return None
