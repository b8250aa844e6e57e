"""The compiled modules ``fsp_kernels._cuda`` and ``fsp_kernels._cpu``, or why they are missing."""

from __future__ import annotations

import importlib
from functools import lru_cache
from pathlib import Path
from types import ModuleType

HOW_TO_BUILD = {
    "cuda": "`pip install .` builds it if it finds nvcc 12.0 or newer",
    "cpu": "`pip install .` builds it if it finds GCC or Clang with OpenMP",
}
# If setup.py does not build a module, it writes <name>_build.txt in this folder. It says why.
NOTES = Path(__file__).parents[1]


@lru_cache
def compiled_module(name: str) -> ModuleType | str:
    """The module ``fsp_kernels._<name>``, or a clause that says why it is missing."""
    try:
        return importlib.import_module(f"fsp_kernels._{name}")
    except ModuleNotFoundError:
        note = NOTES / f"{name}_build.txt"
        why = note.read_text().strip() if note.exists() else HOW_TO_BUILD[name]
        return f"its extension is not built: {why}"
    except ImportError as error:
        return f"its extension cannot be loaded: {error}"
