"""A student and its teacher as one module that gives the student's output and the FSP loss."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fsp_kernels import checks
from fsp_kernels.features.pairs import (
    PathPair,
    Projection,
    channels_first,
    check_pairs,
    find_pairs,
)
from fsp_kernels.features.stages import Inputs
from fsp_kernels.features.taps import FeatureTaps
from fsp_kernels.modules import FSPLoss


class Distilled(NamedTuple):
    """What a :class:`Distiller` gives.

    Attributes:
        output: the student's.
        loss: the FSP loss, a scalar: the sum of ``losses``.
        losses: the weighted loss of each pair, ``(pairs,)``.
        teacher_output: the teacher's, without a graph.
    """

    output: Any
    loss: Tensor
    losses: Tensor
    teacher_output: Any


class Distiller(nn.Module):
    """Runs a student and its teacher on the same inputs and compares their feature maps.

    >>> distiller = fsp.Distiller(student, teacher, example=images[:2])
    >>> optimizer = torch.optim.SGD(distiller.parameters(), lr=0.1)
    >>> output, fsp_loss, *_ = distiller(images)
    >>> loss = F.cross_entropy(output, labels) + weight * fsp_loss

    The maps are recorded by hooks; :meth:`detach` removes them. The networks stay yours and can be
    used on their own. A call puts the teacher in evaluation mode and runs it without a graph. It
    moves with the module (``to``, ``cuda``, ``half``), but is not a part of it: its weights are
    neither in ``parameters()`` nor in ``state_dict()``.

    With ``DistributedDataParallel`` or ``fully_shard``, wrap the distiller or the student. If you
    minimise the FSP loss alone, add ``0 * output.sum()`` to it: otherwise some parts, such as the
    student's classifier, have outputs that the loss does not use. DDP would then stop or, if it
    wraps the student alone, average no gradients, with ``static_graph=True`` without an error.
    ``fully_shard`` would miss the weights that it has released. Without that term, use
    ``find_unused_parameters=True`` and wrap the distiller, or use ``reshard_after_forward=False``.

    Args:
        student, teacher: take the same inputs; if their channels differ, see ``projection``.
        pairs: which maps make an FSP matrix. ``"auto"`` takes the first and the last map of each
            spatial size, as in the paper's figure 3; ``"family"`` those of a known ResNet. Or a
            list with two module paths for each pair, as in ``named_modules()``, that both networks
            have: ``[("layer1", "layer2"), ...]``; or the student's two and the teacher's two:
            ``[(("layer1", "layer2"), ("stem", "layer1")), ...]``. :class:`FeatureTaps` says what a
            path can be. `fsp-distill inspect` prints those of a network.
        example: inputs to try both networks with, on their device: a tensor, a tuple of arguments
            or a dict of keywords. ``"auto"`` and ``projection`` need it; otherwise it is a check at
            once instead of in the first call.
        projection: learn a 1x1 convolution without bias from the student's channels to the
            teacher's, wherever they differ. It is a part of the module, so give its parameters to
            the optimiser; it is not needed after training.
        weights, pool, norm, channel_dim: as in :func:`fsp_kernels.fsp_loss`.
        mask: the name of the keyword of both networks that says which positions of the maps count,
            ``(B, *spatial)``: ``"attention_mask"`` of Hugging Face's encoders. Those count where it
            is not 0, in the maps of both networks.

    Raises:
        TypeError, ValueError: an argument is wrong, a path is not in its network, or the networks
            do not fit the example or each other; the message says which and what could be done.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        pairs: str | Sequence[Any] = "auto",
        *,
        example: Inputs | None = None,
        projection: bool = False,
        weights: Sequence[float] | Tensor | None = None,
        pool: str = "max",
        norm: str = "frobenius",
        channel_dim: int | None = None,
        mask: str | None = None,
    ):
        super().__init__()
        checks.check_channel_dim(channel_dim)
        checks.check_keyword("mask", mask)
        checks.check_networks(student, teacher, example)
        # Maps come to it with their channels first.
        self.criterion = FSPLoss(
            weights, pool, norm, reduction="none", channel_dim=channel_dim and 1
        )
        if isinstance(pairs, str):
            found = find_pairs(pairs, student, teacher, example)
            self.pairs = tuple(pair._replace(channel_dim=channel_dim) for pair in found)
        else:
            self.pairs = _read_pairs(pairs, channel_dim)
        if weights is not None:
            checks.check_count(weights, len(self.pairs))
        self.projection = None
        if example is not None:
            shapes = check_pairs(self.pairs, student, teacher, example, projection)
            self.projection = Projection(shapes) if projection else None
        elif projection:
            raise ValueError("example: got None, which projection=True needs")
        self._taps = tuple(
            FeatureTaps(network, [path for two in paths for path in two])
            for network, paths in (
                (student, [pair.student for pair in self.pairs]),
                (teacher, [pair.teacher for pair in self.pairs]),
            )
        )
        for taps in self._taps:
            taps.attach()
        self.mask = mask
        self.student = student
        self._teacher = (teacher,)  # in a tuple, so that it is not a submodule
        if self.projection is not None:
            first = next(student.parameters(), None)
            if first is not None:
                self.projection.to(first.device, first.dtype)

    @property
    def teacher(self) -> nn.Module:
        """The teacher."""
        return self._teacher[0]

    def forward(self, *args: Any, **kwargs: Any) -> Distilled:
        """Call both networks with these arguments.

        Raises:
            TypeError: the keyword that is named as ``mask`` is missing or no tensor.
            DistillError: a map was not recorded or was overwritten in place; the message says
                which.
        """
        mask = None if self.mask is None else checks.mask_among(self.mask, kwargs)
        for taps in self._taps:
            taps.attach()  # after a copy or detach(); otherwise they are attached
        output = self.student(*args, **kwargs)
        if self.teacher.training:
            self.teacher.eval()
        with torch.no_grad():
            teacher_output = self.teacher(*args, **kwargs)
        dims = [pair.channel_dim for pair in self.pairs]
        ours, theirs = (channels_first(taps.take_pairs(), dims) for taps in self._taps)
        if self.projection is not None:
            ours = self.projection(ours)
        losses = self.criterion(ours, theirs, mask, mask)
        return Distilled(output, losses.sum(), losses, teacher_output)

    def detach(self) -> None:
        """Remove the hooks from both networks, until the next call."""
        for taps in self._taps:
            taps.detach()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Distiller:
        super()._apply(fn, recurse)
        self.teacher._apply(fn)
        return self


def _read_pairs(pairs: Any, channel_dim: int | None) -> tuple[PathPair, ...]:
    if not isinstance(pairs, (list, tuple)) or not pairs:
        raise ValueError(f"pairs: got {pairs!r}, expected 'auto', 'family' or a list of pairs")
    found = []
    for index, pair in enumerate(pairs):
        if _is_two(pair, str):
            found.append(PathPair(tuple(pair), tuple(pair), channel_dim))
        elif _is_two(pair, (list, tuple)) and all(_is_two(two, str) for two in pair):
            student, teacher = map(tuple, pair)
            found.append(PathPair(student, teacher, channel_dim))
        else:
            raise ValueError(
                f"pairs[{index}]: got {pair!r}, expected two module paths, or the student's two "
                "and the teacher's two"
            )
    return tuple(found)


def _is_two(value: Any, kind: type | tuple[type, ...]) -> bool:
    is_sequence = isinstance(value, (list, tuple)) and len(value) == 2
    return is_sequence and all(isinstance(x, kind) for x in value)
