"""A run that is killed, wherever it is, goes on and ends with the same bits."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
from processes import environments, finish, run_cli, start
from studies import TINY_RECIPE, is_whole, leftovers, results

from fsp_kernels.distill import checkpoint

SETTINGS = (
    *("data.augment=true", "checkpoints.every=1", "evaluation.every=2"),
    *("teacher_training.steps=12", "stage1.steps=16", "stage2.steps=12"),
)

Life = Callable[[Sequence[object]], Sequence[BaseProcess]]
"""Starts the processes of one life of a run, given the arguments of ``fsp-distill``."""


class Killed:
    """A study that lives until it is killed, again and again.

    Args:
        folder: for its recipe, its runs and their log.
        processes: that train together, one or two.
    """

    def __init__(self, folder: Path, processes: int = 1) -> None:
        self.folder, self.log = folder, folder / "log"
        self.recipe = folder / "tiny.yaml"
        self.recipe.write_text(TINY_RECIPE)
        self._life = self.in_two_processes if processes == 2 else self.alone
        finish([start(os.getpid)])  # the first process also waits for the imports
        began = time.monotonic()
        self.expected = self._finished(folder / "whole")
        self.seconds = time.monotonic() - began

    def alone(self, arguments: Sequence[object]) -> Sequence[BaseProcess]:
        return [start(run_cli, [*map(str, arguments)], self.log, {})]

    def in_two_processes(self, arguments: Sequence[object]) -> Sequence[BaseProcess]:
        several = [*map(str, arguments)]
        return [start(run_cli, several, self.log, variables) for variables in environments(2)]

    def dying_while_writing(self, write: int, part: float) -> Life:
        """A life that ends in its given write of a checkpoint, with such a part of it written."""

        def life(arguments: Sequence[object]) -> Sequence[BaseProcess]:
            return [start(die_while_writing, write, part, [*map(str, arguments)], self.log, {})]

        return life

    def survive(self, kills: int, generator: random.Random) -> None:
        """Runs that are killed at random moments, so many in all, end well.

        A moment is drawn from more than half of a whole run, so that each life may get through any
        part of it, and no machine is too slow for the run to get on.
        """
        while kills > 0:
            moments = [generator.uniform(0, 0.6 * self.seconds) for _ in range(min(kills, 5))]
            kills -= self.survives([(self._life, moment) for moment in moments])

    def survives(self, lives: Sequence[tuple[Life, float]]) -> int:
        """A run whose ``lives`` are killed after so many seconds ends well.

        Returns:
            How many were killed in time.
        """
        folder = self.folder / f"run {len(list(self.folder.iterdir()))}"
        kills = 0
        for life, seconds in lives:
            group = life(self._command(folder))
            deadline = time.monotonic() + seconds
            while time.monotonic() < deadline and any(one.is_alive() for one in group):
                time.sleep(0.001)
            for one in group:
                one.kill()
            finish(group)
            kills += -signal.SIGKILL in {one.exitcode for one in group}
        assert self._finished(folder) == self.expected
        assert not leftovers(folder)
        assert all(map(is_whole, folder.rglob("*.safetensors")))
        assert "damaged" not in self.log.read_text()  # a kill is no reason to lose a checkpoint
        return kills

    def _finished(self, folder: Path) -> dict[str, Any]:
        group = self._life(self._command(folder))
        finish(group)
        assert [one.exitcode for one in group] == [0] * len(group), self.log.read_text()
        return results(folder / "two-stage" / "seed-0")

    def _command(self, folder: Path) -> list[object]:
        resume = ["--resume"] if folder.exists() else []
        return ["train", self.recipe, *SETTINGS, *resume, "--output", folder]


def die_while_writing(
    write: int, part: float, arguments: list[str], log: Path, variables: Mapping[str, str]
) -> None:
    """``fsp-distill`` that kills itself with ``part`` of its checkpoint number ``write`` written.

    With all of it, it dies before the file has its name.
    """
    left, save = [write], checkpoint.save_file

    def dying(tensors: Any, path: Path, metadata: Any) -> None:
        save(tensors, path, metadata=metadata)
        left[0] -= 1
        if left[0] == 0:
            os.truncate(path, int(path.stat().st_size * part))
            os.kill(os.getpid(), signal.SIGKILL)

    checkpoint.save_file = dying
    run_cli(arguments, log, variables)


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Killed:
    return Killed(tmp_path_factory.mktemp("killed"))


@pytest.mark.slow
@pytest.mark.parametrize("kills", [4, pytest.param(15, marks=pytest.mark.thorough)])
def test_a_run_that_is_killed_at_random_moments_ends_with_the_same_bits(
    killed: Killed, kills: int
) -> None:
    killed.survive(kills, random.Random(0))
    assert "going on from" in killed.log.read_text()


@pytest.mark.slow
def test_a_run_that_is_killed_while_it_writes_a_checkpoint_ends_with_the_same_bits(
    killed: Killed,
) -> None:
    generator = random.Random(1)
    writes = [(generator.randrange(1, 12), part) for part in (0.0, 0.5, 1.0)]
    assert killed.survives([(killed.dying_while_writing(*write), 300.0) for write in writes]) == 3


@pytest.mark.slow
@pytest.mark.parametrize("kills", [1, pytest.param(3, marks=pytest.mark.thorough)])
def test_two_processes_that_are_killed_end_with_the_same_bits(tmp_path: Path, kills: int) -> None:
    Killed(tmp_path, processes=2).survive(kills, random.Random(2))
