"""``report.md``, drawn from ``results.csv`` by the template ``report.md.j2``, and comparisons."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import jinja2
import pandas as pd

from benchmarks import figures
from benchmarks.checks import Row
from benchmarks.parts import PARTS
from benchmarks.results import (
    CASE,
    Results,
    curve,
    groups,
    growth,
    names,
    read,
    records,
    with_ratios,
)
from benchmarks.tables import MIB, digits, geometric_mean, markdown_table, times, with_spread

SHORT = 70  # characters of a reason, which may be a compiler's whole error
PLAN_MAY_TAKE = 1.1  # times the fastest evaluation's time, before the plan counts as losing

Line = dict[str, str]  # a line of a table
Tables = list[tuple[str, str]]  # title and Markdown


# --- cells ----------------------------------------------------------------------------------------


def short(reason: str) -> str:
    """A reason on one line, as a cell can hold it."""
    return textwrap.shorten(reason.replace("|", "/"), SHORT, placeholder=" ...")


def milliseconds(row: Row, clock: str = "") -> str:
    """Median and half the interquartile range."""
    median = row[f"{clock}median"]
    return "" if median is None else with_spread(1e3 * median, 1e3 * row[f"{clock}iqr"] / 2)


def mebibytes(size: float | None) -> str:
    return "" if size is None else digits(size / MIB)


def percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.0f}%"


def exponent(error: float | None) -> str:
    return "" if error is None else f"{error:.1e}"


def whole(number: float | None) -> str:
    return "" if number is None else f"{number:.0f}"


def ratio(row: Row) -> str:
    return "" if row["median"] is None else times(row["ratio"])


def not_measured(rows: pd.DataFrame, *columns: str) -> list[str]:
    """A sentence for each contender without a result, or for several with the same reasons."""
    missing = rows[rows["reason"].notna()]
    places: dict[tuple[str, bool], dict[str, None]] = {}
    for row in records(missing):
        where = ", ".join(str(row[column]) for column in columns)
        key = row["contender"], bool(row["fault"])
        places.setdefault(key, {})[f"{where} ({short(row['reason'])})"] = None
    alike: dict[tuple[str, bool], list[str]] = {}
    for (contender, fault), there in places.items():
        alike.setdefault((", ".join(there), fault), []).append(contender)
    return [
        f"{'FAULT: ' * fault}No result of {', '.join(who)}: {where}"
        for (where, fault), who in alike.items()
    ]


# --- the parts ------------------------------------------------------------------------------------


def loss_tables(rows: pd.DataFrame) -> dict[str, Any]:
    """The part ``loss``; tokens have one layout and stand with nchw."""
    rows = rows.assign(layout=rows["layout"].replace("tokens", "nchw"))
    found = list(groups(rows, "dtype", "layout", "pass"))
    details: Tables = []
    for title, group in found:
        details.append((title, markdown_table(loss_details(group))))
        details.append((f"{title}: each over the first of ours", markdown_table(loss_means(group))))
    return {
        "summary": [(title, markdown_table(loss_summary(group))) for title, group in found],
        "details": details,
        "rates": device_rates(rows),
        "notes": not_measured(rows, "workload"),
    }


def loss_summary(rows: pd.DataFrame) -> list[Line]:
    """A line for each workload: ours, and its peers as ratios to it; geometric means last."""
    peers = names(rows[~rows["ours"]], timed=True)
    default = names(rows[rows["is_base"]])[:1]
    lines: list[Line] = []
    fastest: list[float | None] = []
    for workload, case in rows.groupby("workload", sort=False):
        found = {row["contender"]: row for row in records(case)}
        base = next((row for row in found.values() if row["is_base"]), None)
        ratios = {peer: found[peer]["ratio"] if peer in found else None for peer in peers}
        fastest.append(min((x for x in ratios.values() if x is not None), default=None))
        line = {"workload": workload, "B": whole(next(iter(found.values()))["batch"])}
        if base is not None:
            line |= {
                "ours": "" if base["contender"] in default else base["contender"],
                "ours ms": milliseconds(base),
                "of floor": percent(base["of_floor"]),
                "bound by": base["bound_by"],
            }
        line |= {peer: times(x) for peer, x in ratios.items()} | {"fastest": times(fastest[-1])}
        line["ours MiB"] = mebibytes(base["peak_bytes"]) if base else ""
        line["einsum MiB"] = mebibytes(found["einsum"]["peak_bytes"]) if "einsum" in found else ""
        lines.append(line)
    ratios_of = {peer: records(rows[rows["contender"] == peer]) for peer in peers}
    means = {peer: geometric_mean(x["ratio"] for x in found) for peer, found in ratios_of.items()}
    means["fastest"] = geometric_mean(fastest)
    shown = {name: times(mean) for name, mean in means.items() if mean is not None}
    return [*lines, {"workload": "geometric mean"} | shown]


def loss_details(rows: pd.DataFrame) -> list[Line]:
    """A line for each contender of each workload, with all that is known."""
    on_gpu = rows["eager_median"].notna().any()
    return [
        {
            "workload": row["workload"],
            "B": whole(row["batch"]),
            "gradients MiB": mebibytes(row["gradient_bytes"] or None),
            "contender": row["contender"],
            "device ms" if on_gpu else "ms": (
                short(row["reason"])
                if row["reason"] is not None
                else digits(1e3 * row["median"])
                + " (with gaps)" * (row["full_queue"] not in (None, True))
            ),
            "spread": percent_spread(row),
            "eager ms": milliseconds(row, "eager_"),
            "replay ms": milliseconds(row, "replay_") or short(row["no_replay"] or ""),
            "launches": whole(row["launches"]),
            "of floor": percent(row["of_floor"]),
            "bound by": "" if row["of_floor"] is None else row["bound_by"],
            "extra MiB": mebibytes(row["peak_bytes"]),
            "ratio": ratio(row),
            "loss error": exponent(row["loss_error"]),
            "gradient error": exponent(row["gradient_error"]),
        }
        for row in records(rows)
    ]


def percent_spread(row: Row) -> str:
    """Half the interquartile range, of the median."""
    return "" if row["median"] is None else f"±{50 * row['iqr'] / row['median']:.1f}%"


def loss_means(rows: pd.DataFrame) -> list[Line]:
    """Geometric means over the workloads of what each contender takes, over the first of ours."""
    headings = {"time": "ratio", "eager time": "eager_ratio", "replay time": "replay_ratio"}
    lines = []
    for name in names(rows, timed=True):
        found = records(rows[rows["contender"] == name])
        line = {"geometric means": name}
        for heading, column in (headings | {"memory": "memory_ratio"}).items():
            mean = geometric_mean(row[column] for row in found)
            line[heading] = "" if mean is None else times(mean)
        lines.append(line)
    return lines


def device_rates(rows: pd.DataFrame) -> list[str]:
    """The rates of which the floor is made, a sentence for each dtype."""
    sentences = []
    for dtype, group in groups(rows[rows["floor_bytes"].notna()], "dtype"):
        copies = sorted({f"{x / 1e9:.3g}" for x in group["copy_bytes_per_second"]}, key=float)
        span = copies[0] if len(copies) == 1 else f"{copies[0]} to {copies[-1]} GB/s, by size"
        product = group["matrix_flops_per_second"].max() / 1e9
        unit = "" if "GB/s" in span else " GB/s"
        sentences.append(f"{dtype}: copy {span}{unit}; matrix product {product:.4g} Gflop/s")
    return sentences


def step_tables(rows: pd.DataFrame) -> dict[str, Any]:
    """The part ``step``: whole steps, and what they are made of."""
    steps, pieces = [], []
    for title, group in groups(rows, "dtype"):
        found = records(group)
        steps.append((title, markdown_table([step_line(row) for row in found])))
        timed = [row for row in found if row["median"] is not None]
        if timed:
            pieces.append((title, markdown_table([pieces_line(row) for row in timed])))
    return {"steps": steps, "pieces": pieces, "notes": not_measured(rows, "workload")}


PIECES = {
    "teacher forward": "teacher_forward",
    "student forward": "student_forward",
    "FSP loss and its gradients by the maps": "fsp_loss",
    "backward through the network": "student_backward",
    "optimiser": "optimiser",
}


def _step(row: Row) -> Line:
    return {
        "networks": row["workload"],
        "B": whole(row["batch"]),
        "FSP loss": row["contender"],
    }


def step_line(row: Row) -> Line:
    """A whole step."""
    timed = row["median"] is not None
    share = row["fsp_loss"] / sum(row[name] for name in PIECES.values()) if timed else None
    return _step(row) | {
        "step ms": milliseconds(row) if timed else short(row["reason"]),
        "ratio": ratio(row),
        "eager ms": milliseconds(row, "eager_"),
        "replay ms": milliseconds(row, "replay_") or short(row["no_replay"] or ""),
        "launches": whole(row["launches"]),
        "peak MiB": mebibytes(row["peak_bytes"]),
        "FSP share": "" if share is None else f"{100 * share:.1f}%",
    }


def pieces_line(row: Row) -> Line:
    """The pieces of a step in ms."""
    return _step(row) | {name: digits(1e3 * row[piece]) for name, piece in PIECES.items()}


def scaling_tables(rows: pd.DataFrame) -> dict[str, Any]:
    """The part ``scaling``: times and memory over each axis, with the order of growth."""
    tables: Tables = []
    for title, sweep in groups(rows, "axis", "dtype", "layout", "pass"):
        for what, column, unit in (
            ("time in ms", "median", 1e3),
            ("peak extra memory in MiB", "peak_bytes", 1 / MIB),
        ):
            lines = []
            for name in names(sweep, timed=True):
                found = curve(sweep, name, column, unit)
                values = sorted(sweep["value"].unique())
                cells = {f"{x:g}": digits(found[x]) if x in found else "-" for x in values}
                slope = growth(found)
                cells["growth"] = "-" if slope is None else f"{slope:.2f}"
                lines.append({sweep["axis"].iloc[0]: name} | cells)
            if lines:
                tables.append((f"{what} over {title}", markdown_table(lines)))
    return {"tables": tables, "notes": not_measured(rows, "axis", "value")}


def plan_tables(rows: pd.DataFrame) -> dict[str, Any]:
    """The part ``plan``: every evaluation of each shape, and how often the plan is right."""
    tables, lost, measured = [], [], 0
    for title, group in groups(rows, "backend", "dtype", "layout", "pass"):
        evaluations, lines = names(group, timed=True), []
        for shape, case in group.groupby("workload", sort=False):
            found = {row["contender"]: row for row in records(case) if row["median"] is not None}
            excess, loses = verdict(list(found.values()))
            measured += excess is not None
            lost += [shape] * loses
            cells = {
                name: milliseconds(found[name]) + "*" * found[name]["planned"]
                if name in found
                else "-"
                for name in evaluations
            }
            slower = "" if excess == 1 else "not measured"
            if excess is not None and excess > 1:
                slower = f"{100 * (excess - 1):.0f}% slower"
            flag = {"": "PLAN LOSES" if loses else ""}
            lines.append({"shape": shape} | cells | {"planned is": slower} | flag)
        tables.append((title, markdown_table(lines)))
    score = f"The plan loses on {len(lost)} of {measured} shapes"
    score += f": {', '.join(lost)}" if lost else ""
    return {"tables": tables, "notes": [score, *not_measured(rows, "workload")]}


def verdict(timed: Sequence[Row]) -> tuple[float | None, bool]:
    """The planned evaluation's time over the fastest, and whether it loses by more than chance."""
    planned = next((row for row in timed if row["planned"]), None)
    if planned is None:
        return None, False
    fastest = min(timed, key=lambda row: row["median"])
    excess = planned["median"] / fastest["median"]
    apart = planned["median"] - planned["iqr"] / 2 > fastest["median"] + fastest["iqr"] / 2
    return excess, excess > PLAN_MAY_TAKE and apart


