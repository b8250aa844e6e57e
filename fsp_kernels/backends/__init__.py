"""The backends: their protocol, the registry, and how one is selected.

    torch_backend.py  PyTorch operators, for any device
    triton/           Triton kernels
    cuda/             CUDA C++ kernels
    cpu.py            C++ kernels for CPUs
    fused.py          what the Triton and the CUDA backend share
    tensors.py        the tensors of a planned loss; pooling before the kernels
    compiled.py       the compiled modules, or why they are missing
    axes.py           the spatial axes of a map in memory
    devices.py        streams, precision and availability of devices

The first of these that names a backend selects it: the ``backend`` argument, :class:`use_backend`,
the environment variable ``FSP_KERNELS_BACKEND``. Otherwise the best one that works for the tensors
is used. A named backend that cannot serve the tensors is an error that says why.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from types import TracebackType
from typing import Any, Protocol

import torch
from torch import Tensor

from fsp_kernels.backends.cpu import CpuBackend
from fsp_kernels.backends.cuda import CudaBackend
from fsp_kernels.backends.torch_backend import TorchBackend
from fsp_kernels.backends.triton import TritonBackend
from fsp_kernels.checks import check_choice
from fsp_kernels.loss_plan import Limits, LossPlan, MapPlan, Scaling


class Backend(Protocol):
    """What a backend must have. Its methods take checked, planned inputs and record no autograd."""

    name: str

    def __hash__(self) -> int: ...  # part of the key of cached plans

    @property
    def automatic(self) -> bool:
        """Whether it may be selected without being named. An interpreter, e.g., must be named."""

    @property
    def transposes(self) -> bool:
        """Whether it adds matrices and their transposes, for pairs of a map with itself.

        Then it takes one product for their residual, and one for the gradient ``(S + S^T) a`` from
        any slope ``S``. Else it doubles ``S a``, which is the same for symmetric slopes alone.
        """

    def why_unavailable(self) -> str | None:
        """``None`` if it works on this machine, else a clause that says what is missing."""

    def why_unsupported(self, device: torch.device, dtypes: Sequence[torch.dtype]) -> str | None:
        """``None`` if it supports tensors of this device and these dtypes, else why not."""

    def limits(
        self,
        device: torch.device,
        student: Sequence[MapPlan],
        teacher: Sequence[MapPlan],
        precision: str,
    ) -> Limits:
        """What it can do for a pair of these maps. The planner chooses among that.

        ``teacher`` holds two maps, or one ready matrix. ``precision``, ``"tf32x3"`` or ``"tf32"``,
        says how fp32 maps are multiplied on tensor cores.
        """

    def matrix(self, first: Tensor, second: Tensor) -> Tensor:
        """``(B, m, K), (B, n, K) -> (B, m, n)``, divided by K, in the promoted dtype."""

    def matrix_backward(self, gradient: Tensor, other: Tensor, channels_last: bool) -> Tensor:
        """``(B, m, n), (B, n, K) -> (B, m, K)``, divided by K, in the promoted dtype.

        The result is contiguous. With ``channels_last`` its transpose ``(B, K, m)`` is instead.
        """

    def loss(
        self,
        maps: Sequence[Tensor],
        plan: LossPlan,
        weights: Sequence[float],
        masks: Sequence[Tensor] = (),
    ) -> tuple[Tensor, list[Tensor]]:
        """The loss, of ``plan.compute_dtype``, and the gradients that the plan wants.

        The loss is a scalar, or ``(pairs,)`` if ``plan.by_pair``.

        ``maps`` are the tensors of ``plan.pairs``, with the strides in the plan, in one list:
        student first, student second, teacher first, teacher second (or the teacher's ready
        matrix), next pair. Gradients have the same order, their ``gradient_dtype`` and the strides
        of ``torch.empty_like``. The second maps of a symmetric pair are equal to the first ones.
        ``masks`` are those that the plan's maps name by index, ``(B, K)`` of bool, contiguous.
        """

    def scale(
        self, gradients: list[Tensor], scaling: Scaling, factor: Tensor, in_place: bool
    ) -> list[Tensor]:
        """``gradients * factor`` in ``scaling.dtypes``; overwrites them only if ``in_place``.

        ``factor`` is a scalar, or ``(pairs,)``; ``scaling.factors`` says which of its elements.
        """


# Best first. A new backend needs a line here.
_REGISTRY: dict[str, Backend] = {
    backend.name: backend
    for backend in (TritonBackend(), CudaBackend(), CpuBackend(), TorchBackend())
}

_ENVIRONMENT_VARIABLE = "FSP_KERNELS_BACKEND"


def registered_backends() -> dict[str, Backend]:
    """Every backend by name, best first, whether or not it works here."""
    return dict(_REGISTRY)


def available_backends() -> tuple[str, ...]:
    """Names of the backends that work on this machine, best first."""
    return tuple(name for name, backend in _REGISTRY.items() if backend.why_unavailable() is None)


def get_backend(name: str) -> Backend:
    """The backend of that name.

    Raises:
        ValueError: ``name`` is not a backend.
        RuntimeError: the backend does not work on this machine; the message says why.
    """
    check_choice("backend", name, tuple(_REGISTRY))
    backend = _REGISTRY[name]
    reason = backend.why_unavailable()
    if reason is not None:
        raise RuntimeError(f"backend {name!r} is not available on this machine: {reason}")
    return backend


def planned_backend(plan: LossPlan) -> Backend:
    """The backend that a plan was made for. It was checked to work when it was planned."""
    return _REGISTRY[plan.backend]


class _Choice:
    """One use of :class:`use_backend`. An empty name means the automatic choice."""

    def __init__(self, name: str):
        self.name = name


class _Choices:
    """Choices in the order in which they were made, and the name of the last one, if any.

    ``name`` is an attribute so that the compiler notices when it changes.
    """

    def __init__(self) -> None:
        self.name: str | None = None
        self._made: list[_Choice] = []

    def add(self, choice: _Choice) -> None:
        self._made.append(choice)
        self.name = choice.name

    def remove(self, choice: _Choice) -> None:
        for i in reversed(range(len(self._made))):  # a block may be entered twice
            if self._made[i] is choice:
                self._made.pop(i)
                break
        self.name = self._made[-1].name if self._made else None


class _Thread(threading.local):
    def __init__(self) -> None:
        self.choices = _Choices()


_PROCESS = _Choices()
_THREAD = _Thread()
_LOCK = threading.Lock()


class use_backend:  # noqa: N801  (reads as a function, like torch.no_grad)
    """Make ``name`` the default backend of this process or of a ``with`` block.

    >>> use_backend("torch")            # from here on, in every thread
    >>> with use_backend("torch"): ...  # in this block and this thread only

    A block affects only the thread that runs it, like ``torch.no_grad``. In the block its name
    comes before the default of the process. Threads that the block starts do not see its name.
    Blocks may end in any order, as in generators and coroutines; while these are suspended, their
    blocks stay active in the thread. ``backward`` uses the backend of its forward.

    ``None`` restores the automatic choice. It raises what
    :func:`fsp_kernels.backends.get_backend` raises.
    """

    def __init__(self, name: str | None):
        if name is not None:
            get_backend(name)
        self._choice = _Choice(name or "")
        with _exclusive():
            _PROCESS.add(self._choice)

    def __enter__(self) -> None:
        with _exclusive():
            _PROCESS.remove(self._choice)
        _THREAD.choices.add(self._choice)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        _THREAD.choices.remove(self._choice)

    def __repr__(self) -> str:
        return f"use_backend({_chosen()!r})"


def _exclusive() -> AbstractContextManager[Any]:
    # The compiler cannot trace a lock, and needs none: it traces in one thread at a time.
    return nullcontext() if torch.compiler.is_compiling() else _LOCK


def _chosen() -> str | None:
    """The name that :class:`use_backend` set for this thread, if any."""
    name = _THREAD.choices.name
    return (_PROCESS.name if name is None else name) or None


def requested_backend(argument: str | None) -> str | None:
    """The backend the user named, if any: by argument, :class:`use_backend` or environment."""
    if argument is not None:
        check_choice("backend", argument, tuple(_REGISTRY))
        return argument
    chosen = _chosen()
    if chosen is not None:
        return chosen
    name = os.environ.get(_ENVIRONMENT_VARIABLE)
    if name:
        check_choice(_ENVIRONMENT_VARIABLE, name, tuple(_REGISTRY))
    return name or None


def select_backend(
    requested: str | None, device: torch.device, dtypes: tuple[torch.dtype, ...]
) -> Backend:
    """The backend for these tensors: the requested one, else the best that works.

    Raises:
        ValueError: the name is unknown, or the backend does not support these tensors.
        RuntimeError: the backend does not work on this machine.
    """
    if requested is not None:
        backend = get_backend(requested)
        reason = backend.why_unsupported(device, dtypes)
        if reason is not None:
            raise ValueError(f"backend {requested!r} cannot serve these tensors: {reason}")
        return backend
    for backend in _REGISTRY.values():
        works = backend.automatic and backend.why_unavailable() is None
        if works and backend.why_unsupported(device, dtypes) is None:
            return backend
    raise AssertionError("the torch backend serves every device and dtype")
