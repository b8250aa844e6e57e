"""In which order things are listed, and which colour a contender has in every figure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from benchmarks import contenders, workloads

PARTS = ("loss", "step", "scaling", "plan", "accuracy")
DTYPES = ("fp32", "tf32", "bf16", "fp16")
LAYOUTS = ("nchw", "tokens", "channels_last")
DIRECTIONS = ("forward+backward", "forward")
AXES = ("batch", "channels", "size")

# Ours are warm, the peers cool; tell-apart colours also for the colour-blind (after Paul Tol).
COLOURS = {
    "ours (triton)": "#ee7733",
    "ours (cuda)": "#cc3311",
    "ours (torch)": "#aa3377",
    "ours (torch), matrix form": "#ee99aa",
    "ours (torch), gram form": "#882255",
    "einsum": "#0077bb",
    "bmm": "#33bbee",
    "broadcast": "#999999",
    "torch.compile": "#117733",
}
# For what has no colour of its own, as the evaluations a plan chooses among.
SPARE_COLOURS = ("#ddaa33", "#332288", "#44aa99", "#aa4499", "#000000", "#88ccee", "#999933")


def in_order(found: Iterable[str], table: Sequence[str]) -> list[str]:
    """Each name once: the table's in its order, then the others as they come."""
    names = list(dict.fromkeys(found))
    known = [name for name in table if name in names]
    return known + [name for name in names if name not in table]


def contenders_in_order(found: Iterable[str]) -> list[str]:
    """Ours first, the one that users get by default before the others."""
    names = in_order(found, tuple(contenders.BY_NAME))
    return sorted(names, key=lambda name: not name.startswith("ours"))


def workloads_in_order(found: Iterable[str]) -> list[str]:
    """As ``workloads.py`` lists them."""
    return in_order(found, tuple(workloads.BY_NAME))


def colours(names: Sequence[str]) -> dict[str, str]:
    """A colour for each name, its own where it has one."""
    others = [name for name in names if name not in COLOURS]
    spare = {name: SPARE_COLOURS[i % len(SPARE_COLOURS)] for i, name in enumerate(others)}
    return {name: COLOURS.get(name) or spare[name] for name in names}