def accuracy_tables(rows: pd.DataFrame) -> dict[str, Any]:
    """The part ``accuracy``: errors of each contender over noise."""
    tables = []
    measured = rows[rows["gradient_error"].notna()]
    for _, maps in measured.groupby("workload", sort=False):
        for title, group in groups(maps, "dtype", "workload"):
            for kind in ("gradient", "loss"):
                lines = error_lines(group, kind)
                tables.append((f"{title}, error of the {kind}", markdown_table(lines)))
    return {"tables": tables, "notes": not_measured(rows, "dtype", "workload")}


def error_lines(rows: pd.DataFrame, kind: str) -> list[Line]:
    """A line for each contender, a column for each noise, the largest first."""
    noises = sorted(rows["noise"].unique(), reverse=True)
    lines = []
    for name in names(rows):
        own = rows[rows["contender"] == name]
        found = dict(zip(own["noise"], own[f"{kind}_error"], strict=True))
        cells = {f"noise {x:g}": exponent(found.get(x)) or "-" for x in noises}
        lines.append({kind: name} | cells)
    return lines


# --- the report -----------------------------------------------------------------------------------

MAKERS = {
    "loss": loss_tables,
    "step": step_tables,
    "scaling": scaling_tables,
    "plan": plan_tables,
    "accuracy": accuracy_tables,
}


