"""What the backend says of a Triton that cannot compile, in a process of its own.

Over the stub of libcuda; prints JSON, by what is missing. A cache that is empty has to be given in
TRITON_CACHE_DIR.
"""

import json
import os
from unittest import mock

import torch
from triton.runtime import build

from fsp_kernels.backends.triton import _why_it_cannot_compile


def why(**environment: str) -> str | None:
    """Asked with such variables in the environment."""
    if hasattr(build, "_find_compiler"):
        build._find_compiler.cache_clear()
    with mock.patch.dict(os.environ, environment):
        return _why_it_cannot_compile()


torch.cuda.is_available = lambda: True  # what Triton takes its driver by
os.environ.pop("CC", None)
found = {
    "a compiler": why(PATH="/nowhere"),
    "Python.h": why(CC="false"),
    "a cache": why(TRITON_CACHE_DIR=os.path.join(__file__, "cache")),
    "nothing": why(),
    "a cache that can be written": why(TRITON_CACHE_DIR=os.path.join(__file__, "cache")),
}
print(json.dumps(found))
