"""The interpreters of a machine, and virtual environments made from them."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

VERSIONS = ("3.10", "3.11", "3.12", "3.13", "3.14")  # that the package supports
# Where pyenv and uv keep interpreters that may not be on PATH.
_MANAGED = (".pyenv/versions/{}.*/bin/python", ".local/share/uv/python/cpython-{}.*/bin/python")


def find(python: str) -> str | None:
    """The path of an interpreter, by its version such as 3.12, or by its name or path."""
    return next(filter(_runs, _places(python)), None)


def make_environment(python: str, folder: Path) -> str:
    """Make a virtual environment that has pip alone. Returns its interpreter."""
    subprocess.run([python, "-m", "venv", folder], check=True)
    return str(folder / "bin" / "python")


def _places(python: str) -> Iterator[str]:
    if not re.fullmatch(r"3\.\d+", python):
        return iter(filter(None, [shutil.which(python)]))
    managed = (sorted(Path.home().glob(x.format(python))) for x in _MANAGED)
    named = filter(None, [shutil.which(f"python{python}")])
    return chain(named, map(str, chain.from_iterable(managed)))


def _runs(path: str) -> bool:
    """Whether it is an interpreter. The shims of pyenv fail for versions that are not chosen."""
    return subprocess.run([path, "-c", ""], capture_output=True).returncode == 0