def render(
    results: Results,
    parts: Iterable[str] = PARTS,
    pictures: Sequence[str] = (),
    brief: bool = False,
) -> str:
    """The report in Markdown, with links to ``pictures``; a ``brief`` one is for a terminal."""
    rows = with_ratios(results.rows)
    found = {
        part: MAKERS[part](rows[rows["part"] == part])
        for part in results.environment
        if part in parts
    }
    about = results.environment
    first = next(iter(about.values()))
    shared = {k: v for k, v in first.items() if all(x.get(k) == v for x in about.values())}
    apart = {
        part: {k: v for k, v in facts.items() if k not in shared} for part, facts in about.items()
    }
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    text = environment.get_template("report.md.j2").render(
        device=results.device,
        shared=shared,
        apart=apart,
        parts=found,
        figures=pictures,
        on_gpu="gpu" in first,
        brief=brief,
        plan_may_take=round(100 * (PLAN_MAY_TAKE - 1)),
    )
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def draw(folder: Path) -> list[Path]:
    """(Re)draw ``report.md`` and its figures from the results in a folder; returns their paths."""
    results = read(folder)
    drawn = figures.draw(with_ratios(results.rows), results.device, folder)
    path = folder / "report.md"
    path.write_text(render(results, pictures=[picture.name for picture in drawn]))
    return [path, *drawn]


