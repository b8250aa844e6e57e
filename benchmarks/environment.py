"""The machine and the versions that results were measured with, never the host's name."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

import torch

import fsp_kernels
from benchmarks import memory
from fsp_kernels._machine import cores, cpu_model, installed
from fsp_kernels.backends.compiled import compiled_module

ROOT = Path(__file__).resolve().parents[1]
# Names of nvidia-smi's facts, and ours.
NVIDIA_SMI = {
    "driver_version": "driver",
    "clocks.sm": "sm_clock_after_the_run",
    "clocks.max.sm": "sm_clock_at_most",
    "clocks.mem": "memory_clock_after_the_run",
    "power.limit": "power_limit",
}


def blas() -> str:
    """The BLAS torch was built with, and MKL's version where it is MKL."""
    config = torch.__config__.show()
    name = re.search(r"BLAS_INFO=(\w+)", config)
    version = re.search(r"Math Kernel Library Version (\S+)", config)
    return " ".join(x[1] for x in (name, version) if x) or "unknown"


def cpu_kernels() -> str:
    """The instruction set that our kernels use on this processor, or why there are none."""
    found = compiled_module("cpu")
    return found if isinstance(found, str) else next(iter(found.instruction_sets), "none")


def output_of(*command: str) -> str:
    """The output of a command; empty where it is missing or fails."""
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    except OSError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def nvidia_smi() -> dict[str, str]:
    """Driver, clocks and power limit of the first GPU, as far as nvidia-smi tells them."""
    query = f"--query-gpu={','.join(NVIDIA_SMI)}"
    lines = output_of("nvidia-smi", query, "--format=csv,noheader").splitlines()
    values = [value.strip() for value in lines[0].split(",")] if lines else []
    return dict(zip(NVIDIA_SMI.values(), values, strict=False))


def gpu() -> dict[str, Any]:
    """The GPU, its driver and the versions for it."""
    properties = torch.cuda.get_device_properties()
    return {
        "gpu": properties.name,
        "compute_capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "gpu_memory": f"{properties.total_memory / 2**30:.0f} GiB",
        "l2": f"{getattr(properties, 'L2_cache_size', 0) / 2**20:.0f} MiB",
        "cuda": torch.version.cuda,
        "triton": installed("triton"),
        **nvidia_smi(),
    }


def machine(device: str = "cpu") -> dict[str, Any]:
    """Hardware, versions and settings that change times on a device."""
    return {
        **({} if device == "cpu" else gpu()),
        "cpu": cpu_model(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cpu_kernels": cpu_kernels(),
        "cores": cores(),
        "system": platform.system(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "fsp_kernels": fsp_kernels.__version__,
        "threads": torch.get_num_threads(),
        "peak_memory_by": "torch.cuda" if device == "cuda" else memory.method(),
        "blas": blas(),
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
    }


def load() -> float:
    """Processes that wanted a core in the last minute; 0 where the system doesn't tell."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0


def commit() -> str:
    """The commit that is measured, and whether the code differs from it, results aside."""
    changed = output_of("git", "status", "--porcelain", "--", ".", ":!benchmarks/results")
    state = " with uncommitted changes" if changed else ""
    return (output_of("git", "rev-parse", "HEAD") or "none") + state


def device_slug(device: str = "cpu") -> str:
    """A folder name for results, as ``cpu-amd-epyc-2-cores`` or ``gpu-nvidia-h100-80gb-hbm3``."""
    words = re.sub(r"\((R|TM)\)|@.*", "", cpu_model(), flags=re.IGNORECASE)
    cpu = f"cpu {words} {cores()} cores"
    name = cpu if device == "cpu" else f"gpu {torch.cuda.get_device_name()}"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
