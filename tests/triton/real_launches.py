"""What Triton's own launcher hands a driver, by its own path and by that of ``launch.py``.

    python real_launches.py libcuda.so.1

runs in a process of its own: the given stub is its driver, and Triton does not interpret. Every
kernel of the backend is launched by calls of the library, on tensors that nobody reads or writes.
Prints JSON: by kernel, by alignment, by path, what arrived.
"""

from __future__ import annotations

import ctypes
import json
import sys
from typing import Any

import torch
import triton
from calls import ROADS, SIZES, four_of, pair_of, small_rows, tensor
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.driver import CudaLauncher, CudaUtils

import fsp_kernels as fsp
from fsp_kernels import plan
from fsp_kernels.backends.triton import TritonBackend, configurations
from fsp_kernels.backends.triton.launch import Launch

STREAM = 77
BYTES = {"i1": 1, "i32": 4, "i64": 8, "fp32": 4}  # of parameters that are no pointers


class Driver:
    """What a launch asks of the driver in force: a GPU and a stream; the launcher is Triton's."""

    launcher_cls = CudaLauncher

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:  # noqa: ARG002
        return STREAM

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


class Stub:
    """The notes that the stub takes of the last launch."""

    def __init__(self, path: str):
        self._library = ctypes.CDLL(path, mode=ctypes.RTLD_GLOBAL)

    def expect(self, sizes: list[int]) -> None:
        """Say how many bytes each parameter of the launches to come has."""
        self._count = len(sizes)
        self._of(ctypes.c_int, "count").value = self._count
        self._of(ctypes.c_int * self._count, "sizes")[:] = sizes

    def last(self) -> dict[str, Any]:
        return {
            "grid": list(self._of(ctypes.c_uint * 3, "grid")),
            "block": list(self._of(ctypes.c_uint * 3, "block")),
            "shared": self._of(ctypes.c_uint, "shared").value,
            "stream": self._of(ctypes.c_ulonglong, "stream").value,
            "function": self._of(ctypes.c_ulonglong, "function").value,
            "parameters": list(self._of(ctypes.c_ulonglong * self._count, "parameters")),
            "launches": self._of(ctypes.c_int, "launches").value,
        }

    def _of(self, kind: Any, name: str) -> Any:
        return kind.in_dll(self._library, f"stub_{name}")


def compare(stub: Stub, launch: Launch, tensors, scalars, unaligned: bool) -> dict[str, Any]:
    """What arrives of one launch by Triton's path, and by the bound one."""
    stub.expect([])
    compiled = launch.start(launch.arrange(other(tensors, unaligned)), *scalars)
    stub.expect(sizes_of(tuple(compiled.src.signature.values())))
    bound(launch, STREAM, other(tensors, unaligned), *scalars)  # is remembered

    tensors, scalars = other(tensors, unaligned), other(scalars, unaligned)
    launch.start(launch.arrange(tensors), *scalars)
    by_triton = stub.last()
    bound(launch, STREAM, tensors, *scalars)
    by_us = stub.last()
    by_triton["launches"] += 1
    return {"by triton": by_triton, "bound": by_us, "ttir": compiled.asm["ttir"]}


bound = Launch.__call__


def other(values: Any, unaligned: bool, count: list | None = None) -> Any:
    """Other tensors and numbers.

    ``unaligned`` has every second tensor, from the first on, begin off a multiple of 16 bytes.
    """
    count = [] if count is None else count
    if isinstance(values, (list, tuple)):
        return tuple(other(x, unaligned, count) for x in values)
    if isinstance(values, float):
        return values / 3
    count.append(values)
    return values.new_empty(values.numel() + 1)[unaligned and len(count) % 2 :]


def sizes_of(signature: Any) -> list[int]:
    """Bytes of each parameter of a kernel."""
    if isinstance(signature, tuple):
        return [size for part in signature for size in sizes_of(part)]
    if signature == "constexpr":
        return []
    return [8 if signature.startswith("*") else BYTES[signature]]


def call_every_kernel() -> None:
    """With tiles as small as there are, which compile in no time."""
    for name, value in SIZES["triton"].limits.items():
        setattr(plan, name, value)
    with configurations.using(small_rows(warps=2)), fsp.use_backend("triton"):
        for road in ROADS:
            weights = [0.3, 0.7] if road == "one pass" else [0.3]
            calls = [four_of(SIZES["triton"].regimes[road], batch=3) for _ in weights]
            student = [student for (student,), _ in calls]
            teacher = [[x.detach() for x in teacher] for _, (teacher,) in calls]
            loss = fsp.fsp_loss(student, teacher, weights=weights)
            torch.autograd.grad(loss, student[0])
        regime = SIZES["triton"].regimes["tiles"]
        fsp.fsp_loss([pair_of(regime)], [tensor(1, *regime.channels)])
        fsp.fsp_matrix(torch.empty(3, 20, 3, 3), torch.empty(3, 17, 3, 3))


def main(path: str) -> None:
    stub = Stub(path)
    driver = Driver()
    triton.runtime.driver.set_active(driver)
    driver.utils = CudaUtils()
    found: dict[str, Any] = {}

    def launch_both_ways(self, stream, tensors, *scalars):  # noqa: ARG001
        if self.kernel.__name__ not in found:
            found[self.kernel.__name__] = {
                alignment: compare(stub, self, tensors, scalars, alignment == "unaligned")
                for alignment in ("aligned", "unaligned")
            }

    Launch.__call__ = launch_both_ways
    TritonBackend.why_unavailable = lambda self: None  # noqa: ARG005
    TritonBackend.why_unsupported = lambda self, device, dtypes: None  # noqa: ARG005
    call_every_kernel()
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1])
