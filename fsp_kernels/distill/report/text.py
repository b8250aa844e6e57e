"""The report's words and tables, in Markdown."""

from __future__ import annotations

import html
import re
import statistics
from collections.abc import Iterable, Sequence

from fsp_kernels.distill.config import Config, Data, dump_config
from fsp_kernels.distill.report.comparison import Comparison, Group, Matrices, recipe_of, title_of
from fsp_kernels.distill.report.metrics import (
    BASELINES,
    Gain,
    Summary,
    deviations_reached,
    gains,
    summary_of,
)

# What a headline is about: the first of these that a study has.
_HEADLINED = ("two-stage", "two-stage-kd", "one-stage", "one-stage-kd", "kd", "baseline-long")


def headline(comparison: Comparison) -> str:
    """The result of each study in a sentence, whichever way it came out; a line each, plain text.

    Of the FSP method in two stages where there is one, against the baseline of as many steps in
    all, or else the shorter one.
    """
    lines = []
    for study in comparison.configs:
        found = [gain for gain in gains(comparison) if gain.study == study]
        line = _verdict(comparison, min(found, key=_rank)) if found else _all(comparison, study)
        lines.append(f"{study}: {line}" if len(comparison.configs) > 1 else line)
    return "\n".join(lines)


def _rank(gain: Gain) -> tuple[bool, int]:
    """The least is the one to speak of: against the fairest baseline, of the paper's method."""
    return gain.baseline == "baseline", _HEADLINED.index(gain.arm)


def _verdict(comparison: Comparison, gain: Gain) -> str:
    groups = [comparison.of(gain.study, arm) for arm in (gain.arm, gain.baseline)]
    ours, theirs = (_accuracy(summary_of(comparison, group)) for group in groups if group)
    steps, others = (_span(run.steps for run in group.runs) for group in groups if group)
    split, title = comparison.configs[gain.study].evaluation.split, title_of(gain.arm)
    if steps == others:
        compared = (
            f"With {steps} optimiser steps each, the {split} accuracy is {ours} with {title} and "
            f"{theirs} with the baseline"
        )
    else:
        compared = (
            f"The {split} accuracy is {ours} with {title}, in {steps} optimiser steps, and "
            f"{theirs} with the baseline, in {others}"
        )
    return f"{compared}: {_said(gain)}."


def _said(gain: Gain) -> str:
    mean, seeds = f"{_signed(gain.mean)} points", len(gain.each)
    if seeds == 1:
        return f"{mean}, of which one seed can't tell whether it is chance"
    if gain.low is None:
        return f"{mean} with each of {seeds} seeds, too alike for an interval"
    interval = f"95 % interval {_interval(gain)}"
    if gain.verdict == "neither":
        return f"no difference that {seeds} seeds can tell ({mean}, {interval})"
    return f"a {gain.verdict} of {_signed(abs(gain.mean)).lstrip('+')} points ({interval})"


def _all(comparison: Comparison, study: str) -> str:
    """Of a study that has nothing to compare."""
    split = comparison.configs[study].evaluation.split
    groups = [group for group in comparison.groups if group.study == study]
    students = [group for group in groups if group in comparison.students]
    parts = [
        f"{title_of(group.arm)} {_accuracy(summary_of(comparison, group))}"
        for group in students or groups
    ]
    return f"{split} accuracy: {'; '.join(parts)}"


def table(comparison: Comparison) -> str:
    """A row for each group."""
    targets, configs = comparison.targets, comparison.configs.values()
    split = " / ".join(sorted({config.evaluation.split for config in configs}))
    head = ["", "network", "parameters", "seeds", f"{split} accuracy", "steps: stage 1 + task"]
    head += [*(f"task steps to {100 * t:g} %" for t in targets), "time"]
    rows = []
    for group in comparison.groups:
        row = summary_of(comparison, group)
        cells = [escaped(group.title), escaped(row.network), f"{row.parameters:,}", str(row.runs)]
        cells += [_accuracy(row), f"{row.stage1_steps} + {row.task_steps}"]
        rows.append([*cells, *(_steps_to(row, t) for t in targets), _duration(row.seconds)])
    every = " or ".join(str(n) for n in sorted({config.evaluation.every for config in configs}))
    notes = (
        f"Accuracy is that after the last step: mean ± sample standard deviation over seeds. Steps "
        f"and time are the median seed's. Steps to an accuracy, evaluated every {every} steps, "
        f"leave stage 1's out; – is never, and brackets say how many seeds got there where not all "
        f"did. Time is that of optimiser steps with the teacher's forward passes, without "
        f"evaluations and the teacher's own training."
    )
    return f"{_table(head, rows, numbers_from=2)}\n\n{notes}"


