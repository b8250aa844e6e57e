"""The inputs and results of planning.

The inputs are the metadata of the maps and the limits of a backend. The result is a
:class:`LossPlan`: how each pair of a loss is evaluated. ``plan.py`` computes it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from operator import itemgetter
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

# How D / K = G^S - G^T is computed:
#   difference: from p = a - c and q = b - d;
#   direct: from both networks' products, summed together;
#   apart: from both networks' products, summed one after the other, since their positions differ;
#   ready: from the student's product and the teacher's ready matrix.
Residual = Literal["difference", "direct", "apart", "ready"]
Form = Literal["matrix", "gram"]
Evaluation = Literal["chunks", "samples", "one pass", "tiles", "blocks"]
Pool = Literal["none", "max", "avg"]

HALF = (torch.float16, torch.bfloat16)
# The most elements of a pooling window for kernels that pool while they read: they unroll it.
GPU_WINDOW = 64
LAUNCH_SUMS = 32  # losses of pairs that a launch of fused backends adds


class MapSpec(NamedTuple):
    """The metadata of a tensor that checks and planning need; hashable, unlike the tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    layout: torch.layout
    requires_grad: bool
    strides: tuple[int, ...] | None = None  # None: contiguous

    @classmethod
    def of(cls, x: Tensor) -> MapSpec:
        layout = x.layout
        strides = x.stride() if layout is torch.strided else None  # sparse tensors have none
        return cls(x.shape, x.dtype, x.device, layout, x.requires_grad, strides)

    @property
    def positions(self) -> int:
        return math.prod(self.shape[2:])


PairSpec = tuple[MapSpec, MapSpec]
TeacherSpec = PairSpec | tuple[MapSpec]  # one entry: a ready FSP matrix (B, m, n)


def by_network(specs: Iterable[MapSpec], ready: Iterable[bool]) -> tuple[Any, Any]:
    """Split specs in the order of backends into the student's pairs and the teacher's.

    ``ready`` says for each pair whether its teacher is a ready matrix.
    """
    remaining = iter(specs)
    student, teacher = [], []
    for is_matrix in ready:
        student.append((next(remaining), next(remaining)))
        teacher.append((next(remaining),) if is_matrix else (next(remaining), next(remaining)))
    return tuple(student), tuple(teacher)


class Masks(NamedTuple):
    """The masks of a loss: each tensor once, and the index of each network's mask.

    Backends take a mask as ``(B, K)`` of bool, contiguous; a position counts where it is true.
    """

    tensors: tuple[Tensor, ...] = ()
    student: int | None = None
    teacher: int | None = None

    @classmethod
    def of(cls, student: Tensor | None, teacher: Tensor | None) -> Masks:
        if student is None:
            return NO_MASKS if teacher is None else cls((teacher,), None, 0)
        if teacher is None:
            return cls((student,), 0, None)
        return cls((student,), 0, 0) if student is teacher else cls((student, teacher), 0, 1)

    @property
    def of_networks(self) -> MaskIndices:
        return self.student, self.teacher

    def flat(self) -> list[Tensor]:
        """The tensors as backends take them."""
        return [x.flatten(1).contiguous() for x in self.tensors]


MaskIndices = tuple[int | None, int | None]  # of the student's mask, of the teacher's
NO_MASKS = Masks()


def factors_of(ready: Iterable[bool], wanted: Iterable[int], by_pair: bool) -> tuple[int, ...]:
    """For each wanted gradient, by index of its map: which incoming gradient it is multiplied by.

    It is that of the map's pair, or the only one. ``ready`` is as in :func:`by_network`.
    """
    pair_of = [i for i, is_matrix in enumerate(ready) for _ in range(3 if is_matrix else 4)]
    return tuple(pair_of[i] if by_pair else 0 for i in wanted)


def seconds_of(ready: Iterable[bool], symmetric: Iterable[bool]) -> tuple[int, ...]:
    """The indices of the second maps of symmetric pairs: their gradient is part of the firsts'."""
    found, start = [], 0
    for is_matrix, same in zip(ready, symmetric, strict=True):
        found += [start + 1, start + 3][: 1 if is_matrix else 2] if same else []
        start += 3 if is_matrix else 4
    return tuple(found)


