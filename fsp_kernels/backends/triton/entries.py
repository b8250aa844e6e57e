"""Kernel arguments from a planned pair and its strides."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from fsp_kernels.backends.tensors import partner_of
from fsp_kernels.backends.triton.configurations import Configuration, configuration_of
from fsp_kernels.backends.triton.limits import access_of, kind_of
from fsp_kernels.backends.triton.maps import MapLayout, layout_of
from fsp_kernels.backends.triton.residual import Entry, MatrixLayout
from fsp_kernels.backends.triton.tiles import GradientEntry
from fsp_kernels.loss_plan import MapPlan, PairPlan
from fsp_kernels.plan import GPU_PROGRAMS, gram_block, gram_operands

COMBINED = 32  # rows and columns of a tile of fsp_combine


class PlannedPair:
    """A pair of a plan and the strides of its maps. It makes the pair's kernel arguments."""

    def __init__(
        self,
        index: int,
        plan: PairPlan,
        slots: Sequence[Tensor | None],
        family: str,
        precision: str,
    ):
        self.index = index
        self.plan = plan
        self._family = family
        self._kind = kind_of(plan.student, plan.teacher, precision)
        self._access = access_of(plan.student, plan.teacher)
        self._precision = "tf32" if plan.halves else precision
        self._ready = plan.residual == "ready"
        planned = (*plan.maps, *(None,) * (4 - len(plan.maps)))
        self._layouts: tuple[Any, ...] = tuple(
            self._layout(x, m) for x, m in zip(slots[:4], planned, strict=True)
        )
        # If kernels pool a map, its gradient still has the map's full size.
        self._gradients: tuple[Any, ...] = tuple(
            self._layout(g, m) for g, m in zip(slots[4:8], planned, strict=True)
        )

    def _layout(self, x: Tensor | None, plan: MapPlan | None) -> MapLayout | MatrixLayout | None:
        if x is None or plan is None:
            return None
        if self._ready and plan is self.plan.teacher[0]:
            return MatrixLayout(*x.stride())
        return layout_of(x.shape, x.stride(), plan.read.pooled_size, plan.read.pool)

    @property
    def wants_matrix_gradient(self) -> bool:
        return self._ready and self._gradients[2] is not None

    def one_pass_entry(self) -> tuple[Entry, int]:
        m, n = self.plan.channels
        c = self._configuration("one_pass", max(m, n))
        return self._entry(
            c._replace(block_m=_block_holding(m), block_n=_block_holding(n))
        ), c.warps

    def gram_entry(self, chunk: int) -> tuple[Entry, int]:
        c = self._configuration("gram", self.plan.positions)
        c = c._replace(block_k=gram_block(self.plan.positions))
        samples, start = self._samples_of(chunk)
        operands = gram_operands(self.plan.maps)
        entry = self._entry(c, samples, start, self.plan.parts, operand_count=operands)
        return entry, c.warps

    def _samples_of(self, chunk: int) -> tuple[int, int]:
        """The number of samples of a chunk, and the first one."""
        start = chunk * self.plan.samples
        return min(self.plan.samples, self.plan.batch - start), start

    def residual_entry(self, chunk: int) -> tuple[Entry, int]:
        m, n = self.plan.channels
        c = self._configuration("residual", max(m, n))
        samples, start = self._samples_of(chunk)
        tiles = triton.cdiv(m, c.block_m) * triton.cdiv(n, c.block_n)
        # The last chunk may be smaller, but its tiles are those of the others.
        if c.block_n > c.block_m and self.plan.samples * self.plan.parts * tiles < GPU_PROGRAMS:
            c = c._replace(block_n=c.block_m)  # more programs, to fill a device
        return self._entry(c, samples, start, self.plan.parts, self.plan.finishes), c.warps

    def combine_entry(self, residual: Entry) -> Entry:
        """The entry with smaller tiles: nothing is multiplied, and many tiles fill a device."""
        block = tl.constexpr(COMBINED)
        return residual._replace(block_m=block, block_n=block)

    def gradient_entries(self, residual: Entry) -> list[tuple[int, GradientEntry, int]]:
        """For each map that wants a gradient: the map's number, the entry, the warps."""
        m, n = self.plan.channels
        c = self._configuration("gradients", max(m, n))
        found = []
        for own in range(2 if self._ready else 4):
            if self._gradients[own] is None:
                continue
            second, teacher = own % 2 == 1, own >= 2
            positions = residual.teacher_positions if teacher else residual.student_positions
            entry = GradientEntry(
                own=self._layouts[own],
                gradient=self._gradients[own],
                other=self._layouts[partner_of(own)],
                slope=MatrixLayout(m * n, 1, n) if second else MatrixLayout(m * n, n, 1),
                samples=residual.samples,
                first_sample=residual.first_sample,
                own_channels=tl.constexpr(n if second else m),
                other_channels=tl.constexpr(m if second else n),
                positions=positions,
                ratio=self._teacher_ratio if teacher else 1.0,
                precision=residual.precision,
                block_own=tl.constexpr(c.block_m),
                block_other=tl.constexpr(c.block_n),
                block_k=tl.constexpr(c.block_k),
                stages=tl.constexpr(c.stages),
            )
            found.append((own, entry, c.warps))
        return found

    @property
    def _teacher_ratio(self) -> float:
        """The factor of the teacher's gradients, since the slope is scaled for the student's.

        A network with a mask has 1 in place of its positions: if the masks differ, the kernel
        replaces it by the positions that count in a sample.
        """
        student, teacher = (1 if x.mask is not None else x.positions for x in self.plan.maps[::2])
        return -student / teacher

    def _configuration(self, kernel: str, size: int) -> Configuration:
        c = configuration_of(kernel, self._kind, self._family, self._access, size)
        assert c is not None, f"the table has no row of {kernel} for {self._family}"
        return c

    def _entry(
        self,
        c: Configuration,
        samples: int | None = None,
        first_sample: int = 0,
        parts: int = 1,
        finishes: bool = True,
        operand_count: int = 0,
    ) -> Entry:
        plan = self.plan
        teacher_positions = plan.teacher[0].positions if not self._ready else 1
        return Entry(
            layouts=self._layouts,
            gradients=self._gradients,
            samples=plan.batch if samples is None else samples,
            first_sample=first_sample,
            m=tl.constexpr(plan.channels[0]),
            n=tl.constexpr(plan.channels[1]),
            student_positions=plan.positions,
            teacher_positions=teacher_positions,
            residual=tl.constexpr(plan.residual),
            norm=tl.constexpr(plan.norm),
            precision=tl.constexpr(self._precision),
            block_m=tl.constexpr(c.block_m),
            block_n=tl.constexpr(c.block_n),
            block_k=tl.constexpr(c.block_k),
            stages=tl.constexpr(c.stages),
            parts=tl.constexpr(parts),
            finishes=tl.constexpr(finishes),
            operand_count=tl.constexpr(operand_count),
        )


def _block_holding(size: int) -> int:
    """The smallest block for tensor cores that holds ``size`` elements."""
    return max(16, triton.next_power_of_2(size))