def differences(comparison: Comparison) -> str:
    """Each arm against each baseline, seed by seed, and what became of the FSP loss."""
    found = {(gain.study, gain.arm, gain.baseline): gain for gain in gains(comparison)}
    baselines = [name for name in BASELINES if any(name == key[2] for key in found)]
    losses = {group.title: _fsp_loss(group) for group in comparison.students}
    head = ["", *(f"points over *{title_of(name)}*" for name in baselines)]
    head += ["FSP loss, before and after"] if any(losses.values()) else []
    rows = []
    for group in comparison.students:
        those = [found.get((group.study, group.arm, name)) for name in baselines]
        cells = ["" if gain is None else _cell(gain) for gain in those]
        cells += [losses[group.title]] if any(losses.values()) else []
        if any(cells):
            rows.append([escaped(group.title), *cells])
    if not rows:
        return ""
    notes = [_reading(list(found.values()))] if found else []
    if any(losses.values()):
        notes.append(
            "The FSP loss is on the evaluation split, by each batch's own statistics in batch "
            "normalisation: mean over seeds, at the first and the last step of the stage that "
            "has it."
        )
    return "\n\n".join([_table(head, rows, numbers_from=len(head)), *notes])


def _cell(gain: Gain) -> str:
    seeds = len(gain.each)
    word = "" if gain.verdict == "neither" else f": **{gain.verdict}**"
    interval = "no interval" if gain.low is None else _interval(gain)
    return f"{_signed(gain.mean)} ({interval}), {gain.better} of {seeds}{word}"


def _reading(found: Sequence[Gain]) -> str:
    """How to read the differences, and what their intervals can't tell."""
    how = (
        "Points are hundredths of the evaluated images: mean over seeds of the accuracy less that "
        "of the baseline with the same seed (95 % interval by Student's t), and with how many of "
        "the seeds it was higher. *Gain* or *loss* is said where the interval leaves zero out."
    )
    counts = sorted({len(gain.each) for gain in found})
    if counts == [1]:
        return f"{how} One seed has no interval: any of these differences may be chance."
    many = counts[0] if counts[0] > 1 else counts[1]
    reach = deviations_reached(many)
    limits = (
        f"What the intervals can't tell: with {many} seeds one reaches {reach:.1f} standard "
        f"deviations of the differences to each side, and takes them to be normally distributed, "
        f"which {many} values can't show. One that holds zero does not say that there is no "
        f"difference: it may be as large as either end."
    )
    if len(found) > 1:
        limits += (
            f" Each of the {len(found)} intervals misses the true mean in 5 % of such studies."
        )
    return f"{how}\n\n{limits} {_SHARED}"


_SHARED = (
    "The seeds of a study share the teacher, the training images and the evaluated images; what "
    "others of these would change is in no interval and no deviation."
)


def _fsp_loss(group: Group) -> str:
    histories = [phase.history for run in group.runs for phase in run.phases if phase.has_fsp]
    if not histories:
        return ""
    first, last = (statistics.fmean(h[i]["fsp_loss"] for h in histories) for i in (0, -1))
    return f"{first:.4g} → {last:.4g}"


def warnings(comparison: Comparison) -> str:
    """Which runs were trained by another recipe than the one that is quoted."""
    lines = []
    for group in comparison.students:
        recipe = comparison.configs[group.study]
        for run in group.runs:
            own = recipe_of(run)
            keys = [k for k in vars(own) if k not in _FREE and vars(own)[k] != vars(recipe)[k]]
            if keys:
                named = _list([f"`{key}`" for key in keys])
                lines.append(
                    f"- **Careful:** {escaped(group.title)} with seed {run.seed} was trained by "
                    f"another recipe than the one below: {named} differ."
                )
    return "\n".join(lines)


_FREE = ("name", "seeds", "arms", "checkpoints")  # what a run does not depend on


def method(comparison: Comparison) -> str:
    """What was done to get these numbers."""
    parts = []
    for study, config in comparison.configs.items():
        facts = "\n".join(f"- {fact}" for fact in _facts(comparison, study, config))
        parts.append(f"### {escaped(study)}\n\n{facts}" if len(comparison.configs) > 1 else facts)
    if len(comparison.students) > 1:
        parts.append(
            "Arms of one study and seed start from the same weights and see the same images in the "
            "same order on the task loss."
        )
    return "\n\n".join(parts)


def _facts(comparison: Comparison, study: str, config: Config) -> list[str]:
    groups = [group for group in comparison.students if group.study == study]
    facts = [f"*{title_of(group.arm)}*: {_stages(group)}." for group in groups]
    if groups:
        seen = config.data.train_images or config.data.teacher_images
        facts.append(f"The student trains on {_images(config.data, seen)}.")
    distilled = any({"FSP loss", "soft targets"} & set(_losses(group)) for group in groups)
    if distilled or comparison.of(study, "teacher") is not None:
        facts.append(_teacher_data(config, distilled))
    matrices = next((group.matrices for group in groups if group.matrices is not None), None)
    if matrices is not None and matrices.pairs:
        facts.append(_pairs(matrices))
    return facts


