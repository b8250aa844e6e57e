"""``python -m fsp_kernels`` reports what is installed and what works, e.g. for a bug report."""

from __future__ import annotations

import argparse
import json
import platform

import torch

from fsp_kernels._machine import cores, cpu_model, installed
from fsp_kernels._version import __version__
from fsp_kernels.backends import registered_backends, requested_backend
from fsp_kernels.backends.compiled import compiled_module


def environment() -> dict[str, str]:
    """Versions, devices and backends, by name; the most useful come first."""
    report = {
        "fsp_kernels": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "torch": torch.__version__,
        "triton": installed("triton"),
        "cuda extension": _cuda_extension(),
        "cpu extension": _cpu_extension(),
        "cpu": f"{cpu_model()}, {cores()} cores, {torch.get_num_threads()} threads",
        "cpu capability": torch.backends.cpu.get_cpu_capability(),
        "blas": "MKL" if torch.backends.mkl.is_available() else "not MKL",
        "float32 matmul precision": torch.get_float32_matmul_precision(),
        "cuda": torch.version.cuda or "torch is built without it",
    }
    for i in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(i)
        memory = properties.total_memory / 2**30
        report[f"cuda:{i}"] = (
            f"{properties.name}, sm_{properties.major}{properties.minor}, {memory:.0f} GiB"
        )
    for name, backend in registered_backends().items():
        reason = backend.why_unavailable()
        report[f"backend {name}"] = "works" if reason is None else f"not available: {reason}"
    report["backend requested"] = requested_backend(None) or "none: the best that works"
    return report


def _cuda_extension() -> str:
    """The chips that it has machine code for, or why it is missing."""
    found = compiled_module("cuda")
    if isinstance(found, str):
        return found.removeprefix("its extension ")
    return f"built for {found.architectures}"


def _cpu_extension() -> str:
    """The instruction sets that it has for this processor, best first, or why it is missing."""
    found = compiled_module("cpu")
    if isinstance(found, str):
        return found.removeprefix("its extension ")
    sets = ", ".join(found.instruction_sets)
    return f"has {sets} for this processor" if sets else "has no kernels that this processor runs"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m fsp_kernels",
        description="Report what is installed and which backends work on this machine.",
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    report = environment()
    if parser.parse_args(arguments).json:
        print(json.dumps(report, indent=2))
        return
    width = max(map(len, report))
    for key, value in report.items():
        print(f"{key:<{width}}  {value}")


if __name__ == "__main__":
    main()
