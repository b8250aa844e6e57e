"""Who competes: ours first, then its peers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

import fsp_kernels as fsp
from benchmarks import peers
from benchmarks.peers import Loss
from benchmarks.workloads import DTYPES, Workload
from fsp_kernels.backends import registered_backends

OURS = "fsp_kernels"


@dataclass(frozen=True)
class Contender:
    """One way to compute the loss.

    ``build`` makes the function anew for each workload; ``max_rounds`` bounds the rounds of one
    too slow on a CPU to be timed as often as the others.
    """

    name: str
    build: Callable[[], Loss]
    max_rounds: int | None = None
    ours: bool = False

    def fits(self, workload: Workload, batch: int) -> bool:
        """Whether it can run at all in the memory the benchmark allows it on a CPU."""
        if self.name != "broadcast":
            return True
        return peers.broadcast_bytes(workload, batch) <= peers.BROADCAST_LIMIT


def by_backend(name: str) -> Contender:
    """Ours, made to use one backend."""
    return Contender(f"ours ({name})", lambda: partial(fsp.fsp_loss, backend=name), ours=True)


PEERS = (
    Contender("einsum", lambda: peers.loss_over(peers.einsum_matrix)),
    Contender("bmm", lambda: peers.loss_over(peers.bmm_matrix)),
    Contender("broadcast", lambda: peers.loss_over(peers.broadcast_matrix), max_rounds=3),
    Contender("torch.compile", peers.compiled_einsum),
)
ON_CPU = (Contender(OURS, lambda: fsp.fsp_loss, ours=True), *PEERS)
ALL = (ON_CPU[0], *map(by_backend, registered_backends()), *PEERS)
BY_NAME = {contender.name: contender for contender in ALL}


def serves(name: str, device: str) -> bool:
    """Whether a backend works here, on that device, in every dtype of the benchmark."""
    backend = registered_backends()[name]
    if backend.why_unavailable() is not None:
        return False
    return backend.why_unsupported(torch.device(device), tuple(DTYPES.values())) is None


def on(device: str) -> tuple[Contender, ...]:
    """Who competes on a device: on a CPU what the library picks, on a GPU each of its backends.

    The backends come best first, so the first contender is always what users get by default.
    """
    if device == "cpu":
        return ON_CPU
    return (*(by_backend(name) for name in registered_backends() if serves(name, device)), *PEERS)
