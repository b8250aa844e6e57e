"""How time and memory grow with the batch, the channels and the size of the maps."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from benchmarks.report.layout import Column, Section, Table, not_measured, tabulate
from benchmarks.report.names import AXES, DIRECTIONS, DTYPES, contenders_in_order, in_order
from benchmarks.report.runs import Contest, Part, Result
from benchmarks.tables import MIB, digits

LEGEND = (
    "One of batch, channels and side of the map is varied, the rest stays. The last column is the "
    "order of growth: the slope of log time (or memory) over log value, by least squares over the "
    "upper half of the values. 1 is proportional, 2 quadratic; between small values fixed costs "
    "hide it. torch.compile would be compiled for every shape and broadcast has no room: both take "
    "part where they are named."
)


@dataclass(frozen=True)
class Sweep:
    """Contests that differ in the value of one axis, by that value."""

    axis: str
    dtype: str
    layout: str
    direction: str
    contests: Mapping[int, Contest]

    @property
    def title(self) -> str:
        return f"{self.axis}, {self.dtype}, {self.layout}, {self.direction.replace('+', ' + ')}"

    @property
    def names(self) -> list[str]:
        """Who has a result anywhere."""
        contests = self.contests.values()
        return contenders_in_order(name for contest in contests for name in contest.results)

    def curve(self, name: str, amount: Callable[[Result], float | None]) -> dict[int, float]:
        """A contender's amount by value, where it is known and a logarithm can be taken of it."""
        found = {
            value: amount(contest.results[name])
            for value, contest in self.contests.items()
            if name in contest.results
        }
        return {value: y for value, y in found.items() if y}


def seconds(result: Result) -> float:
    return result.time.median


def mebibytes(result: Result) -> float | None:
    return None if result.peak is None else result.peak / MIB


def growth(curve: Mapping[int, float]) -> float | None:
    """Least-squares slope of log y over log x of the upper half of the values, at least two."""
    upper = sorted(curve)[len(curve) // 2 :] if len(curve) > 2 else sorted(curve)
    if len(upper) < 2:
        return None
    x = [math.log(value) for value in upper]
    y = [math.log(curve[value]) for value in upper]
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    covariance = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    return covariance / sum((a - mean_x) ** 2 for a in x)


def sweeps(part: Part) -> list[Sweep]:
    """Every axis, in each dtype, layout and direction."""
    found: dict[tuple[str, str, str, str], dict[int, Contest]] = {}
    for contest in sorted(part.contests, key=lambda contest: contest.key["value"]):
        key = contest.key
        group = key["axis"], key["dtype"], key["layout"], key["direction"]
        found.setdefault(group, {})[key["value"]] = contest
    tables = (AXES, DTYPES, (), DIRECTIONS)
    columns = list(zip(*found, strict=True))
    orders = [in_order(*pair) for pair in zip(columns, tables, strict=True)] if found else []
    groups = sorted(found, key=lambda key: [o.index(k) for o, k in zip(orders, key, strict=True)])
    return [Sweep(*group, contests=found[group]) for group in groups]


def order(slope: float | None) -> str:
    """A growth as printed."""
    return "-" if slope is None else f"{slope:.2f}"


def table(sweep: Sweep, what: str, amount: Callable[[Result], float | None], unit: float) -> Table:
    """A line for each contender, a column for each value, growth last."""
    curves = {name: sweep.curve(name, amount) for name in sweep.names}

    def at(value: int) -> Column[str]:
        def cell(name: str) -> str:
            found = curves[name].get(value)
            return "-" if found is None else digits(found * unit)

        return Column(f"{value}", cell)

    columns: Sequence[Column[str]] = [
        Column(sweep.axis, lambda name: name),
        *map(at, sweep.contests),
        Column("growth", lambda name: order(growth(curves[name]))),
    ]
    return tabulate(f"{what} over {sweep.title}", columns, sweep.names)


def place(contest: Contest) -> str:
    return f"{contest.key['axis']} {contest.key['value']}"


def sections(part: Part) -> list[Section]:
    """Times and memory of each axis, below each other."""
    tables = [
        table(sweep, what, amount, unit)
        for sweep in sweeps(part)
        for what, amount, unit in (
            ("time in ms", seconds, 1e3),
            ("peak extra memory in MiB", mebibytes, 1),
        )
    ]
    title = f"Scaling on {part.device_name}"
    return [Section(title, LEGEND, tables, not_measured(part.contests, place))]
