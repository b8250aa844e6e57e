"""The Triton backend, for NVIDIA GPUs from Ampere on. All pairs of a call share a few launches.

    maps.py            read a tile of a map and pool it; write its gradient
    arithmetic.py      products on tensor cores
    residual.py        the residual and its norms
    one_pass.py        the loss, one program for each sample
    tiles.py           the loss with the residual stored in tiles
    gram.py            the loss in Gram form, with stored blocks
    product.py         FSP matrices and their derivatives
    elementwise.py     the sum of the partial losses; the scaling in backward
    loss.py            prepare and run the launches of a plan
    limits.py          what the configurations allow for a pair, for the planner
    entries.py         kernel arguments from a planned pair and its strides
    launch.py          launch a kernel at the cost of a C call
    configurations.py  tiles, warps and stages, by kernel, precision and chip

These modules are imported when they are first used, so ``import fsp_kernels`` needs no Triton.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from torch import Tensor

from fsp_kernels.backends.devices import cached_constant, on_device, why_no_gpu
from fsp_kernels.backends.fused import FusedBackend, PreparedLoss
from fsp_kernels.loss_plan import Limits, LossPlan, MapPlan

OLDEST_CAPABILITY = (8, 0)
OLDEST_TRITON = (3, 6)


class TritonBackend(FusedBackend):
    """See :class:`fsp_kernels.backends.Backend` for what each method promises."""

    name = "triton"
    # Triton lays out the operands of a product for the narrowest element that they are computed
    # from. For masks of bytes, tensor cores' loads of whole matrices could not read them.
    mask_dtype = torch.int32
    on_cpu = "TRITON_INTERPRET=1 is set, so its kernels run only on the CPU"

    @property
    def automatic(self) -> bool:
        return not _interpreting()

    def why_unavailable(self) -> str | None:
        return _why_unavailable(_interpreting())

    def why_not_on(self, device: torch.device) -> str | None:
        return _why_too_old(device)

    def limits(
        self,
        device: torch.device,
        student: Sequence[MapPlan],
        teacher: Sequence[MapPlan],
        precision: str,
    ) -> Limits:
        from fsp_kernels.backends.triton.launch import device_family
        from fsp_kernels.backends.triton.limits import limits_of

        return limits_of(student, teacher, precision, device_family(device))

    def product(self, x: Tensor, y: Tensor, out: Tensor, positions: int) -> None:
        from fsp_kernels.backends.triton.product import batched_product

        on_device(x, batched_product, x, y, out, float(positions))

    def prepare(self, plan: LossPlan, tensors: Sequence[Tensor]) -> PreparedLoss:
        from fsp_kernels.backends.triton import loss

        return loss.PreparedLoss(plan, tensors)

    @cached_property
    def scale_into(self) -> Callable[..., None]:
        from fsp_kernels.backends.triton.elementwise import scale_into

        return scale_into


def _interpreting() -> bool:
    """Whether kernels run in Triton's interpreter on the CPU, for tests and debugging."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


@cached_constant
def _why_unavailable(interpreting: bool) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    if interpreting:
        return why_not_this_triton()
    missing = why_no_gpu(lambda index: _why_too_old(torch.device("cuda", index)))
    return missing or why_not_this_triton() or _why_it_cannot_compile()


@cached_constant
def why_not_this_triton() -> str | None:
    """``None`` if the kernels run with the Triton that is installed, else why not."""
    try:
        installed = _version()
    except ImportError:
        return "the package triton is not installed"
    if tuple(map(int, installed.split(".")[:2])) >= OLDEST_TRITON:
        return None
    return (
        f"its kernels need triton {OLDEST_TRITON[0]}.{OLDEST_TRITON[1]} or newer, which PyTorch "
        f"2.10 and newer come with; {installed} is installed"
    )


def _why_it_cannot_compile() -> str | None:
    """``None`` if Triton can compile its launchers and write its cache, else why not."""
    try:
        _compile_as_triton_does()
    except subprocess.CalledProcessError as error:
        return (
            f"Triton cannot compile its launcher: {error.cmd[0]} failed, perhaps because "
            "Python's headers (Python.h) are missing; its output says why"
        )
    except Exception as error:  # an error of any kind is the reason
        return f"Triton cannot compile its launcher: {' '.join(str(error).split())}"
    return None


def _compile_as_triton_does() -> None:
    """Use a compiler and the cache as Triton's first launch does; raises what that would raise."""
    from triton.backends.nvidia import driver as nvidia
    from triton.runtime import build, driver
    from triton.runtime.cache import get_cache_manager

    driver.active.utils  # noqa: B018  (a C module, compiled when it is first used)
    key = hashlib.sha256(b"fsp_kernels").hexdigest()
    get_cache_manager(key).put("", "the cache can be written", binary=False)
    if hasattr(nvidia, "make_launcher"):  # up to Triton 3.6 a launcher in C is compiled per kernel
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder, "launcher.c")
            source.write_text("#include <Python.h>\n")
            build._build("launcher", str(source), folder, [], [], [], [])


def _version() -> str:
    """Triton's version, without importing it if possible. Raises ImportError if it is missing."""
    try:
        return version("triton")
    except PackageNotFoundError:  # it may come with another name, as that of PyTorch's nightlies
        import triton

        if not hasattr(triton, "__version__"):  # a folder of this name, as in a checkout of Triton
            raise ImportError from None
        return str(triton.__version__)


@cached_constant
def _why_too_old(device: torch.device) -> str | None:
    capability = torch.cuda.get_device_capability(device)
    if capability >= OLDEST_CAPABILITY:
        return None
    return (
        f"its kernels need compute capability {OLDEST_CAPABILITY[0]}.{OLDEST_CAPABILITY[1]} "
        f"(Ampere) or newer, {device} has {capability[0]}.{capability[1]}"
    )