def _stages(group: Group) -> str:
    parts = []
    for phases in zip(*(run.phases for run in group.runs), strict=True):
        steps = _span(phase.steps for phase in phases)
        ended = sum(phase.stopped for phase in phases)
        stop = f" (the stopping rule ended {ended} of {len(phases)} runs)" if ended else ""
        losses = _list([f"the {loss}" for loss in phases[0].losses])
        parts.append(f"{steps} steps on {losses}{stop}")
    return ", then ".join(parts)


def _losses(group: Group) -> list[str]:
    return [loss for phase in group.runs[0].phases for loss in phase.losses]


def _teacher_data(config: Config, distilled: bool) -> str:
    data, source = config.data, config.source
    if config.teacher_training is None:
        return "The teacher came trained."
    before = "" if source is None else f" after {_images(source.data, source.data.teacher_images)}"
    if data.train_images in (None, data.teacher_images):
        same = "the same images" if distilled else _images(data, data.teacher_images)
        return f"The teacher was trained on {same}{before}."
    more = (
        ": part of what a distilled student gains may come from images that the baselines never "
        "had any part of"
    )
    return (
        f"The teacher was trained on {_images(data, data.teacher_images)}, the student's among "
        f"them{before}{more if distilled else ''}."
    )


def _images(data: Data, count: int | None) -> str:
    number = "all training images" if count is None else f"{count} images"
    return f"{number} of {data.dataset}{', augmented' if data.augment else ''}"


def _pairs(matrices: Matrices) -> str:
    """Which maps the FSP matrices are of."""
    each = []
    for pair in matrices.pairs:
        student, teacher = (" to ".join(f"`{p}`" for p in v) for v in (pair.student, pair.teacher))
        each.append(student if student == teacher else f"{student} (the teacher's {teacher})")
    return f"FSP matrices: {'; '.join(each)}."


def recipes(comparison: Comparison) -> str:
    """The recipes, defaults filled in."""
    blocks = [
        f"The recipe of {escaped(study)}, defaults filled in:\n\n```yaml\n{dump_config(config)}```"
        for study, config in comparison.configs.items()
    ]
    return "\n\n".join(blocks)


def environment(comparison: Comparison) -> str:
    """On what; where runs differ, all there was."""
    found: dict[str, dict[str, None]] = {}
    for group in comparison.groups:
        for run in group.runs:
            for name, value in run.environment.items():
                found.setdefault(name, {})[value] = None
    rows = [[escaped(name), escaped(", ".join(values))] for name, values in found.items()]
    return _table(["environment", ""], rows, numbers_from=2)


def matrices_caption(comparison: Comparison, group: Group, matrices: Matrices) -> str:
    """Whose FSP matrices a figure shows."""
    split = comparison.configs[group.study].evaluation.split
    return (
        f"FSP matrices of the teacher and of the student ({escaped(group.title)}, seed "
        f"{matrices.seed}), averaged over the {split} images. A row is a pair of layers and has "
        f"one colour scale."
    )


def escaped(text: str) -> str:
    """``text`` as Markdown that shows it as it is."""
    marks = r"([\\`*\[\]|]|\b_|_\b)"  # within a word, an underscore is one
    return re.sub(marks, r"\\\1", html.escape(text, quote=False))


def _table(head: Sequence[str], rows: Iterable[Sequence[str]], numbers_from: int) -> str:
    rule = ["---" if index < numbers_from else "---:" for index in range(len(head))]
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, rule, *rows))


def _span(counts: Iterable[int]) -> str:
    """ "60", or "20 to 60"."""
    least, *_, most = sorted(2 * [*counts])
    return str(least) if least == most else f"{least} to {most}"


def _list(words: Sequence[str]) -> str:
    """ "a, b and c"."""
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def _signed(share: float) -> str:
    """In points, with as many digits as show that it is not zero."""
    points = 100 * share
    if abs(points) < 1e-6:
        return "0.0"
    text = f"{points:+.1f}" if abs(points) >= 0.05 else f"{points:+.1g}"
    return text.replace("-", "−")


def _interval(gain: Gain) -> str:
    assert gain.low is not None
    assert gain.high is not None
    return f"{_signed(gain.low)} to {_signed(gain.high)}"


def _accuracy(row: Summary) -> str:
    spread = "" if row.spread is None else f" ± {100 * row.spread:.1f}"
    return f"{100 * row.accuracy:.1f}{spread} %"


def _steps_to(row: Summary, target: float) -> str:
    step, count = row.steps_to[target]
    text = "–" if step is None else str(step)
    return text if count in (0, row.runs) else f"{text} ({count} of {row.runs})"


def _duration(seconds: float) -> str:
    for size, unit in ((3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.1f} s"
