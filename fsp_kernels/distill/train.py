"""Training one network: its stages in order, from the newest checkpoint if there is one."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from accelerate.utils import DistributedDataParallelKwargs, broadcast
from torch import nn

from fsp_kernels.distill import checkpoint
from fsp_kernels.distill.arms import TrainingStage
from fsp_kernels.distill.changes import check_changes, differing
from fsp_kernels.distill.checkpoint import Series, State, flatten
from fsp_kernels.distill.config import Data, Pair
from fsp_kernels.distill.data import Batch, Split, training_batches
from fsp_kernels.distill.evaluation import Evaluations, by_batch_statistics, move_to_device
from fsp_kernels.distill.interruption import InterruptedRunError
from fsp_kernels.distill.monitor import Watch
from fsp_kernels.distill.objective import Objective, Targets
from fsp_kernels.distill.records import MATRICES, Phase
from fsp_kernels.distill.runtime import Runtime
from fsp_kernels.distill.schedule import Patience, make_optimizer, rate, set_rate
from fsp_kernels.distill.seeds import Purpose, seed_everything
from fsp_kernels.distill.settings import to_tree
from fsp_kernels.distill.storage import require_agreement
from fsp_kernels.distill.teacher import Teacher
from fsp_kernels.errors import DistillError
from fsp_kernels.features.pairs import PairShapes, Projection


@dataclass(frozen=True)
class Job:
    """A network to be trained.

    Attributes:
        arm: a key of ``ARMS``, "teacher" or "source".
        label: for people, such as "two-stage seed 0".
        seed: of all random numbers.
        stages: in order.
        data, images: how images are read, and which ones to train on.
        folder: of the run.
        settings: sections of the recipe and digests of files and images; the result depends on them
            alone.
        pairs, shapes: of the FSP loss, if a stage has it.
    """

    arm: str
    label: str
    seed: int
    stages: tuple[TrainingStage, ...]
    data: Data
    images: Split
    folder: Path
    settings: dict[str, Any]
    pairs: Sequence[Pair] = ()
    shapes: Sequence[PairShapes] = ()

    @property
    def checkpoints(self) -> Series:
        return Series(self.folder / "checkpoints")


class NetworkTraining:
    """Trains one network in place.

    All random numbers of a step are drawn from seeds that depend on the job's seed and the step.
    The same job on the same machine, with the same numbers of threads and processes, therefore
    gives the same weights bit for bit, whether or not it was interrupted.

    Args:
        runtime: the devices to train on.
        job: what to train, and how.
        network: fresh from ``runtime.new_network``.
        evaluations: measure the network on the way.
        teacher: for stages that need one.
    """

    def __init__(
        self,
        runtime: Runtime,
        job: Job,
        network: nn.Module,
        evaluations: Evaluations,
        teacher: Teacher | None = None,
    ) -> None:
        self._runtime, self._job, self._network = runtime, job, network
        self._evaluations, self._teacher = evaluations, teacher
        self._config, self._accelerator = runtime.config, runtime.accelerator
        self._state = State()
        self._objective: Any = None
        self._optimizer: Any = None

    def run(self, resume: bool = False) -> list[Phase]:
        """Train by all stages.

        Args:
            resume: go on from the newest whole checkpoint in the job's folder, if there is one.

        Raises:
            DistillError: the loss or the weights are no longer finite; a checkpoint cannot be
                written; the checkpoints have other settings, or differ between the processes.
            InterruptedRunError: a signal stopped it; a checkpoint was written.
        """
        job, found = self._job, self._find_checkpoint() if resume else None
        require_agreement(found and (len(found.phases), found.step), job.folder)
        if found is not None:
            self._state = found
            self._network.load_state_dict(found.part("network"))
        if self._config.execution.compile:
            torch.compiler.reset()  # drops the code that was compiled for other networks
        for index in range(len(self._state.phases), len(job.stages)):
            self._prepare_stage(index)
            phase = self._run_stage()
            self._state = State(phases=[*self._state.phases, phase])
            self._objective, self._optimizer = self._accelerator.free_memory(
                self._objective, self._optimizer
            )
        return self._state.phases

    def _find_checkpoint(self) -> State | None:
        job, say = self._job, self._runtime.monitor.say
        found = job.checkpoints.newest(say)
        if found is None:
            return None
        path, stored = found
        before, state = stored.note["settings"], State.of(stored)
        done = len(state.phases)
        check_changes(path, before, job.settings, job.stages, done, state.step)
        others = differing(before, job.settings)
        changes = f", with other settings of {', '.join(others)}" if others else ""
        say(f"{job.label}: going on from {job.stages[done].name}, step {state.step}{changes}")
        return state

    def _prepare_stage(self, index: int) -> None:
        """Make all that the stage needs, and load the state of its checkpoint if there is one."""
        job, config, state = self._job, self._config, self._state
        self._index, self._stage = index, job.stages[index]
        seed_everything(job.seed, Purpose.PROJECTION, index)
        self._projection: Projection | None = None
        if self._stage.fsp and config.fsp.projection:
            self._projection = Projection(job.shapes).to(self._accelerator.device)
        options = config.fsp, self._projection, config.execution.compile
        self._plain_objective = Objective(self._network, self._stage, job.pairs, *options).train()
        optimizer = make_optimizer(self._stage.training, self._plain_objective.parameters())
        self._accelerator.ddp_handler = DistributedDataParallelKwargs(
            find_unused_parameters=self._leaves_weights_unused()
        )
        # By DDP if there are several processes.
        self._objective, self._optimizer = self._accelerator.prepare(
            self._plain_objective, optimizer
        )
        self._patience = Patience(self._stage.training.stop)
        self._saved_step: int | None = None
        if not state.tensors:
            return
        if self._projection is not None:
            self._projection.load_state_dict(state.part("projection"))
        checkpoint.restore_optimizer(self._optimizer, state.part("optimizer"))
        if state.patience is not None:
            self._patience.load(state.patience)
        if state.scaler is not None and self._accelerator.scaler is not None:
            self._accelerator.scaler.load_state_dict(state.scaler)
        state.tensors = flatten({"before": state.part("before")})  # frees the rest
        self._saved_step = state.step

    def _leaves_weights_unused(self) -> bool:
        """Whether a weight gets no gradient, which DDP must be told.

        The FSP loss alone does not use the head, and a user's network may have any weights.
        """
        objective, step = self._plain_objective, self._state.step
        if self._accelerator.num_processes == 1:
            return False
        batch = next(self._batches(step, step + 1))
        with by_batch_statistics(objective), torch.enable_grad(), self._accelerator.autocast():
            objective(batch.images, batch.labels, self._targets(batch)).backward()
        unused = any(p.grad is None for p in objective.parameters() if p.requires_grad)
        objective.zero_grad()
        return unused

    def _run_stage(self) -> Phase:
        label, stage, state = self._job.label, self._stage, self._state
        evaluated = int(state.history[-1]["step"]) if state.history else -1
        steps = stage.steps, state.step, evaluated
        try:
            with self._runtime.monitor.watch(label, stage.name, *steps) as watch:
                self._take_steps(watch)
            if stage.fsp:
                self._save_matrices()
        except InterruptedRunError as stop:
            self._save()
            self._accelerator.wait_for_everyone()  # a launcher ends all once one has ended
            raise InterruptedRunError(
                f"{label}, {stage.name}: stopped in step {state.step} of {stage.steps}, saved; "
                f"--resume goes on from there",
                stop.number,
            ) from None
        finally:
            self._evaluations.close()
        self._plain_objective.student.taps.detach()  # or they would keep the next stage's maps
        exhausted = self._patience.exhausted
        return Phase(stage.name, stage.losses, state.history, state.seconds, exhausted)

    def _take_steps(self, watch: Watch) -> None:
        """Evaluate, save and step, each when it is due, to the end of the stage."""
        state, steps, every = self._state, self._stage.steps, self._config.evaluation.every
        with closing(self._batches(state.step, steps, self._job.data.workers)) as batches:
            while True:
                evaluated = state.history and state.history[-1]["step"] == state.step
                if not evaluated and (state.step % every == 0 or state.step == steps):
                    self._evaluate(watch)
                if state.step == steps or self._patience.exhausted:
                    return
                if state.step % self._config.checkpoints.every == 0:
                    self._save()
                if self._step(batches):
                    number = self._runtime.interruption.requested or signal.SIGTERM
                    raise InterruptedRunError("stopped", number)
                watch.step()

    def _step(self, batches: Iterator[Batch]) -> bool:
        """Take one step of the optimiser; returns whether a signal asked any process to stop."""
        state, stage, accelerator = self._state, self._stage, self._accelerator
        started = time.perf_counter()
        set_rate(self._optimizer, rate(stage.training, stage.steps, state.step))
        losses = []
        for micro in range(self._config.execution.accumulation):
            batch = next(batches)
            self._seed(Purpose.STEP, micro, accelerator.process_index)
            with accelerator.accumulate(self._objective):
                loss = self._objective(batch.images, batch.labels, self._targets(batch))
                accelerator.backward(loss)
            losses.append(loss.detach())
        if self._runtime.interruption.requested:
            accelerator.set_trigger()
        value = accelerator.reduce(torch.stack(losses).mean(), "mean").item()
        if not math.isfinite(value):
            self._raise_loss_not_finite(value)
        if stage.training.clip is not None:
            accelerator.clip_grad_norm_(self._objective.parameters(), stage.training.clip)
        self._optimizer.step()
        self._optimizer.zero_grad()
        state.step += 1
        state.loss_sum += value
        state.seconds += time.perf_counter() - started
        return accelerator.check_trigger()

    def _evaluate(self, watch: Watch) -> None:
        state, stage, objective = self._state, self._stage, self._plain_objective
        row: dict[str, float] = {"step": state.step}
        if state.history:
            row["train_loss"] = state.loss_sum / (state.step - state.history[-1]["step"])
        if self._accelerator.num_processes > 1:
            # DDP copies the first process's running statistics before each pass, not after the
            # last one; all processes must measure the same network.
            broadcast(list(self._network.buffers()))
        self._seed(Purpose.EVALUATION)
        row |= self._evaluations.figures(stage, objective)
        if stage.training.stop is not None:
            self._patience.note(self._evaluations.stopping_loss(stage, objective))
        if stage.fsp:
            self._log_matrices(watch)
        watch.log(state.step, row)
        state.history.append(row)
        state.loss_sum = 0.0

    def _log_matrices(self, watch: Watch) -> None:
        """Show the matrices at the ends of the stage and each tenth of it; keep the first ones."""
        state, evaluations = self._state, self._evaluations
        tenth, first = max(1, self._stage.steps // 10), not state.history
        if not first and state.step // tenth == state.history[-1]["step"] // tenth:
            return
        matrices = evaluations.student_matrices(self._plain_objective)
        if first:
            state.tensors |= flatten({"before": dict(enumerate(matrices))})
        pairs = zip(matrices, evaluations.teacher_matrices(), strict=True)
        for index, (student, teacher) in enumerate(pairs):
            watch.matrices(state.step, f"pair {index}", student, teacher)

    def _save_matrices(self) -> None:
        evaluations = self._evaluations
        matrices = {
            "teacher": dict(enumerate(evaluations.teacher_matrices())),
            "before": self._state.part("before"),
            "after": dict(enumerate(evaluations.student_matrices(self._plain_objective))),
        }
        if self._accelerator.is_main_process:
            note = {"pairs": [to_tree(pair) for pair in self._job.pairs]}
            checkpoint.save(self._job.folder / MATRICES, flatten(matrices), note)

    def _save(self) -> None:
        """Write a checkpoint by the first process, unless this step has one already."""
        state, job, scaler = self._state, self._job, self._accelerator.scaler
        if self._saved_step == state.step:
            return
        if not all(bool(weights.isfinite().all()) for weights in self._network.parameters()):
            self._raise_not_finite(f"weights are not finite after step {state.step}")
        state.patience = self._patience.state()
        state.scaler = None if scaler is None else scaler.state_dict()
        tree = {
            "network": self._network.state_dict(),
            "optimizer": self._optimizer.state_dict()["state"],
            "projection": {} if self._projection is None else self._projection.state_dict(),
        }
        if self._accelerator.is_main_process:
            number = sum(stage.steps + 1 for stage in job.stages[: self._index]) + state.step
            note = state.note() | {"settings": job.settings}
            job.checkpoints.save(number, state.tensors | flatten(tree), note)
        self._saved_step = state.step

    @torch.no_grad()
    def _raise_loss_not_finite(self, value: float) -> NoReturn:
        """Repeat the step's passes to find what is not finite, and raise it as an error."""
        objective, step, found = self._plain_objective, self._state.step, []
        for micro, batch in enumerate(self._batches(step, step + 1)):
            # Every process repeats all of its passes: synchronised normalisation needs them.
            self._seed(Purpose.STEP, micro, self._accelerator.process_index)
            with self._accelerator.autocast():
                logits, maps = objective.student.uncompiled(batch.images)
                losses = []
                if self._stage.fsp:
                    losses = objective.fsp_loss(maps, self._targets(batch), "none").tolist()
            found += [
                f"the FSP loss of {' -> '.join(pair.student)} is {loss}"
                for pair, loss in zip(self._job.pairs, losses, strict=False)
                if not math.isfinite(loss)
            ]
            if not bool(logits.isfinite().all()):
                found.append("the student's logits are not finite")
        where = found[0] if found else "by another process's images, or by the teacher's targets"
        self._raise_not_finite(f"the loss is {value} in step {step + 1}: {where}")

    def _raise_not_finite(self, what: str) -> NoReturn:
        kept = next(reversed(self._job.checkpoints.paths()), "none")
        raise DistillError(
            f"{self._job.label}, {self._stage.name}: {what}; last good checkpoint: {kept}; "
            f"try a smaller learning rate"
        )

    def _targets(self, batch: Batch) -> Targets:
        if not self._stage.needs_teacher:
            return Targets()
        assert self._teacher is not None
        return self._teacher.targets(batch)

    def _batches(self, first: int, end: int, workers: int = 0) -> Generator[Batch, None, None]:
        """This process's parts of the batches of steps ``first`` to ``end - 1``, on the device."""
        batches = training_batches(
            self._job.images,
            batch_size=self._job.data.batch_size,
            seed=self._job.seed,
            first_step=first,
            steps=end,
            accumulation=self._config.execution.accumulation,
            process=self._accelerator.process_index,
            processes=self._accelerator.num_processes,
            workers=workers,
        )
        return move_to_device(batches, self._accelerator.device, self._config)

    def _seed(self, purpose: Purpose, *numbers: int) -> None:
        seed_everything(self._job.seed, purpose, self._index, self._state.step, *numbers)
