"""Training by one stage: step, measure, save, and go on from what was saved."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Generator, Iterator
from contextlib import closing
from pathlib import Path
from typing import NoReturn

import torch
from accelerate.utils import (
    DistributedDataParallelKwargs,
    broadcast,
)
from torch import Tensor, nn

from fsp_kernels.distill import checkpoint
from fsp_kernels.distill.checkpoint import Series
from fsp_kernels.distill.data import Batch, training_batches
from fsp_kernels.distill.errors import DistillError
from fsp_kernels.distill.evaluation import Evaluations, by_batch_statistics, on_device
from fsp_kernels.distill.interruption import InterruptedRunError
from fsp_kernels.distill.job import Job, Setup
from fsp_kernels.distill.monitor import Watch
from fsp_kernels.distill.objective import Objective, Targets
from fsp_kernels.distill.pairs import Projection
from fsp_kernels.distill.records import MATRICES, Phase
from fsp_kernels.distill.schedule import Patience, make_optimizer, rate, set_rate
from fsp_kernels.distill.seeds import Purpose, seed_everything
from fsp_kernels.distill.settings import to_tree
from fsp_kernels.distill.state import (
    State,
    load_part,
    named,
    numbered,
    optimizer_tensors,
    restore_optimizer,
)
from fsp_kernels.distill.teacher import Teacher


class StageRun:
    """One stage: the loop, and what it keeps between two steps.

    Args:
        setup: what all stages share.
        job: whose stage it is.
        index: of the stage.
        network: the student, trained in place.
        evaluations: what to measure on the way.
        teacher: for a stage that needs one.
        series: the checkpoints.
        state: where to begin.
    """

    def __init__(
        self,
        setup: Setup,
        job: Job,
        index: int,
        network: nn.Module,
        evaluations: Evaluations,
        teacher: Teacher | None,
        series: Series,
        state: State,
    ) -> None:
        self._setup, self._job, self._index = setup, job, index
        self._config, self._accelerator = setup.config, setup.accelerator
        self._network, self._evaluations, self._teacher = network, evaluations, teacher
        self._series, self._state = series, state
        self._stage = stage = job.stages[index]
        seed_everything(job.seed, Purpose.PROJECTION, index)
        self._projection = self._new_projection()
        objective = Objective(
            network,
            stage,
            job.pairs,
            self._config.fsp,
            self._projection,
            self._config.execution.compile,
        ).train()
        optimizer = make_optimizer(stage.training, objective.parameters())
        self._accelerator.ddp_handler = DistributedDataParallelKwargs(
            find_unused_parameters=self._leaves_weights_out(objective)
        )
        self._objective, self._optimizer = self._accelerator.prepare(objective, optimizer)
        self._plain_objective = objective
        self._patience = Patience(stage.training.stop)
        self._saved_at: int | None = None
        self._last_checkpoint: Path | None = None
        if state.tensors:
            self._restore()

    def run(self) -> Phase:
        """From the step at hand to the last.

        Raises:
            DistillError: the loss or the weights are no longer finite; a checkpoint can't be
                written.
            InterruptedRunError: by a signal; a checkpoint was written.
        """
        stage, state = self._stage, self._state
        label = (self._job.label, stage.name)
        evaluated = int(state.history[-1]["step"]) if state.history else -1
        with self._setup.monitor.watch(*label, stage.steps, state.step, evaluated) as watch:
            try:
                self._train(watch)
                if stage.fsp:
                    self._keep_matrices()
            except InterruptedRunError as stop:
                self._save()
                # A launcher ends all processes as soon as one has ended.
                self._accelerator.wait_for_everyone()
                raise InterruptedRunError(
                    f"{self._job.label}, {stage.name}: stopped in step {state.step} of "
                    f"{stage.steps}, saved; --resume goes on from there",
                    stop.number,
                ) from None
            finally:
                self._evaluations.close()
        self._plain_objective.student.taps.detach()  # the next stage's maps are not for these
        return Phase(
            stage.name, stage.losses, state.history, state.seconds, self._patience.exhausted
        )

    def _train(self, watch: Watch) -> None:
        """Evaluate, save and step in turn, as each is due, until the stage is over."""
        stage, state = self._stage, self._state
        with closing(self._batches(state.step, stage.steps, self._job.data.workers)) as batches:
            while True:
                if self._evaluation_is_due():
                    self._evaluate(watch)
                if state.step == stage.steps or self._patience.exhausted:
                    return
                if state.step % self._config.checkpoints.every == 0:
                    self._save()
                if self._step(batches):
                    number = self._setup.interruption.requested or signal.SIGTERM
                    raise InterruptedRunError("stopped", number)
                watch.step()

    def _step(self, batches: Iterator[Batch]) -> bool:
        """One step of the optimiser; whether a signal asked any process to stop."""
        state, training = self._state, self._stage.training
        started = time.perf_counter()
        set_rate(self._optimizer, rate(training, self._stage.steps, state.step))
        losses = []
        for micro in range(self._config.execution.accumulation):
            batch = next(batches)
            self._seed(Purpose.STEP, micro, self._accelerator.process_index)
            with self._accelerator.accumulate(self._objective):
                loss = self._objective(batch.images, batch.labels, self._targets(batch))
                self._accelerator.backward(loss)
            losses.append(loss.detach())
        value, stop = self._agree(torch.stack(losses).mean())
        if not math.isfinite(value):
            self._complain(value)
        if training.clip is not None:
            self._accelerator.clip_grad_norm_(self._objective.parameters(), training.clip)
        self._optimizer.step()
        self._optimizer.zero_grad()
        state.step += 1
        state.loss_sum += value
        state.seconds += time.perf_counter() - started
        return stop

    def _agree(self, loss: Tensor) -> tuple[float, bool]:
        """The mean loss of all processes, and whether any of them has been asked to stop."""
        asked = self._setup.interruption.requested > 0
        count = self._accelerator.num_processes
        if count == 1:
            return loss.item(), asked
        both = torch.stack([loss, torch.full_like(loss, asked)])
        total, asking = self._accelerator.reduce(both).tolist()
        return total / count, asking > 0

    def _evaluation_is_due(self) -> bool:
        state = self._state
        if state.history and state.history[-1]["step"] == state.step:
            return False
        return state.step % self._config.evaluation.every == 0 or state.step == self._stage.steps

    def _evaluate(self, watch: Watch) -> None:
        state, stage = self._state, self._stage
        row: dict[str, float] = {"step": state.step}
        if state.history:
            row["train_loss"] = state.loss_sum / (state.step - state.history[-1]["step"])
        if self._accelerator.num_processes > 1:
            # DDP shares out the first process's running statistics before each pass, not after the
            # last one; all are to measure, and go on with, the same network.
            broadcast(list(self._network.buffers()))
        self._seed(Purpose.EVALUATION)
        row |= self._evaluations.figures(stage, self._plain_objective)
        if self._patience.wanted:
            self._patience.note(self._evaluations.stopping_loss(stage, self._plain_objective))
        if stage.fsp:
            self._show_matrices(watch)
        watch.log(state.step, row)
        state.history.append(row)
        state.loss_sum = 0.0

    def _show_matrices(self, watch: Watch) -> None:
        """To TensorBoard, at the ends of the stage and each tenth of it; the first are kept."""
        state, fsp = self._state, self._evaluations.fsp()
        tenth = max(1, self._stage.steps // 10)
        first = not state.history
        due = first or state.step // tenth > state.history[-1]["step"] // tenth
        if not due:
            return
        matrices = fsp.matrices(self._plain_objective)
        if first:
            state.tensors |= numbered("before", matrices)
        for index, (ours, theirs) in enumerate(zip(matrices, fsp.teacher_matrices, strict=True)):
            watch.matrices(state.step, f"pair {index}", ours, theirs)

    def _keep_matrices(self) -> None:
        fsp, before = self._evaluations.fsp(), self._state.part("before")
        tensors = (
            numbered("teacher", fsp.teacher_matrices)
            | named("before", before)
            | numbered("after", fsp.matrices(self._plain_objective))
        )
        if self._accelerator.is_main_process:
            note = {"pairs": [to_tree(pair) for pair in self._job.pairs]}
            checkpoint.save(self._job.folder / MATRICES, tensors, note)

    def _save(self) -> None:
        """A checkpoint of this moment, by the first process; unless it is the last one's moment."""
        state = self._state
        if self._saved_at == state.step:
            return
        if not all(bool(weights.isfinite().all()) for weights in self._network.parameters()):
            self._give_up(f"weights are not finite after step {state.step}")
        number = sum(stage.steps + 1 for stage in self._job.stages[: self._index]) + state.step
        tensors = named("network", self._network.state_dict())
        if self._projection is not None:
            tensors |= named("projection", self._projection.state_dict())
        tensors |= named("optimizer", optimizer_tensors(self._optimizer))
        tensors |= named("before", state.part("before"))
        state.patience = self._patience.state()
        scaler = self._accelerator.scaler
        state.scaler = None if scaler is None else scaler.state_dict()
        note = state.note() | {"settings": self._job.settings}
        if self._accelerator.is_main_process:
            self._last_checkpoint = self._series.save(number, tensors, note)
        self._saved_at = state.step

    def _restore(self) -> None:
        """Go on from ``state``; the network has its weights already."""
        state = self._state
        load_part(self._projection, state, "projection")
        restore_optimizer(self._optimizer, state.part("optimizer"))
        if state.patience is not None:
            self._patience.load(state.patience)
        if state.scaler is not None and self._accelerator.scaler is not None:
            self._accelerator.scaler.load_state_dict(state.scaler)
        state.tensors = named("before", state.part("before"))
        self._saved_at = state.step
        self._last_checkpoint = next(reversed(self._series.paths()), None)

    def _complain(self, value: float) -> None:
        """Find out which loss of which batch is not finite, and say so."""
        where = None
        step = self._state.step
        for micro, batch in enumerate(self._batches(step, step + 1)):
            self._seed(Purpose.STEP, micro, self._accelerator.process_index)
            # To the end, with all processes: batch normalisation may need them.
            found = self._not_finite(batch)
            where = where or found
        if where is None:
            where = "by another process's images, or by the teacher's targets"
        self._give_up(f"the loss is {value} in step {step + 1}: {where}")

    def _give_up(self, why: str) -> NoReturn:
        kept = self._last_checkpoint or "none"
        raise DistillError(
            f"{self._job.label}, {self._stage.name}: {why}; last good checkpoint: {kept}; "
            f"try a smaller learning rate"
        )

    @torch.no_grad()
    def _not_finite(self, batch: Batch) -> str | None:
        objective, targets = self._plain_objective, self._targets(batch)
        with self._accelerator.autocast():
            logits, maps = objective.student.uncompiled(batch.images)
            losses = objective.fsp_losses(maps, targets)
        for pair, loss in zip(self._job.pairs, losses, strict=False):
            if not math.isfinite(loss.item()):
                return f"the FSP loss of {' -> '.join(pair.student)} is {loss.item()}"
        if not bool(logits.isfinite().all()):
            return "the student's logits are not finite"
        return None

    def _targets(self, batch: Batch) -> Targets:
        if not self._stage.needs_teacher:
            return Targets()
        assert self._teacher is not None
        return self._teacher.targets(batch)

    def _batches(self, first: int, steps: int, workers: int = 0) -> Generator[Batch, None, None]:
        """This process's parts of the batches of steps ``first`` to ``steps``, on the device."""
        batches = training_batches(
            self._job.images,
            batch_size=self._job.data.batch_size,
            seed=self._job.seed,
            first_step=first,
            steps=steps,
            accumulation=self._config.execution.accumulation,
            process=self._accelerator.process_index,
            processes=self._accelerator.num_processes,
            workers=workers,
        )
        return on_device(batches, self._accelerator.device, self._config)

    def _seed(self, purpose: Purpose, *numbers: int) -> None:
        seed_everything(self._job.seed, purpose, self._index, self._state.step, *numbers)

    def _leaves_weights_out(self, objective: Objective) -> bool:
        """Whether a weight gets no gradient, which DDP must know of, and looks for in vain if told.

        The FSP loss alone has no use for the head, and a user's network may have any weights.
        """
        if self._accelerator.num_processes == 1:
            return False
        batch = next(self._batches(self._state.step, self._state.step + 1))
        with by_batch_statistics(objective), torch.enable_grad(), self._accelerator.autocast():
            objective(batch.images, batch.labels, self._targets(batch)).backward()
        left_out = any(p.grad is None for p in objective.parameters() if p.requires_grad)
        objective.zero_grad()
        return left_out

    def _new_projection(self) -> Projection | None:
        if not (self._stage.fsp and self._config.fsp.projection):
            return None
        return Projection(self._job.shapes).to(self._accelerator.device)