@dataclass(frozen=True)
class MapPlan:
    """One feature map of a pair: the size it is pooled to and the dtype of its gradient.

    ``pooled_size`` is ``None`` where the map keeps its spatial size; ``pool`` is then ``"none"``.
    ``gradient_dtype`` is the dtype of the gradient between forward and backward, or ``None`` if no
    gradient is wanted. It is the map's own dtype, but fp32 for fp16: gradients are about
    ``1/(B K)`` in size, which fp16 would flush to zero before backward applies a loss scale.
    ``mask`` is the index of the mask that says which positions count, or ``None`` if all do.
    """

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype
    pooled_size: tuple[int, ...] | None
    pool: Pool
    gradient_dtype: torch.dtype | None
    mask: int | None = None

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def gradient_bytes(self) -> int:
        dtype = self.gradient_dtype
        return 0 if dtype is None else math.prod(self.shape) * dtype.itemsize

    @property
    def positions(self) -> int:
        return math.prod(self.pooled_size or self.shape[2:])

    @property
    def multiplied_dtype(self) -> torch.dtype:
        """The dtype of the pooled map: averages of half-precision elements need fp32."""
        return torch.float32 if self.pool == "avg" and self.dtype in HALF else self.dtype

    @cached_property
    def fused_windows(self) -> bool:
        """Whether kernels can pool the map while they read it: windows are equal and not too large.

        Also true of a map that is not pooled.
        """
        sizes = list(zip(self.shape[2:], self.pooled_size or (), strict=False))
        window = math.prod(full // part for full, part in sizes)
        return all(full % part == 0 for full, part in sizes) and window <= GPU_WINDOW

    @property
    def read(self) -> MapPlan:
        """The map that fused kernels read: this one, or a pooled copy if they cannot pool it."""
        return self if self.fused_windows else self.pooled_copy

    @cached_property
    def pooled_copy(self) -> MapPlan:
        """The contiguous map that PyTorch pools this one to."""
        assert self.pooled_size is not None
        shape = (*self.shape[:2], *self.pooled_size)
        gradient = None if self.gradient_dtype is None else torch.float32
        strides = contiguous_strides(shape)
        return MapPlan(shape, strides, self.multiplied_dtype, None, "none", gradient)


def contiguous_strides(shape: Sequence[int]) -> tuple[int, ...]:
    return tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))


class Limits(NamedTuple):
    """What a backend can do for one pair on one device, as far as planning depends on it.

    ``evaluations`` are those that the backend has. ``one_pass`` is the largest number of channels
    whose residual a kernel keeps on chip. From ``one_pass_parts`` parts of the positions on, tiles
    are faster than one pass. ``gram_positions`` is the largest number of positions of the Gram form
    (``None``: no limit). ``gram_flop_cost`` is the time of a flop of a Gram block, relative to
    other flops.

    ``exact_halves``: products of half-precision maps are exact, while their differences would be
    rounded. ``bf16_forms``: the forms in which the operands of every product are bf16.
    ``bf16_slopes``: tiles are stored in bf16 if the maps are bf16. ``blas_gradients``: BLAS has
    fast kernels for the products of such tiles and these maps. Pairs whose ``kernels`` of their
    evaluation are equal share a launch, at most ``launch_pairs`` pairs or ``launch_products``
    gradients at a time.
    """

    evaluations: tuple[Evaluation, ...] = ("chunks",)
    one_pass: int = 0
    one_pass_parts: float = math.inf
    gram_positions: int | None = None
    gram_flop_cost: float = 1.0
    exact_halves: bool = False
    bf16_forms: tuple[Form, ...] = ()
    bf16_slopes: bool = False
    blas_gradients: bool = False
    kernels: Mapping[Evaluation, Hashable] = MappingProxyType({})
    launch_pairs: int = 1
    launch_products: int = 1


