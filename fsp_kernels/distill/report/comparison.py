"""Finished runs, read from their folders and put together by how they were trained."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from fsp_kernels.distill import checkpoint, records
from fsp_kernels.distill.arms import ARMS
from fsp_kernels.distill.config import Config, Pair, dump_config
from fsp_kernels.distill.errors import DistillError
from fsp_kernels.distill.records import MATRICES, Run
from fsp_kernels.distill.settings import read

_TEACHERS = {"source": "teacher on its source data", "teacher": "teacher"}


@dataclass(frozen=True)
class Matrices:
    """FSP matrices of one run, averaged over the evaluation split.

    ``tensors`` has those of pair 0, each (m, n), as ``teacher/0``, ``before/0`` and ``after/0``
    (before and after the stage that has the FSP loss), and so on; ``pairs`` says of which maps.
    """

    seed: int
    pairs: tuple[Pair, ...]
    tensors: dict[str, Tensor]


@dataclass(frozen=True)
class Group:
    """Runs that differ in their seed alone, in the order of their seeds.

    ``study`` names the folder they are of, ``title`` is for people.
    """

    study: str
    arm: str
    title: str
    runs: tuple[Run, ...]
    matrices: Matrices | None = None


@dataclass(frozen=True)
class Comparison:
    """All groups, teachers first within each study; ``configs`` has each study's recipe."""

    groups: tuple[Group, ...]
    configs: dict[str, Config]

    @property
    def students(self) -> list[Group]:
        return [group for group in self.groups if group.arm in ARMS]

    @property
    def teachers(self) -> list[Group]:
        return [group for group in self.groups if group.arm not in ARMS]

    @property
    def targets(self) -> list[float]:
        """The accuracies that any of the recipes asks about."""
        return sorted({t for config in self.configs.values() for t in config.evaluation.targets})

    def of(self, study: str, arm: str) -> Group | None:
        """The runs of one arm of a study, if there are any."""
        found = (g for g in self.groups if (g.study, g.arm) == (study, arm))
        return next(found, None)


class _Found(NamedTuple):
    path: Path
    run: Run

    @property
    def root(self) -> Path:
        """The study's folder: the run's is ROOT/teacher, or ROOT/ARM/seed-N."""
        in_arm = self.run.arm in ARMS and self.path.parent.name == self.run.arm
        return self.path.parent.parent if in_arm else self.path.parent


def title_of(arm: str) -> str:
    """For people; of a student's arm or a teacher."""
    return _TEACHERS[arm] if arm in _TEACHERS else ARMS[arm].title


def gather(folders: Sequence[Path]) -> Comparison:
    """All finished runs in ``folders`` and below; with a student's run comes its teacher's.

    Raises:
        DistillError: a folder holds none; a record is damaged; two studies have one name.
    """
    found = _read(path for folder in folders for path in records.find(folder))
    teachers = dict.fromkeys(one.root / "teacher" for one in found.values())
    found |= _read(path for path in teachers if records.is_finished(path))
    names = _names(list(dict.fromkeys(one.root for one in found.values())))
    studies, arms = list(names), [*_TEACHERS, *ARMS]
    by_group: dict[tuple[str, str], list[_Found]] = {}
    for one in sorted(
        found.values(),
        key=lambda f: (studies.index(f.root), arms.index(f.run.arm), f.run.seed),
    ):
        by_group.setdefault((names[one.root], one.run.arm), []).append(one)
    groups = [_group(study, arm, runs, len(names) > 1) for (study, arm), runs in by_group.items()]
    return Comparison(tuple(groups), {name: _recipe(name, groups) for name in names.values()})


def _read(paths: Iterable[Path]) -> dict[Path, _Found]:
    return {path: _Found(path, records.read(path)) for path in map(Path.resolve, paths)}


def _group(study: str, arm: str, found: Sequence[_Found], several: bool) -> Group:
    return Group(
        study,
        arm,
        f"{study}: {title_of(arm)}" if several else title_of(arm),
        tuple(one.run for one in found),
        next((_matrices(one) for one in found if (one.path / MATRICES).is_file()), None),
    )


def _matrices(found: _Found) -> Matrices:
    tensors, note = checkpoint.load(found.path / MATRICES)
    pairs = tuple(read(Pair, tree) for tree in note.get("pairs", []))
    return Matrices(found.run.seed, pairs, tensors)


def _recipe(study: str, groups: Sequence[Group]) -> Config:
    """The one that most of a study's students were trained by; without any, the teacher's."""
    runs = [run for group in groups if group.study == study for run in group.runs]
    students = [run for run in runs if run.arm in ARMS]
    recipes = {dump_config(recipe_of(run)): recipe_of(run) for run in students or runs}
    return recipes[statistics.mode(dump_config(recipe_of(run)) for run in students or runs)]


def recipe_of(run: Run) -> Config:
    """The recipe that ``run`` was trained by."""
    return read(Config, run.config)


def _names(roots: Sequence[Path]) -> dict[Path, str]:
    names = {root: root.name for root in roots}
    if len(set(names.values())) < len(names):
        names = {root: f"{root.parent.name}/{root.name}" for root in roots}
    if len(set(names.values())) < len(names):
        raise DistillError(f"{', '.join(map(str, roots))}: have equal names; rename a folder")
    return names