def compare(before: Results, after: Results) -> str:
    """The times of two runs side by side, as Markdown, with geometric means of their ratios."""
    key = ["part", *CASE, "contender"]
    merged = before.rows.merge(after.rows, on=key, suffixes=("_before", "_after"))
    merged["new"] = merged["median_after"] / merged["median_before"]
    merged = merged[merged["new"].notna()]
    if merged.empty:
        return "The two runs have no time in common."
    lines = [
        {
            "case": ", ".join(str(row[name]) for name in key[:-1] if row[name] is not None),
            "contender": row["contender"],
            "before ms": milliseconds(suffixed(row, "_before")),
            "after ms": milliseconds(suffixed(row, "_after")),
            "after/before": f"{row['new']:.3f}",
        }
        for row in records(merged)
    ]
    means = merged.groupby(["part", "ours_after"], sort=False)["new"].agg(geometric_mean)
    words = [f"{part}, {'ours' if ours else 'peers'}: {x:.3f}" for (part, ours), x in means.items()]
    return "\n\n".join(
        [markdown_table(lines), "Geometric means of after/before: " + "; ".join(words)]
    )


def suffixed(row: Row, suffix: str) -> Row:
    """The columns of a merged row that come from one of the runs."""
    return {name: row[f"{name}{suffix}"] for name in ("median", "iqr")}