@dataclass(frozen=True)
class PairPlan:
    """How one pair is evaluated.

    ``teacher`` holds two maps, or one if it is a ready matrix. ``evaluation`` is one of

    * ``"chunks"``: a chunk of samples at a time, without fused kernels;
    * ``"samples"``: each thread of a CPU evaluates one sample at a time;
    * ``"one pass"``: a program of a fused kernel holds a sample's residual or Gram blocks;
    * ``"tiles"``: tiles of the residual are stored, each computed by ``parts`` programs;
    * ``"blocks"``: Gram blocks are stored, each computed by ``parts`` programs.

    ``samples`` are processed at a time. ``passes`` is 1 if their maps are still in cache for the
    second sweep, and 2 if they are read from memory twice. With ``blas_gradients`` PyTorch's
    batched product computes the gradients from the stored tiles. ``scratch_bytes`` are allocated
    while the launches of the pair's group run, ``pooled_bytes`` for the whole call. A ``symmetric``
    pair is a map with itself, in each network that has maps. Its second maps want no gradient: it
    is part of the first ones'. With ``bf16_products`` the operands of every product are bf16:
    residuals and Gram blocks are rounded for the gradients, as are differences of maps. Scratch
    memory of BLAS is not counted. Threads of a CPU that evaluate samples keep theirs from call to
    call.
    """

    batch: int
    channels: tuple[int, int]  # (m, n)
    student: tuple[MapPlan, ...]
    teacher: tuple[MapPlan, ...]
    norm: str
    residual: Residual
    form: Form
    evaluation: Evaluation
    parts: int
    passes: int
    samples: int
    flops: int
    scratch_bytes: int
    pooled_bytes: int = 0
    slope_dtype: torch.dtype | None = None  # of stored tiles, if gradients are wanted
    blas_gradients: bool = False
    symmetric: bool = False
    bf16_products: bool = False

    @property
    def maps(self) -> tuple[MapPlan, ...]:
        return self.student + self.teacher

    @property
    def distinct_maps(self) -> tuple[MapPlan, ...]:
        """The maps without the second ones of a symmetric pair."""
        return (self.student[0], self.teacher[0]) if self.symmetric else self.maps

    @property
    def has_symmetric_slope(self) -> bool:
        """Whether the derivative by ``D`` is symmetric, whatever the maps are."""
        return self.symmetric and self.norm != "column" and len(self.teacher) == 2

    @property
    def positions(self) -> int:
        return self.student[0].positions

    @property
    def masks(self) -> MaskIndices:
        """The indices of the networks' masks. A ready matrix has none."""
        return self.student[0].mask, self.teacher[0].mask

    @property
    def masked(self) -> bool:
        return self.masks != (None, None)

    @property
    def bytes_moved(self) -> int:
        """Bytes read and written, at least: maps ``passes`` times, gradients once."""
        reads = self.passes if self.wants_gradients else 1
        return reads * sum(m.bytes for m in self.distinct_maps) + self.gradient_bytes

    @property
    def gradient_bytes(self) -> int:
        return sum(m.gradient_bytes for m in self.maps)

    @property
    def workspace_bytes(self) -> int:
        """Bytes of temporary memory, beyond the gradients."""
        return self.scratch_bytes + self.pooled_bytes

    @cached_property
    def wants_gradients(self) -> bool:
        return any(m.gradient_dtype is not None for m in self.maps)

    @cached_property
    def halves(self) -> bool:
        """Whether all operands are half precision."""
        return all(dtype in HALF for dtype in multiplied_dtypes(self.student, self.teacher))

    @property
    def divisor(self) -> int:
        """The divisor of the sum over samples and entries: ``B``, or ``B m n`` for ``"mse"``."""
        return self.batch * (math.prod(self.channels) if self.norm == "mse" else 1)

    @property
    def slope_scale(self) -> int:
        """The derivative by ``D / K`` over the slope: 2 for a sum of squares, 1 for columns."""
        return 1 if self.norm == "column" else 2

    @property
    def finishes(self) -> bool:
        """Whether the launch that stores a tile of the residual also computes its loss.

        If not, a second launch does: each tile has several parts, or the norm needs whole columns.
        """
        return self.parts == 1 and self.norm != "column"


