"""Who competes: ours first, then its peers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import fsp_kernels as fsp
from benchmarks import peers
from benchmarks.peers import Loss
from benchmarks.workloads import Workload

OURS = "fsp_kernels"


@dataclass(frozen=True)
class Contender:
    """One way to compute the loss.

    ``build`` makes the function anew for each workload; ``max_rounds`` bounds the rounds of one
    too slow to be timed as often as the others.
    """

    name: str
    build: Callable[[], Loss]
    max_rounds: int | None = None

    def fits(self, workload: Workload, batch: int) -> bool:
        """Whether it can run at all in the memory the benchmark allows it."""
        if self.name != "broadcast":
            return True
        return peers.broadcast_bytes(workload, batch) <= peers.BROADCAST_LIMIT


CONTENDERS = (
    Contender(OURS, lambda: fsp.fsp_loss),
    Contender("einsum", lambda: peers.loss_over(peers.einsum_matrix)),
    Contender("bmm", lambda: peers.loss_over(peers.bmm_matrix)),
    Contender("broadcast", lambda: peers.loss_over(peers.broadcast_matrix), max_rounds=3),
    Contender("torch.compile", peers.compiled_einsum),
)
BY_NAME = {contender.name: contender for contender in CONTENDERS}
