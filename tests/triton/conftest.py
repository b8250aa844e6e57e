"""Kernels run on a GPU where there is one, else in Triton's interpreter."""

import dataclasses

import pytest
import torch
import triton.runtime.interpreter as interpreter

from fsp_kernels import functional, plan
from fsp_kernels.backends.triton import configurations, loss, product


def pytest_collection_modifyitems(items):
    # The hook gets the items of all folders, and `pytest -m gpu` should select these too.
    quiet = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")
    for item in items:
        if item.path.parent.name == "triton":
            item.add_marker(pytest.mark.gpu if torch.cuda.is_available() else quiet)


@pytest.fixture(scope="session", autouse=True)
def _quick_interpreter():
    """Twice the speed: what Triton's interpreter does again in every call of a function.

    It patches ``triton.language`` as the function's module sees it, which one call in each launch
    is enough for, and checks every sum of integers for an overflow.
    """
    with pytest.MonkeyPatch.context() as patch:
        if not torch.cuda.is_available():
            _patch_once_a_launch(patch)
        yield


def _patch_once_a_launch(patch):
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

    patch.setattr(interpreter, "_patch_lang", launch)
    patch.setattr(interpreter.InterpretedFunction, "__call__", call)
    builder = interpreter.interpreter_builder
    options = dataclasses.replace(builder.options, sanitize_overflow=False)
    patch.setattr(builder, "options", options)


def forget():
    """Drop what was prepared under other limits."""
    for cached in (
        plan.plan_loss,
        functional._checked_plan,
        configurations.configuration_of,
        product._prepared,
    ):
        cached.cache_clear()
    loss._PROGRAMS.clear()


@pytest.fixture
def limits(monkeypatch):
    """Sets the planner's limits, ``limits(GPU_PROGRAMS=1)``."""

    def set_to(**constants):
        for name, value in constants.items():
            monkeypatch.setattr(plan, name, value)
            if hasattr(product, name):
                monkeypatch.setattr(product, name, value)
        forget()

    yield set_to
    monkeypatch.undo()
    forget()


@pytest.fixture
def small(limits):
    """Kernels with tiles of 16 and the planner's limits to match: small maps take every road."""
    tile = configurations.Configuration(16, 16, 16, warps=4, stages=2)
    rows = [row._replace(configuration=tile) for row in configurations.rows()]
    with configurations.using(rows):
        limits(
            GPU_TILE_CHANNELS=16,
            GPU_TILE_CHANNELS_FP32=16,
            GPU_GRAM_POSITIONS=4,
            GPU_PART_POSITIONS=20,
        )
        yield limits


@pytest.fixture
def programs():
    """What the loss has prepared so far, none to begin with."""
    loss._PROGRAMS.clear()
    return loss._PROGRAMS


@pytest.fixture
def tf32():
    """fp32 products in TF32; what was set before comes back."""
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    yield
    torch.backends.cuda.matmul.fp32_precision = before
