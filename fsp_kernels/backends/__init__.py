"""Who computes: the protocol every backend follows, the registry, and the choice between them.

Selection, first that says something: the ``backend`` argument, :class:`use_backend`, the variable
``FSP_KERNELS_BACKEND``, the best that works for the tensors at hand. A backend asked for by name
that cannot serve is an error that says why.
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

from fsp_kernels.backends.cuda import CudaBackend
from fsp_kernels.backends.torch_backend import TorchBackend
from fsp_kernels.backends.triton import TritonBackend
from fsp_kernels.checks import check_choice
from fsp_kernels.loss_plan import Limits, LossPlan, MapPlan, Scaling


class Backend(Protocol):
    """A handful of functions over checked, planned inputs; none of them records autograd."""

    name: str

    def __hash__(self) -> int: ...  # plans are cached by the backend they are for

    @property
    def automatic(self) -> bool:
        """Whether it may be chosen unasked; an interpreter, for one, has to be named."""

    def why_unavailable(self) -> str | None:
        """``None`` if it works on this machine, else what is missing, as a clause."""

    def why_unsupported(self, device: torch.device, dtypes: Sequence[torch.dtype]) -> str | None:
        """``None`` if it can serve tensors of this device and these dtypes, else why not."""

    def limits(
        self,
        device: torch.device,
        student: Sequence[MapPlan],
        teacher: Sequence[MapPlan],
        precision: str,
    ) -> Limits:
        """What it can do for a pair of these maps; the planner decides what it does.

        ``teacher`` holds two maps, or one that is a ready matrix. ``precision`` says how fp32 maps
        are multiplied on tensor cores: ``"tf32x3"`` or ``"tf32"``.
        """

    def matrix(self, first: Tensor, second: Tensor) -> Tensor:
        """``(B, m, K), (B, n, K) -> (B, m, n)``, divided by K, in the promoted dtype."""

    def matrix_backward(self, gradient: Tensor, other: Tensor, channels_last: bool) -> Tensor:
        """``(B, m, n), (B, n, K) -> (B, m, K)``, divided by K, in the promoted dtype.

        The result is contiguous, or with ``channels_last`` its transpose ``(B, K, m)`` is.
        """

    def loss(
        self, maps: Sequence[Tensor], plan: LossPlan, weights: Sequence[float]
    ) -> tuple[Tensor, list[Tensor]]:
        """Loss (0-dim, ``plan.compute_dtype``) and the gradients the plan asks for.

        ``maps`` are the tensors of ``plan.pairs``, with the strides that these have, flattened:
        student first, student second, teacher first, teacher second (or the teacher's ready
        matrix), next pair. Gradients come in that order, each in its ``gradient_dtype`` and with
        the strides of ``torch.empty_like``.
        """

    def scale(
        self, gradients: list[Tensor], scaling: Scaling, factor: Tensor, in_place: bool
    ) -> list[Tensor]:
        """``gradients * factor`` in ``scaling.dtypes``; only ``in_place`` may overwrite them."""


# Best first. Adding a backend is a folder and a line here.
_REGISTRY: dict[str, Backend] = {
    backend.name: backend for backend in (TritonBackend(), CudaBackend(), TorchBackend())
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
        RuntimeError: it is one, but it does not work on this machine; the message says why.
    """
    check_choice("backend", name, tuple(_REGISTRY))
    backend = _REGISTRY[name]
    reason = backend.why_unavailable()
    if reason is not None:
        raise RuntimeError(f"backend {name!r} is not available on this machine: {reason}")
    return backend


def planned_backend(plan: LossPlan) -> Backend:
    """The backend that a plan was made for, which therefore works."""
    return _REGISTRY[plan.backend]


class _Choice:
    """One use of :class:`use_backend`; an empty name is the automatic choice."""

    def __init__(self, name: str):
        self.name = name


class _Choices:
    """Choices in the order in which they were made, and the name of the last one, if any.

    The compiler sees a change of ``name``, as it is an attribute of an object.
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
                del self._made[i]
                break
        self.name = self._made[-1].name if self._made else None


class _Thread(threading.local):
    def __init__(self) -> None:
        self.choices = _Choices()


_PROCESS = _Choices()
_THREAD = _Thread()
_LOCK = threading.Lock()


class use_backend:  # noqa: N801  (reads as a function, like torch.no_grad)
    """Make ``name`` the default backend of this process, for good, or of a ``with`` block.

    >>> use_backend("torch")            # from here on, in every thread
    >>> with use_backend("torch"): ...  # here only, in this thread

    A block concerns the thread that runs it, like ``torch.no_grad``: it comes before what is set
    for good, and threads that it starts do not see it. Blocks may end in any order, as those of
    generators and coroutines do, which share their thread's choice while they are suspended.
    ``backward`` runs where its forward did, whatever the choice is by then.

    ``None`` restores the automatic choice. Raises as :func:`fsp_kernels.backends.get_backend`.
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
    # The compiler takes no lock, and traces in one thread at a time.
    return nullcontext() if torch.compiler.is_compiling() else _LOCK


def _chosen() -> str | None:
    """What :class:`use_backend` says in this thread, if anything."""
    name = _THREAD.choices.name
    return (_PROCESS.name if name is None else name) or None


def requested_backend(argument: str | None) -> str | None:
    """What the user asked for, if anything: argument, :class:`use_backend`, environment."""
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
    """The backend that serves these tensors.

    Raises:
        ValueError: an unknown name, or a backend that cannot serve such tensors.
        RuntimeError: a backend that does not work on this machine.
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
