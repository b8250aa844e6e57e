"""Training one network: its stages one after the other, from wherever an earlier process was."""

from __future__ import annotations

import os

import torch
from accelerate import Accelerator
from accelerate.utils import GradientAccumulationPlugin
from torch import nn

from fsp_kernels.distill.changes import check_changes, differing
from fsp_kernels.distill.checkpoint import Series
from fsp_kernels.distill.config import Config, Network
from fsp_kernels.distill.data import Splits
from fsp_kernels.distill.errors import DistillError
from fsp_kernels.distill.evaluation import Evaluations
from fsp_kernels.distill.interruption import Interruption
from fsp_kernels.distill.job import Job, Setup
from fsp_kernels.distill.models import build_model
from fsp_kernels.distill.monitor import Monitor
from fsp_kernels.distill.records import Phase
from fsp_kernels.distill.seeds import Purpose, seed_everything
from fsp_kernels.distill.stage_run import StageRun
from fsp_kernels.distill.state import State, load_part
from fsp_kernels.distill.storage import require_agreement
from fsp_kernels.distill.sync_norm import synchronised
from fsp_kernels.distill.teacher import Teacher

# How accelerate launch asks for what it can do and the trainer doesn't.
_REFUSED = (
    "ACCELERATE_USE_DEEPSPEED",
    "ACCELERATE_USE_FSDP",
    "ACCELERATE_USE_MEGATRON_LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG",
    "ACCELERATE_USE_SAGEMAKER",
    "ACCELERATE_DYNAMO_BACKEND",
)


class Trainer:
    """A recipe's arithmetic on the devices there are: one process, or one of several.

    Everything random in a step is drawn from seeds that depend on the job's seed and the step: the
    same job on the same machine, with the same number of threads and processes, gives the same
    weights bit for bit, whether or not it was interrupted in between.

    Raises:
        DistillError: ``execution`` asks for what this machine doesn't have.
    """

    def __init__(self, config: Config, monitor: Monitor, interruption: Interruption) -> None:
        self.config, self.monitor, self.interruption = config, monitor, interruption
        self.accelerator = make_accelerator(config)
        if config.execution.threads is not None:
            torch.set_num_threads(config.execution.threads)

    @property
    def setup(self) -> Setup:
        """What there is to train and to measure with."""
        return Setup(self.config, self.accelerator, self.monitor, self.interruption)

    def new_network(self, network: Network, splits: Splits, seed: int, where: str) -> nn.Module:
        """A network on the device, its weights from ``seed`` or from where the recipe says."""
        execution, device = self.config.execution, self.accelerator.device
        seed_everything(seed, Purpose.WEIGHTS)
        channels = splits.image_shape[0]
        model = build_model(network, in_channels=channels, classes=splits.classes, where=where)
        if execution.sync_batch_norm and self.accelerator.num_processes > 1:
            model = synchronised(model, device)
        model.to(device)
        return model.to(memory_format=torch.channels_last) if execution.channels_last else model

    def train(
        self,
        job: Job,
        network: nn.Module,
        evaluations: Evaluations,
        teacher: Teacher | None = None,
        resume: bool = False,
    ) -> list[Phase]:
        """Train ``network`` in place.

        Args:
            job: what to do.
            network: fresh from ``new_network``.
            evaluations: what to measure on the way.
            teacher: for the stages that need one.
            resume: go on from the newest whole checkpoint in the job's folder, if there is one.

        Raises:
            DistillError: a loss is no longer finite; a checkpoint can't be written; the checkpoints
                are of other settings, or not the same ones to each process.
            InterruptedRunError: by a signal; a checkpoint was written.
        """
        series = Series(job.folder / "checkpoints")
        state = self._earlier(job, series) if resume else None
        require_agreement(state and (len(state.phases), state.step), job.folder)
        if state is None:
            state = State()
        else:
            load_part(network, state, "network")
        if self.config.execution.compile:
            torch.compiler.reset()  # what was compiled for other networks is of no use to this one
        for index in range(len(state.phases), len(job.stages)):
            run = StageRun(self.setup, job, index, network, evaluations, teacher, series, state)
            state = State(phases=[*state.phases, run.run()])
            self.accelerator.free_memory()  # it holds on to all that it prepared
        return state.phases

    def _earlier(self, job: Job, series: Series) -> State | None:
        found = series.newest(self.monitor.say)
        if found is None:
            return None
        path, stored = found
        before, state = stored.note.get("settings", {}), State.of(stored)
        done = len(state.phases)
        check_changes(path, before, job.settings, job.stages, done, state.step)
        others = differing(before, job.settings)
        under = f", with other settings of {', '.join(others)}" if others else ""
        stage = job.stages[done].name
        self.monitor.say(f"{job.label}: going on from {stage}, step {state.step}{under}")
        return state


def make_accelerator(config: Config) -> Accelerator:
    """For the recipe's ``execution``, on what there is: one device, or the launcher's processes.

    Raises:
        DistillError: the launcher, or the recipe, asks for what can't be had here.
    """
    execution = config.execution
    _check_launcher()
    accelerator = Accelerator(
        cpu=_processes() > 1 and not _gpus(),  # else each would take itself for the only one
        mixed_precision={"fp32": "no"}.get(execution.precision, execution.precision),
        gradient_accumulation_plugin=GradientAccumulationPlugin(
            num_steps=execution.accumulation, sync_with_dataloader=False
        ),
    )
    if execution.precision == "fp16" and accelerator.device.type == "cpu":
        raise DistillError("execution.precision: is 'fp16', must be 'fp32' or 'bf16' on a CPU")
    return accelerator


def _check_launcher() -> None:
    """What torchrun and accelerate launch say of the processes can be done here."""
    for name in _REFUSED:
        if os.environ.get(name, "no").lower() not in ("no", "false", "0", ""):
            raise DistillError(
                f"{name}: is {os.environ[name]!r}, must be unset: networks are trained by "
                "DistributedDataParallel, compiled where execution.compile says so; choose none of "
                "it in accelerate config"
            )
    here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if _gpus() and here > _gpus():
        raise DistillError(
            f"the launcher started {here} processes on this machine, which has {_gpus()} GPUs; "
            f"start at most as many"
        )


def _processes() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def _gpus() -> int:
    """How many there are that processes can train on together, which a Mac's GPU isn't made for."""
    kind = torch.accelerator.current_accelerator(check_available=True)
    return 0 if kind is None or kind.type == "mps" else torch.accelerator.device_count()