def multiplied_dtypes(
    student: Sequence[MapPlan], teacher: Sequence[MapPlan]
) -> tuple[torch.dtype, ...]:
    """The dtypes of a pair's operands. A ready matrix is not an operand."""
    maps = [*student, *teacher] if len(teacher) == 2 else student
    return tuple(m.multiplied_dtype for m in maps)


class Scaling(NamedTuple):
    """The gradients that backward scales."""

    sizes: tuple[int, ...]  # elements of each
    held: tuple[torch.dtype, ...]  # between forward and backward
    dtypes: tuple[torch.dtype, ...]  # that backward returns
    factors: tuple[int, ...]  # which of the incoming gradients each is multiplied by


class LaunchGroup(NamedTuple):
    """Launches that several pairs of one evaluation share, for one chunk of their samples.

    ``pairs`` are the indices of the pairs in the order of a launch. ``launches`` are kernel names.
    """

    evaluation: Evaluation
    form: Form
    pairs: tuple[int, ...]
    chunk: int
    launches: tuple[str, ...]
    scratch_bytes: int


@dataclass(frozen=True)
class LossPlan:
    """The evaluation of one :func:`fsp_kernels.fsp_loss` call; ``print`` it to read it.

    ``reduction`` is ``"sum"`` for the loss of all pairs together, ``"none"`` for one of each pair.
    ``compute_dtype`` is the dtype in which products are accumulated and the dtype of the loss.
    ``precision`` says how fp32 maps are multiplied on tensor cores: ``"tf32x3"`` or ``"tf32"``.
    """

    pairs: tuple[PairPlan, ...]
    launch_groups: tuple[LaunchGroup, ...]
    pool: str
    norm: str
    reduction: str
    device: str
    backend: str
    compute_dtype: torch.dtype
    precision: str

    def __hash__(self) -> int:
        return self._hash

    @cached_property
    def _hash(self) -> int:
        """Cached, since every call looks up what is prepared for its plan."""
        return hash(self._fields)

    @property
    def _fields(self) -> tuple[Any, ...]:
        return tuple(getattr(self, field.name) for field in fields(self))

    def __reduce__(self) -> tuple[Any, ...]:
        return LossPlan, self._fields  # without caches: a hash is valid in one process only

    @property
    def flops(self) -> int:
        """Floating-point operations of the matrix products (a multiply-add is two)."""
        return sum(p.flops for p in self.pairs)

    @property
    def bytes_moved(self) -> int:
        """Bytes read from and written to main memory, at least."""
        return sum(p.bytes_moved for p in self.pairs)

    @property
    def gradient_bytes(self) -> int:
        """Bytes of the gradients that are kept from forward to backward."""
        return sum(p.gradient_bytes for p in self.pairs)

    @property
    def workspace_bytes(self) -> int:
        """Peak bytes of temporary memory, without the gradients."""
        pooled = sum(p.pooled_bytes for p in self.pairs)
        return pooled + max(group.scratch_bytes for group in self.launch_groups)

    @property
    def extra_bytes(self) -> int:
        """Peak memory of a call beyond its inputs: gradients and workspace."""
        return self.gradient_bytes + self.workspace_bytes

    @property
    def launches(self) -> tuple[str, ...]:
        """The kernels that a fused backend launches for value and gradients, in order.

        ``bmm`` is PyTorch's batched product by BLAS. Where kernels cannot pool a map, PyTorch's
        pooling runs before them and its backward after them. PyTorch also doubles the gradients of
        symmetric pairs, unless they are products with stored tiles. These are not listed.
        """
        names = [name for group in self.launch_groups for name in group.launches]
        sums = len(self.pairs) if self.by_pair else 1
        return (*names, *("finish",) * math.ceil(sums / LAUNCH_SUMS)) if names else ()

    @cached_property
    def maps(self) -> tuple[MapPlan, ...]:
        """All maps in the order of backends: pair by pair, student before teacher."""
        return tuple(m for pair in self.pairs for m in pair.maps)

    @cached_property
    def wanted(self) -> tuple[int, ...]:
        """The indices in ``maps`` of those that want a gradient."""
        return tuple(i for i, m in enumerate(self.maps) if m.gradient_dtype is not None)

    @cached_property
    def scaling(self) -> Scaling:
        """The sizes and dtypes of the wanted gradients, for backward."""
        maps = [self.maps[i] for i in self.wanted]
        return Scaling(
            sizes=tuple(math.prod(m.shape) for m in maps),
            held=tuple(m.gradient_dtype for m in maps if m.gradient_dtype is not None),
            dtypes=tuple(m.dtype for m in maps),
            factors=factors_of(
                [len(p.teacher) == 1 for p in self.pairs], self.wanted, self.by_pair
            ),
        )

    @cached_property
    def doubled(self) -> tuple[int, ...]:
        """The wanted gradients that fused backends double after the launches: their places.

        Of a symmetric pair the kernels compute half of the gradient. If it is a product with stored
        tiles, its factor doubles it.
        """
        pairs = [p for p in self.pairs for _ in p.maps]
        of_wanted = [pairs[i] for i in self.wanted]
        return tuple(
            place
            for place, pair in enumerate(of_wanted)
            if pair.symmetric and pair.evaluation != "tiles"
        )

    @property
    def by_pair(self) -> bool:
        """Whether the result is one loss ``(pairs,)`` for each pair, instead of their sum."""
        return self.reduction == "none"

    @cached_property
    def pooled_before(self) -> tuple[int, ...]:
        """The indices in ``maps`` of those that fused kernels cannot pool while they read them."""
        return tuple(i for i, m in enumerate(self.maps) if not m.fused_windows)

    def spread(self, gradients: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
        """One entry for each map: its gradient, or ``None`` if it wants none."""
        return self._spread((*gradients, None))

    @cached_property
    def _spread(self) -> Callable[[Sequence[Tensor | None]], tuple[Tensor | None, ...]]:
        places = {i: k for k, i in enumerate(self.wanted)}
        return itemgetter(*(places.get(i, -1) for i in range(len(self.maps))))

    def __str__(self) -> str:
        head = (
            f"fsp_loss on {self.device} by the {self.backend} backend, norm={self.norm!r}, "
            f"pool={self.pool!r}, accumulating in {_name(self.compute_dtype)}"
        )
        columns = ("pair", "B", "m x n", "K", "evaluation", "chunk", "GFLOP", "MB", "extra MB")
        rows = [columns, *(_table_row(i, p) for i, p in enumerate(self.pairs))]
        amounts = _amount_texts(self.flops, self.bytes_moved, self.extra_bytes)
        rows.append(("all", "", "", "", "", "", *amounts))
        widths = [max(len(row[i]) for row in rows) for i in range(len(columns))]
        lines = ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) for row in rows]
        if self.launches:
            lines.append(f"{len(self.launches)} launches: {', '.join(self.launches)}")
        return "\n".join([head, *(line.rstrip() for line in lines)])

    __repr__ = __str__


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _table_row(index: int, pair: PairPlan) -> tuple[str, ...]:
    return (
        str(index),
        str(pair.batch),
        "{} x {}".format(*pair.channels),
        str(pair.positions),
        f"{'masked, ' * pair.masked}{'symmetric, ' * pair.symmetric}{pair.residual}, "
        f"{pair.form} form, " + _evaluation_text(pair),
        f"{pair.samples} samples",
        *_amount_texts(pair.flops, pair.bytes_moved, pair.gradient_bytes + pair.workspace_bytes),
    )


def _evaluation_text(pair: PairPlan) -> str:
    if pair.evaluation in ("chunks", "samples"):
        return "one pass" if pair.passes == 1 else "two passes"
    parts = "" if pair.parts == 1 else f" in {pair.parts} parts"
    return pair.evaluation + parts + (", gradients by BLAS" if pair.blas_gradients else "")


def _amount_texts(flops: int, bytes_moved: int, extra_bytes: int) -> tuple[str, str, str]:
    return f"{flops / 1e9:.3f}", f"{bytes_moved / 1e6:.2f}", f"{extra_bytes / 1e6:.2f}"
