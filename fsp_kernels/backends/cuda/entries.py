"""From a planned pair and how its maps lie to what kernels are told of it: types.h, ``Pair``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fsp_kernels.backends.cuda.extension import module
from fsp_kernels.backends.cuda.maps import map_spec, matrix_spec, operand_of, splits
from fsp_kernels.backends.fused import partner_of
from fsp_kernels.loss_plan import MapPlan, PairPlan, multiplied_dtypes

# Addresses of a pair: a, b, c, d, their gradients, and its stored residual.
SLOTS = 9
_STORED = 8


class Pair:
    """A pair of a plan and how its maps lie: what entries are made of."""

    def __init__(self, index: int, plan: PairPlan, slots: Sequence[Tensor | None], precision: str):
        self._index = index
        self.plan = plan
        self._ready = plan.residual == "ready"
        dtypes = multiplied_dtypes(plan.student, plan.teacher)
        self._split = splits(dtypes, precision)
        # What is subtracted before it is multiplied, as in Gram form, is fp32 for that.
        self.operand = torch.float32 if plan.form == "gram" else operand_of(dtypes)
        planned = (*plan.maps, *(None,) * (4 - len(plan.maps)))
        self._maps = [
            self._map(i, x, m) for i, (x, m) in enumerate(zip(slots, planned * 2, strict=True))
        ]

    def _slot(self, i: int) -> int:
        return SLOTS * self._index + i

    def _map(self, i: int, x: Tensor | None, plan: MapPlan | None) -> Any:
        if x is None or plan is None:
            return None
        if self._ready and i % 4 == 2:
            return matrix_spec(self._slot(i), x)
        # A gradient is as large as its map.
        return map_spec(self._slot(i), x, plan.read.pooled_size, plan.read.pool)

    @property
    def stored_elements(self) -> int:
        """Of the workspace: the parts of the residuals of as many samples as one chunk has."""
        if self.plan.evaluation != "tiles" or not self.plan.stores:
            return 0
        return self.plan.parts * self.plan.samples * math.prod(self.plan.channels)

    def _has_gradient(self, own: int) -> bool:
        return self._maps[4 + own] is not None

    def one_pass_entry(self) -> Any:
        return self._entry()

    def residual_entry(self, chunk: int) -> Any:
        return self._entry(finishes=self.plan.finishes, chunk=chunk, out=self._stored(chunk))

    def combine_entry(self, chunk: int) -> Any:
        return self._entry(chunk=chunk, out=self._stored(chunk))

    def gradient_entries(self, chunk: int) -> list[Any]:
        """One for each map that wants a gradient."""
        m, n = self.plan.channels
        found = []
        for own in range(2 if self._ready else 4):
            if self._has_gradient(own):
                first, positions = own % 2 == 0, self.plan.maps[own].positions
                sign = 1 if own < 2 else -1
                found.append(
                    module().Product(
                        own=self._maps[own],
                        gradient=self._maps[4 + own],
                        other=self._maps[partner_of(own)],
                        slope=self._stored(chunk, transposed=not first),
                        channels=(m, n) if first else (n, m),
                        positions=positions,
                        factor=sign * self._slope_factor / positions,
                        **self._product_fields(chunk),
                    )
                )
        return found

    def matrix_gradient_entries(self, chunk: int) -> list[Any]:
        """One, if there is a ready matrix that wants its gradient."""
        if not (self._ready and self._has_gradient(2)):
            return []
        return [
            module().Product(
                own=None,
                gradient=self._maps[6],
                other=None,
                slope=self._stored(chunk),
                channels=self.plan.channels,
                positions=1,
                factor=-self._slope_factor,
                **self._product_fields(chunk),
            )
        ]

    @property
    def _slope_factor(self) -> float:
        return self.plan.slope_scale / self.plan.divisor

    def _product_fields(self, chunk: int) -> dict[str, Any]:
        first, samples = self._samples_of(chunk)
        return {
            "samples": samples,
            "first_sample": first,
            "split": self._split,
            "weight": self._index,
        }

    def _samples_of(self, chunk: int) -> tuple[int, int]:
        """The first sample of a chunk, and how many it has."""
        first = chunk * self.plan.samples
        return first, min(self.plan.samples, self.plan.batch - first)

    def _stored(self, chunk: int, transposed: bool = False) -> Any:
        """The workspace as the first part of the residuals of a chunk."""
        if not self.plan.stores:
            return None
        _, samples = self._samples_of(chunk)
        x = torch.empty(samples, *self.plan.channels, device="meta")
        return matrix_spec(self._slot(_STORED), x.mT if transposed else x)

    def _entry(self, finishes: bool = True, chunk: int | None = None, out: Any = None) -> Any:
        """Of a chunk of samples or of all."""
        first, samples = (0, self.plan.batch) if chunk is None else self._samples_of(chunk)
        m, n = self.plan.channels
        positions = self.plan.positions
        return module().Pair(
            maps=self._maps[:4],
            gradients=self._maps[4:],
            out=out,
            out_part=samples * m * n,
            samples=samples,
            first_sample=first,
            channels=(m, n),
            positions=(positions, positions if self._ready else self.plan.teacher[0].positions),
            parts=self.plan.parts,
            residual=getattr(module().Residual, self.plan.residual),
            norm=module().Norm.column if self.plan.norm == "column" else module().Norm.squares,
            split=self._split,
            finishes=finishes,
            weight=self._index,
            factor=1 / self.plan.divisor,
        )
