"""The run folder's files: ``report.md`` for people, metrics for programs, figures for both."""

from __future__ import annotations

import platform
import statistics
from importlib.metadata import version
from pathlib import Path

from fsp_kernels.distill import figures, metrics
from fsp_kernels.distill.compare import ARMS, Comparison
from fsp_kernels.distill.config import Config, dump_config
from fsp_kernels.distill.metrics import Summary

_FIGURES = {
    "accuracy": (
        figures.draw_accuracy,
        "Accuracy by steps: mean over seeds, shaded one standard deviation up and down.",
    ),
    "losses": (
        figures.draw_losses,
        "FSP loss in stage 1 and task loss, by steps; shaded alike. The student's FSP loss is that "
        "with the batch's own statistics, as stage 1 sees it.",
    ),
    "fsp-matrices": (
        figures.draw_matrices,
        "FSP matrices of the teacher and of the first seed's student, averaged over the evaluation "
        "split. A row is a pair of layers and has one colour scale.",
    ),
}


def write_report(comparison: Comparison, folder: Path, command: str) -> Path:
    """Write metrics, figures and ``report.md`` into ``folder``; returns the report's path.

    Args:
        comparison: what ``Laboratory.compare`` found.
        folder: the run folder.
        command: the command line to quote.
    """
    environment = describe_environment()
    metrics.write_json(comparison, environment, folder / "metrics.json")
    metrics.write_runs_csv(comparison, folder / "runs.csv")
    metrics.write_curves_csv(comparison, folder / "curves.csv")
    (folder / "figures").mkdir(exist_ok=True)
    for name, (draw, _) in _FIGURES.items():
        draw(comparison, folder / "figures" / f"{name}.png")
    sections = [
        f"# {comparison.config.name}",
        headline(comparison),
        _table(comparison),
        _differences(comparison),
        "## What is compared",
        _method(comparison),
        "## Figures",
        *(f"![{name}](figures/{name}.png)\n\n{text}" for name, (_, text) in _FIGURES.items()),
        "## How to run it again",
        f"```\n{command}\n```",
        f"The recipe, defaults filled in:\n\n```yaml\n{dump_config(comparison.config)}```",
        _environment_table(environment),
    ]
    path = folder / "report.md"
    path.write_text("\n\n".join(sections) + "\n", encoding="utf-8")
    return path


def describe_environment() -> dict[str, str]:
    """What the numbers may depend on; nothing that names the machine or its user."""
    packages = ("fsp-kernels", "torch", "accelerate", "scikit-learn", "numpy")
    return {
        "python": platform.python_version(),
        **{package: version(package) for package in packages},
        "platform": f"{platform.system()} {platform.machine()}",
    }


def headline(comparison: Comparison) -> str:
    """The result in a sentence, whichever way it came out."""
    config, rows = comparison.config, metrics.summaries(comparison)
    return (
        f"**After {config.stage2.steps} steps on the task loss, the distilled "
        f"{_network(config.student.depth)} gets {_accuracy(rows['distilled'])} of the "
        f"{config.evaluation.split} images right; without distillation it gets "
        f"{_accuracy(rows['baseline'])}, and {_accuracy(rows['baseline-long'])} when it may spend "
        f"the {config.stage1.steps} steps of stage 1 on the task loss too.** The teacher, a "
        f"{_network(config.teacher.depth)}, gets {_accuracy(rows['teacher'])}."
    )


