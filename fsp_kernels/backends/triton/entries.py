"""From a planned pair and how its maps lie to what each kernel is told of it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from fsp_kernels.backends.fused import Slots, fp32_precision, partner_of
from fsp_kernels.backends.triton.configurations import (
    ACCESSES,
    Configuration,
    configuration_of,
)
from fsp_kernels.backends.triton.maps import MapLayout, access_of, layout_of
from fsp_kernels.backends.triton.residual import Entry, MatrixLayout
from fsp_kernels.backends.triton.tiles import GradientEntry
from fsp_kernels.loss_plan import LossPlan, MapPlan, PairPlan, Residual
from fsp_kernels.plan import HALF, gram_blocks, stored_samples


class Pair:
    """A pair of a plan and how its maps lie: what entries are made of."""

    def __init__(self, index: int, plan: PairPlan, loss_plan: LossPlan, slots: Slots, family: str):
        self.index = index
        self.plan = plan
        self.slope_scale = 1 if loss_plan.norm == "column" else 2
        # Of tiles.py: whether the launch that computes a tile can tell its loss, and whether
        # anything reads the tile afterwards.
        self.finishes = plan.parts == 1 and loss_plan.norm != "column"
        self.stores = plan.wants_gradients or not self.finishes
        self._norm = loss_plan.norm
        self._pool = loss_plan.pool
        self._family = family
        self._ready = len(plan.teacher) == 1
        planned = (*plan.maps, *(None,) * (4 - len(plan.maps)))
        self._layouts: tuple[Any, ...] = tuple(
            self._layout(x, m) for x, m in zip(slots[:4], planned, strict=True)
        )
        # A gradient of a map that the kernels pool is as large as the map.
        self._gradients: tuple[Any, ...] = tuple(
            self._layout(g, m) for g, m in zip(slots[4:], planned, strict=True)
        )
        # Averages of half-precision elements are not half-precision numbers.
        averaged = self._pool == "avg" and any(m.pooled_size for m in plan.maps)
        maps = slots[:2] if self._ready else slots[:4]
        accesses = [
            access_of(layout, x.element_size())
            for layout, x in zip(self._layouts, maps, strict=False)
            if x is not None
        ]
        self._access = max(accesses, key=ACCESSES.index)
        self._halves = not averaged and all(x.dtype in HALF for x in maps if x is not None)
        self.plan = self._for_this_chip(plan)

    def _layout(self, x: Tensor | None, plan: MapPlan | None) -> MapLayout | MatrixLayout | None:
        if x is None or plan is None:
            return None
        if self._ready and plan is self.plan.teacher[0]:
            return MatrixLayout(*x.stride())
        size = plan.pooled_size if plan.fused_windows else None
        return layout_of(x.shape, x.stride(), size, self._pool)

    def _for_this_chip(self, plan: PairPlan) -> PairPlan:
        """The plan, or tiles in place of one pass where that is too much for a program."""
        if plan.evaluation != "one pass" or self._one_pass_configuration() is not None:
            return plan
        residual: Residual = "direct" if self._halves else plan.residual
        return replace(
            plan,
            form="matrix",
            residual=residual,
            evaluation="tiles",
            samples=stored_samples(plan),
        )

    def _one_pass_configuration(self) -> Configuration | None:
        if self.plan.form == "gram":
            return self._configuration("gram", self.plan.positions)
        return self._configuration("one_pass", max(self.plan.channels))

    def sides_with_gradients(self) -> list[bool]:
        """Whether to swap, for each side of recompute.py that there is work for."""
        wanted = [g is not None for g in self._gradients]
        return [swapped for swapped in (False, True) if wanted[swapped] or wanted[2 + swapped]]

    def one_pass_entry(self) -> tuple[Entry, int]:
        c = self._one_pass_configuration()
        assert c is not None
        m, n = self.plan.channels
        return self._entry(c._replace(block_m=_power(m), block_n=_power(n))), c.warps

    def gram_entry(self) -> tuple[Entry, int]:
        c = self._one_pass_configuration()
        assert c is not None
        c = c._replace(block_k=_power(self.plan.positions))
        return self._entry(c, kept=gram_blocks(self.plan)), c.warps

    def residual_entry(self, chunk: int) -> tuple[Entry, int]:
        c = self._required("residual")
        start = chunk * self.plan.samples
        samples = min(self.plan.samples, self.plan.batch - start)
        return self._entry(c, samples, start, self.plan.parts, self.finishes), c.warps

    def recompute_entry(self, swapped: bool) -> tuple[Entry, int]:
        c = self._required("recompute")
        wanted = [self._gradients[swapped], self._gradients[2 + swapped]]
        if self._ready:
            wanted[1] = None
        chunks = tuple(
            0 if g is None else triton.cdiv(m.positions, c.block_k)
            for g, m in zip(wanted, self.plan.maps[::2], strict=True)
        )
        finishes = swapped == self.sides_with_gradients()[0]
        entry = self._entry(c, finishes=finishes, chunks=chunks)
        return (_swap_entry(entry) if swapped else entry), c.warps

    def gradient_entries(self, residual: Entry) -> list[tuple[int, float, GradientEntry, int]]:
        """Of each map that wants one: its number, the scale, the entry, warps."""
        c = self._required("gradients")
        m, n = self.plan.channels
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
                precision=residual.precision,
                block_own=tl.constexpr(c.block_m),
                block_other=tl.constexpr(c.block_n),
                block_k=tl.constexpr(c.block_k),
                stages=tl.constexpr(c.stages),
            )
            sign = -1 if teacher else 1
            found.append((own, sign * self.slope_scale / positions, entry, c.warps))
        return found

    def _required(self, kernel: str) -> Configuration:
        c = self._configuration(kernel)
        assert c is not None, f"the table has no row of {kernel} for {self._family}"
        return c

    def _configuration(self, kernel: str, size: int = 0) -> Configuration | None:
        kind = "half" if self._halves else fp32_precision()
        return configuration_of(kernel, kind, self._family, self._access, size)

    def _entry(
        self,
        c: Configuration,
        samples: int | None = None,
        first_sample: int = 0,
        parts: int = 1,
        finishes: bool = True,
        chunks: tuple[int, ...] = (0, 0),
        kept: int = 0,
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
            residual=tl.constexpr(self._residual(teacher_positions)),
            norm=tl.constexpr(self._norm),
            precision=tl.constexpr("tf32" if self._halves else fp32_precision()),
            block_m=tl.constexpr(c.block_m),
            block_n=tl.constexpr(c.block_n),
            block_k=tl.constexpr(c.block_k),
            stages=tl.constexpr(c.stages),
            parts=tl.constexpr(parts),
            finishes=tl.constexpr(finishes),
            chunks=tuple(tl.constexpr(x) for x in chunks),
            kept=tl.constexpr(kept),
        )

    def _residual(self, teacher_positions: int) -> str:
        if self.plan.residual == "difference":
            return "difference"
        if self._ready:
            return "ready"
        return "direct" if teacher_positions == self.plan.positions else "apart"


def swap(slots: Slots) -> Slots:
    """The sides of a pair swapped: b, a, d, c and their gradients; a ready matrix stays."""
    a, b, c, d, *gradients = slots
    ga, gb, gc, gd = gradients
    return (b, a, d, c, gb, ga, gd, gc) if d is not None else (b, a, c, d, gb, ga, None, None)


def _swap_entry(entry: Entry) -> Entry:
    """The entry for :func:`swap`; a ready matrix is then read transposed."""
    a, b, c, d = entry.layouts
    ga, gb, gc, gd = entry.gradients
    if isinstance(c, MatrixLayout):
        c, d = d, c._replace(row=c.column, column=c.row)
        gc = gd = None
    return entry._replace(
        layouts=(b, a, d, c),
        gradients=(gb, ga, gd, gc),
        m=entry.n,
        n=entry.m,
    )


def _power(size: int) -> int:
    """The smallest block a tensor core takes that holds ``size``."""
    return max(16, triton.next_power_of_2(size))
