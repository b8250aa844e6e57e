"""Fixtures of all tests of fused kernels, which their folders' conftest.py import.

Kernels run on a GPU where there is one, else on the CPU: Triton's in its interpreter, those of
csrc/ compiled for the host.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator

import pytest
import torch
import triton.runtime.interpreter as interpreter
from calls import SIZES, small_rows
from cuda_on_host.module import HOST_BUILDS, extension_is, host_cuda_module

import fsp_kernels as fsp
from fsp_kernels import functional, plan
from fsp_kernels.backends import cuda, registered_backends
from fsp_kernels.backends.triton import configurations, why_not_this_triton
from fsp_kernels.loss_plan import Limits


def _quicken_interpreter() -> None:
    """Twice the speed: what Triton's interpreter does again in every call of a function.

    It patches ``triton.language`` as the function's module sees it, which one call in each launch
    is enough for, and checks every sum of integers for an overflow.
    """
    patch_language = interpreter._patch_lang
    patched = set()

    def launch(fn):
        patched.clear()
        return patch_language(fn)

    def call(self, *args, **kwargs):
        if self.fn.__module__ not in patched:
            patched.add(self.fn.__module__)
            patch_language(self.fn)
        return self.rewrite()(*args, **kwargs)

    interpreter._patch_lang = launch
    interpreter.InterpretedFunction.__call__ = call
    builder = interpreter.interpreter_builder
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)


CACHED = [
    plan.plan_loss,
    functional._checked_plan,
    configurations.configuration_of,
    cuda.product._prepared_product,
]
if why_not_this_triton() is None:
    from fsp_kernels.backends.triton import product as triton_product

    CACHED.append(triton_product._prepared)
    if not torch.cuda.is_available():
        _quicken_interpreter()


@contextlib.contextmanager
def in_force(name: str) -> Iterator[str]:
    """Calls that name no backend are served by this one; skips the test if it cannot be had."""
    reason = registered_backends()[name].why_unavailable()
    if reason is not None:
        pytest.skip(reason)
    with fsp.use_backend(name):
        yield name


@pytest.fixture
def cuda_extension(request):
    """The compiled kernels of csrc/: without a GPU they are compiled for the host."""
    if torch.cuda.is_available():
        yield
        return
    build = HOST_BUILDS[request.config.getoption("--host-cuda")]
    with extension_is(host_cuda_module(*build)):
        yield


@pytest.fixture
def regimes(backend):
    """By road: shapes that take it in kernels of the backend, under the limits of ``small``."""
    return SIZES[backend].regimes


@pytest.fixture
def regime(request, regimes):
    """The shapes of one road, which the test is parametrised by."""
    return regimes[request.param]


@pytest.fixture
def tile(backend):
    return SIZES[backend].tile


def forget():
    """Drop what was prepared under other limits."""
    for cached in CACHED:
        cached.cache_clear()
    for name in ("triton", "cuda"):
        registered_backends()[name].prepared.clear()


@pytest.fixture
def limits(backend, monkeypatch):
    """Sets limits of the planner, ``limits(GPU_PROGRAMS=1)``, and the backend's, in lower case."""
    known, changed = type(registered_backends()[backend]).limits, {}
    monkeypatch.setattr(
        type(registered_backends()[backend]),
        "limits",
        lambda *arguments: known(*arguments)._replace(**changed),
    )

    def set_to(**values):
        for name, value in values.items():
            if name in Limits._fields:
                changed[name] = value
            else:
                monkeypatch.setattr(plan, name, value)
        forget()

    yield set_to
    monkeypatch.undo()
    forget()


@pytest.fixture
def small(backend, limits):
    """Limits of the planner, and where they can be chosen tiles: small maps take every road."""
    with configurations.using(small_rows(warps=4)):
        limits(**SIZES[backend].limits)
        yield limits


@pytest.fixture
def programs(backend):
    """What the loss has prepared so far, none to begin with."""
    prepared = registered_backends()[backend].prepared
    prepared.clear()
    return prepared


@pytest.fixture
def tf32():
    """fp32 products in TF32; what was set before comes back."""
    torch.set_float32_matmul_precision("high")
    yield
    torch.set_float32_matmul_precision("highest")


@pytest.fixture
def chip_with_tf32(request, backend):
    """Others multiply fp32 as it is, whatever was asked for."""
    if torch.cuda.is_available():
        has_it = torch.cuda.get_device_capability() >= (8, 0)
    else:
        architecture, _ = HOST_BUILDS[request.config.getoption("--host-cuda")]
        has_it = backend != "cuda" or architecture >= 80
    if not has_it:
        pytest.skip("needs a chip with TF32")
