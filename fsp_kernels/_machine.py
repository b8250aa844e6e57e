"""The machine a program runs on: versions and processor, never names; and its terminal."""

from __future__ import annotations

import io
import os
import platform
import re
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


def installed(package: str) -> str:
    """A package's version."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


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


def prepare_terminal() -> None:
    """For the start of a command: neither a terminal nor a notebook it is started from can end it.

    What the terminal can't show, a character or an undecodable path, is escaped. Figures go to
    files, so the backend that Jupyter names for its own screen, and that need not be installed
    here, doesn't count.
    """
    os.environ["MPLBACKEND"] = "agg"
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
