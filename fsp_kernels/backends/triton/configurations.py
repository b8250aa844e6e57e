"""The tiles, warps and stages of each kernel, from a table. Nothing is tuned at the first call.

The table is ``configurations.json``. ``tools/tune.py`` rewrites it on a GPU. Each row names the
chip that it was measured on. ``null`` means not measured: it was chosen because the kernel compiles
for this family without spilling registers.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

TABLE = Path(__file__).with_name("configurations.json")

# Families of chips and the oldest compute capability of each. They differ in shared memory (163 KB
# on sm_80, 99 on sm_86, 89 and 120, 227 on sm_90 and 100) and in their tensor core instructions.
FAMILIES = {"sm_80": 80, "sm_89": 86, "sm_90": 90, "sm_100": 100, "sm_120": 120}
KERNELS = ("one_pass", "gram", "residual", "gradients", "product")
# Kinds of products: of half-precision maps; of fp32 as one TF32 product; of fp32 as three.
KINDS = ("half", "tf32", "tf32x3")
# How maps are read, from fastest to slowest. "aligned": rows can be copied in units of 4 bytes or
# more. "odd": they cannot, e.g. rows of 49 halves, so elements are read one by one; or a mask takes
# elements out of rows, which needs as many registers. "scattered": pooled while reading, or by more
# than one stride, which takes the most registers. For "product", "aligned" means that strides are
# multiples of 16 bytes.
ACCESSES = ("aligned", "odd", "scattered")


class Configuration(NamedTuple):
    """Block sizes, warps and stages of a kernel.

    ``block_m`` and ``block_n`` are channels of the first and the second map, ``block_k`` positions.
    For "gram", ``block_m`` is a block of channels of either map. For "gradients", ``block_m`` are
    channels of the gradient's own map and ``block_n`` of the other map. For "product", the blocks
    are rows, columns and summed elements.
    """

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int


class Row(NamedTuple):
    """One configuration. It is for sizes up to ``limit``, or for all sizes if that is 0.

    The size is the number of positions for "gram" and the larger channel count for other kernels.
    """

    family: str
    kernel: str
    kind: str
    access: str
    limit: int
    configuration: Configuration
    measured: str | None


_replacement: tuple[Row, ...] | None = None


def rows() -> tuple[Row, ...]:
    """The whole table."""
    return _read() if _replacement is None else _replacement


@contextmanager
def using(table: Sequence[Row]) -> Iterator[None]:
    """Use another table in a ``with`` block, e.g. of candidates to compile or time."""
    global _replacement
    previous, _replacement = _replacement, tuple(table)
    configuration_of.cache_clear()
    try:
        yield
    finally:
        _replacement = previous
        configuration_of.cache_clear()


def replaced(table: Sequence[Row], row: Row, other: Row) -> list[Row]:
    """The table with ``other`` in place of ``row``."""
    return [other if r == row else r for r in table]


@lru_cache(maxsize=1)
def _read() -> tuple[Row, ...]:
    return read(TABLE)


def read(path: Path) -> tuple[Row, ...]:
    """Read a table from a file."""
    return tuple(
        Row(
            row["family"],
            row["kernel"],
            row["kind"],
            row["access"],
            row["limit"],
            Configuration._make([*row["blocks"], row["warps"], row["stages"]]),
            row["measured"],
        )
        for row in json.loads(path.read_text())
    )


def write(table: Sequence[Row], path: Path | None = None) -> None:
    """Write a table to a file, the package's own by default, one line for each row.

    The file is replaced as a whole. If the process is killed meanwhile, the old table stays.
    """
    path = path or TABLE
    lines = []
    for row in sorted(table, key=_sort_key):
        c = row.configuration
        fields = {
            "family": row.family,
            "kernel": row.kernel,
            "kind": row.kind,
            "access": row.access,
            "limit": row.limit,
            "blocks": [c.block_m, c.block_n, c.block_k],
            "warps": c.warps,
            "stages": c.stages,
            "measured": row.measured,
        }
        lines.append(json.dumps(fields))
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        unfinished.write_text("[\n" + ",\n".join(lines) + "\n]\n")
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
    _read.cache_clear()
    configuration_of.cache_clear()


def _sort_key(row: Row) -> tuple[int, ...]:
    return (
        list(FAMILIES).index(row.family),
        KERNELS.index(row.kernel),
        KINDS.index(row.kind),
        ACCESSES.index(row.access),
        row.limit,
    )


@lru_cache(maxsize=1024)
def configuration_of(
    kernel: str, kind: str, family: str, access: str, size: int = 0
) -> Configuration | None:
    """The configuration of the first row that is for ``size``; ``None`` if there is none.

    A family has no row for what does not fit its registers.
    """
    fitting = (r for r in rows_of(kernel, kind, family, access) if not 0 < r.limit < size)
    row = next(fitting, None)
    return None if row is None else row.configuration


def rows_of(kernel: str, kind: str, family: str, access: str) -> list[Row]:
    """The rows that :func:`configuration_of` chooses among, by ascending limit."""
    wanted = (family, kernel, kind, access)
    found = [r for r in rows() if (r.family, r.kernel, r.kind, r.access) == wanted]
    return sorted(found, key=lambda row: row.limit or math.inf)


def family_of(capability: int) -> str:
    """The family of a chip of this compute capability, at least 80 (89 stands for 8.9)."""
    return [name for name, oldest in FAMILIES.items() if oldest <= capability][-1]