def _table(comparison: Comparison) -> str:
    config, targets = comparison.config, comparison.config.evaluation.targets
    titles = {"teacher": f"Teacher ({_network(config.teacher.depth)})"}
    titles |= {name: f"{_network(config.student.depth)}, {arm.title}" for name, arm in ARMS.items()}
    head = ["network", "parameters", "seeds", f"{config.evaluation.split} accuracy"]
    head += ["steps: stage 1 + task", *(f"task steps to {t:.0%}" for t in targets), "time"]
    lines = [_row(head), _row(["---"] + ["---:"] * (len(head) - 1))]
    for name, row in metrics.summaries(comparison).items():
        reached = [_steps_to(row, target) for target in targets]
        spent = f"{row.stage1_steps} + {row.task_steps}"
        cells = [titles[name], f"{row.parameters:,}", str(row.runs), _accuracy(row), spent]
        lines.append(_row([*cells, *reached, f"{row.seconds:.1f} s"]))
    notes = (
        f"Accuracy after the last step: mean ± sample standard deviation over seeds. Steps to an "
        f"accuracy: of the median seed, looked at every {config.evaluation.every} steps; stage 1's "
        f"{config.stage1.steps} steps come on top for the distilled student. Time: the median "
        f"network's optimiser steps, with the teacher's forward passes in stage 1, without "
        f"evaluations and without the teacher's own training."
    )
    return "\n".join(lines) + "\n\n" + notes


def _differences(comparison: Comparison) -> str:
    lines = []
    for baseline in (name for name, arm in ARMS.items() if not arm.distilled):
        gains = [100 * gain for gain in metrics.gains(comparison, baseline)]
        better = sum(gain > 0 for gain in gains)
        lines.append(
            f"- Distilled less *{ARMS[baseline].title}*, seed by seed: "
            f"{statistics.fmean(gains):+.1f} points on average, from {min(gains):+.1f} to "
            f"{max(gains):+.1f}; better with {better} of {len(gains)} seeds."
        )
    stage1 = [run.stage1.history for run in comparison.of("distilled") if run.stage1]
    before, after = (statistics.fmean(rows[i]["fsp_loss"] for rows in stage1) for i in (0, -1))
    lines.append(
        f"- Stage 1 takes the FSP loss on the {comparison.config.evaluation.split} split from "
        f"{before:.4g} to {after:.4g} (mean over seeds)."
    )
    return "\n".join(lines)


def _method(comparison: Comparison) -> str:
    config = comparison.config
    data, total = config.data, config.stage1.steps + config.stage2.steps
    student = _network(config.student.depth)
    lines = [
        f"- *{ARMS['baseline'].title}*: a {student} trained for {config.stage2.steps} steps on the "
        f"cross-entropy.",
        f"- *{ARMS['baseline-long'].title}*: the same for {total} steps, its learning-rate "
        f"schedule stretched to that length.",
        f"- *{ARMS['distilled'].title}*: {config.stage1.steps} steps on the FSP loss alone (stage "
        f"1), then {config.stage2.steps} steps exactly as the first baseline (stage 2).",
        "- With one seed all three start from the same weights and see the same images in the same "
        "order on the task loss.",
        f"- The student trains on {data.train_images} images of the data set *{data.dataset}*. "
        + _teacher_data(config),
        "- All seeds share the teacher and the training images, so the spread is that of initial "
        "weights and image order only.",
    ]
    return "\n".join(lines)


def _teacher_data(config: Config) -> str:
    data = config.data
    if data.teacher_images == data.train_images:
        return "The teacher was trained on the same images."
    return (
        f"The teacher was trained on {data.teacher_images}, these among them: part of what the "
        f"distilled student gains may come from images that the baselines never had any part of."
    )


def _environment_table(environment: dict[str, str]) -> str:
    rows = [_row(["", ""]), _row(["---", "---"])]
    return "\n".join(rows + [_row([name, value]) for name, value in environment.items()])


def _row(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _network(depth: int) -> str:
    return f"ResNet-{depth}"


def _accuracy(row: Summary) -> str:
    spread = "" if row.spread is None else f" ± {100 * row.spread:.1f}"
    return f"{100 * row.accuracy:.1f}{spread} %"


def _steps_to(row: Summary, target: float) -> str:
    step, count = row.steps_to[target]
    text = "never" if step is None else str(step)
    return text if count in (0, row.runs) else f"{text} ({count} of {row.runs} seeds)"
