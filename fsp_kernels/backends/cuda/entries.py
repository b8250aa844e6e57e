"""Kernel arguments from a planned pair and its strides; see ``Pair`` in csrc/types.h."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fsp_kernels.backends.cuda.extension import module
from fsp_kernels.backends.cuda.maps import map_spec, matrix_spec, operand_of, splits
from fsp_kernels.backends.tensors import partner_of
from fsp_kernels.loss_plan import MapPlan, PairPlan, multiplied_dtypes
from fsp_kernels.plan import FP32_BYTES

# The addresses of a pair: a, b, c, d, their gradients, the parts of its residuals, its slopes.
SLOTS = 10
_PARTS, _SLOPES = 8, 9


class PlannedPair:
    """A pair of a plan and the strides of its maps. It makes the pair's kernel arguments."""

    def __init__(
        self,
        index: int,
        plan: PairPlan,
        slots: Sequence[Tensor | None],
        mask_slots: Sequence[int | None],
        precision: str,
    ):
        self._index = index
        self._masks, self._counts = mask_slots[:2], mask_slots[2:]  # of student and teacher
        self.plan = plan
        self._ready = plan.residual == "ready"
        dtypes = multiplied_dtypes(plan.student, plan.teacher)
        self._split = splits(dtypes, precision)
        # The Gram form subtracts maps before it multiplies them, in fp32.
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
        # A gradient has the shape of its map, so it is described in the same way.
        return map_spec(self._slot(i), x, plan.read.pooled_size, plan.read.pool)

    @property
    def slopes_offset(self) -> int:
        """Where the slopes begin in the workspace, in bytes. fp32 slopes replace the first part."""
        if self.plan.finishes or self.plan.slope_dtype != torch.bfloat16:
            return 0
        return FP32_BYTES * self._part_elements * self.plan.parts

    @property
    def _part_elements(self) -> int:
        """Elements of one part of the residuals of a whole chunk."""
        return self.plan.samples * math.prod(self.plan.channels)

    def _has_gradient(self, own: int) -> bool:
        return self._maps[4 + own] is not None

    def one_pass_entry(self) -> Any:
        return self._entry()

    def residual_entry(self, chunk: int) -> Any:
        out = self._slopes(chunk) if self.plan.finishes else self._parts(chunk)
        return self._entry(finishes=self.plan.finishes, chunk=chunk, out=out)

    def combine_entry(self, chunk: int) -> Any:
        parts = [self._parts(chunk), None, None, None]
        return self._entry(chunk=chunk, maps=parts, out=self._slopes(chunk))

    def gradient_entries(self, chunk: int) -> list[Any]:
        """One for each map that wants a gradient."""
        m, n = self.plan.channels
        found = []
        for own in range(2 if self._ready else 4):
            if self._has_gradient(own):
                first, network = own % 2 == 0, own // 2
                fields = self._product_fields(chunk, network)
                if self.plan.symmetric:
                    fields["ratio"] *= 2  # both maps' gradients
                found.append(
                    module().Product(
                        own=self._maps[own],
                        gradient=self._maps[4 + own],
                        other=self._maps[partner_of(own)],
                        slope=self._slopes(chunk, transposed=not first),
                        channels=(m, n) if first else (n, m),
                        positions=self.plan.maps[own].positions,
                        mask=self._masks[network],
                        **fields,
                    )
                )
        return found

    def matrix_gradient_entries(self, chunk: int) -> list[Any]:
        """One entry if there is a ready matrix that wants a gradient, else none."""
        if not (self._ready and self._has_gradient(2)):
            return []
        return [
            module().Product(
                own=None,
                gradient=self._maps[6],
                other=None,
                slope=self._slopes(chunk),
                channels=self.plan.channels,
                positions=1,
                **self._product_fields(chunk, 1),
            )
        ]

    def _product_fields(self, chunk: int, network: int) -> dict[str, Any]:
        first, samples = self._samples_of(chunk)
        return {
            "samples": samples,
            "first_sample": first,
            "split": self._split,
            **(self._teacher_ratio() if network else {"ratio": 1}),
        }

    def _teacher_ratio(self) -> dict[str, Any]:
        """The teacher's slope over the student's, which is stored.

        A network's slope is divided by its number of positions that count. The kernels read that
        number if there is a mask.
        """
        student, teacher = (
            k if slot is None else 1 for k, slot in zip(self._positions, self._counts, strict=True)
        )
        return {
            "ratio": -student / teacher,
            "multiplier": self._counts[0],
            "divisor": self._counts[1],
        }

    @property
    def _positions(self) -> tuple[int, int]:
        """Of the student and of the teacher; 1 for a ready matrix, which is not divided."""
        return self.plan.positions, 1 if self._ready else self.plan.teacher[0].positions

    def _samples_of(self, chunk: int) -> tuple[int, int]:
        """The first sample of a chunk, and the number of its samples."""
        first = chunk * self.plan.samples
        return first, min(self.plan.samples, self.plan.batch - first)

    def _parts(self, chunk: int) -> Any:
        return matrix_spec(self._slot(_PARTS), self._matrices(chunk, torch.float32))

    def _slopes(self, chunk: int, transposed: bool = False) -> Any:
        if self.plan.slope_dtype is None:
            return None
        x = self._matrices(chunk, self.plan.slope_dtype)
        return matrix_spec(self._slot(_SLOPES), x.mT if transposed else x)

    def _matrices(self, chunk: int, dtype: torch.dtype) -> Tensor:
        _, samples = self._samples_of(chunk)
        return torch.empty(samples, *self.plan.channels, dtype=dtype, device="meta")

    def _entry(
        self,
        finishes: bool = True,
        chunk: int | None = None,
        out: Any = None,
        maps: list[Any] | None = None,
    ) -> Any:
        """The entry for a chunk of samples, or for all samples if ``chunk`` is ``None``."""
        first, samples = (0, self.plan.batch) if chunk is None else self._samples_of(chunk)
        return module().Pair(
            maps=self._maps[:4] if maps is None else maps,
            gradients=self._maps[4:],
            out=out,
            out_part=self._part_elements,
            samples=samples,
            first_sample=first,
            channels=self.plan.channels,
            positions=self._positions,
            parts=self.plan.parts,
            residual=getattr(module().Residual, self.plan.residual),
            norm=module().Norm.column if self.plan.norm == "column" else module().Norm.squares,
            split=self._split,
            finishes=finishes,
            index=self._index,
            factor=1 / self.plan.divisor,
            masks=self._masks,
            counts=self._counts,
        )
