"""What a reader needs to judge a number: the machine and the versions. Never the host's name."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]


def cpu_model() -> str:
    """The processor's marketing name, where the system tells it."""
    try:
        cpuinfo = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine()
    found = re.search(r"^model name\s*:\s*(.+)$", cpuinfo, re.MULTILINE)
    return found[1].strip() if found else platform.machine()


def cores() -> int:
    """Logical cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def blas() -> str:
    """The BLAS torch was built with, and MKL's version where it is MKL."""
    config = torch.__config__.show()
    name = re.search(r"BLAS_INFO=(\w+)", config)
    version = re.search(r"Math Kernel Library Version (\S+)", config)
    return " ".join(x[1] for x in (name, version) if x) or "unknown"


def machine() -> dict[str, Any]:
    """Hardware, versions and settings that move a CPU timing."""
    return {
        "cpu": cpu_model(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cores": cores(),
        "system": platform.system(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "fsp_kernels": version("fsp-kernels"),
        "threads": torch.get_num_threads(),
        "blas": blas(),
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
    }


def load() -> float:
    """Processes that wanted a core in the last minute; 0 where the system doesn't tell."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0


def git(*arguments: str) -> str:
    """One line git prints about this checkout, empty where there is none."""
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
    except OSError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def commit() -> dict[str, Any]:
    """The commit measured, and whether the code differs from it (results themselves aside)."""
    changed = git("status", "--porcelain", "--", ".", ":!benchmarks/results")
    return {"id": git("rev-parse", "HEAD") or "none", "dirty": bool(changed)}


def device_slug() -> str:
    """A folder name for results of this device, as ``cpu-amd-epyc-2-cores``."""
    words = re.sub(r"\((R|TM)\)|@.*", "", cpu_model(), flags=re.IGNORECASE)
    return re.sub(r"[^a-z0-9]+", "-", f"cpu {words} {cores()} cores".lower()).strip("-")
