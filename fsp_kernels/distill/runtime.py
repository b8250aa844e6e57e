"""The devices and processes that a recipe's networks are trained on."""

from __future__ import annotations

import os

import torch
from accelerate import Accelerator
from accelerate.utils import GradientAccumulationPlugin
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from fsp_kernels.distill.config import Config, Network
from fsp_kernels.distill.data import Splits
from fsp_kernels.distill.interruption import Interruption
from fsp_kernels.distill.models import build_model
from fsp_kernels.distill.monitor import Monitor
from fsp_kernels.distill.seeds import Purpose, seed_everything
from fsp_kernels.errors import DistillError

# Variables by which accelerate launch asks for what the trainer does not do.
_REFUSED = (
    "ACCELERATE_USE_DEEPSPEED",
    "ACCELERATE_USE_FSDP",
    "ACCELERATE_USE_MEGATRON_LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG",
    "ACCELERATE_USE_SAGEMAKER",
    "ACCELERATE_DYNAMO_BACKEND",
)


class Runtime:
    """What all training and evaluation of a process shares.

    Attributes:
        config: the recipe.
        accelerator: one device, or the process's place among those of a launcher.
        monitor: shows progress.
        interruption: says whether to stop.

    Raises:
        DistillError: the launcher, or the recipe's ``execution``, asks for what this machine does
            not have.
    """

    def __init__(self, config: Config, monitor: Monitor, interruption: Interruption) -> None:
        self.config, self.monitor, self.interruption = config, monitor, interruption
        self.accelerator = _make_accelerator(config)
        if config.execution.threads is not None:
            torch.set_num_threads(config.execution.threads)

    def new_network(self, network: Network, splits: Splits, seed: int, where: str) -> nn.Module:
        """Build a network on the device.

        Args:
            network: the recipe's description of it.
            splits: its data, which give the numbers of channels and classes.
            seed: of its weights, unless the recipe says where they come from.
            where: the network's section of the recipe, for messages.
        """
        execution = self.config.execution
        seed_everything(seed, Purpose.WEIGHTS)
        channels = splits.image_shape[0]
        model = build_model(network, in_channels=channels, classes=splits.classes, where=where)
        if execution.sync_batch_norm and self.accelerator.num_processes > 1:
            model = synchronise_batch_norm(model)
        model.to(self.accelerator.device)
        return model.to(memory_format=torch.channels_last) if execution.channels_last else model


def synchronise_batch_norm(network: nn.Module) -> nn.Module:
    """``network`` with PyTorch's SyncBatchNorm in place of its batch normalisations.

    Raises:
        DistillError: one of them does more than normalise, as timm's that also activate do.
            PyTorch would replace it all the same.
    """
    for path, module in network.named_modules():
        plain = (_BatchNorm.forward, nn.SyncBatchNorm.forward)
        if isinstance(module, _BatchNorm) and type(module).forward not in plain:
            raise DistillError(
                f"execution.sync_batch_norm: is true, must be false: {path} is a "
                f"{type(module).__name__}, which does more than batch normalisation"
            )
    return nn.SyncBatchNorm.convert_sync_batchnorm(network)


def _make_accelerator(config: Config) -> Accelerator:
    execution = config.execution
    _check_launcher()
    accelerator = Accelerator(
        # Without a GPU, each process would otherwise take itself for the only one.
        cpu=int(os.environ.get("WORLD_SIZE", "1")) > 1 and not _gpus(),
        mixed_precision={"fp32": "no"}.get(execution.precision, execution.precision),
        gradient_accumulation_plugin=GradientAccumulationPlugin(
            num_steps=execution.accumulation, sync_with_dataloader=False
        ),
    )
    if accelerator.device.type == "cpu":
        if execution.precision == "fp16":
            raise DistillError("execution.precision: is 'fp16', must be 'fp32' or 'bf16' on a CPU")
        if execution.sync_batch_norm:
            raise DistillError(
                "execution.sync_batch_norm: is true, must be false on a CPU: PyTorch's "
                "SyncBatchNorm works on GPUs only"
            )
    return accelerator


def _check_launcher() -> None:
    """Raise a ``DistillError`` if torchrun or accelerate launch asks for what cannot be done."""
    for name in _REFUSED:
        if os.environ.get(name, "no").lower() not in ("no", "false", "0", ""):
            raise DistillError(
                f"{name}: is {os.environ[name]!r}, must be unset: networks are trained by "
                "DistributedDataParallel, and compiled if execution.compile is true; choose none "
                "of it in accelerate config"
            )
    here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if _gpus() and here > _gpus():
        raise DistillError(
            f"the launcher started {here} processes on this machine, which has {_gpus()} GPUs; "
            f"start at most as many"
        )


def _gpus() -> int:
    """The number of GPUs that processes can train on together, which a Mac's GPU cannot."""
    kind = torch.accelerator.current_accelerator(check_available=True)
    return 0 if kind is None or kind.type == "mps" else torch.accelerator.device_count()
