"""Batch normalisation by the statistics of all processes' images, on the CPU too."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fsp_kernels.distill.errors import DistillError

# What has a forward pass of its own does more than these.
_PLAIN = (_BatchNorm.forward, nn.SyncBatchNorm.forward)


class SyncBatchNormOnCpu(_BatchNorm):
    """What ``nn.SyncBatchNorm`` does, which runs on GPUs alone; every process has as many images.

    Slower than it need be: two rounds of communication for each layer and pass.
    """

    def _check_input_dim(self, input: Tensor) -> None:  # noqa: A002
        if input.dim() < 2:
            raise ValueError(f"expected at least 2D input (got {input.dim()}D input)")

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        """``(B, C, *spatial)`` to the same."""
        if not self.training:
            return super().forward(input)
        dtype = input.dtype
        if dtype in (torch.bfloat16, torch.float16):  # too coarse for statistics
            input = input.float()  # noqa: A001
        axes = [axis for axis in range(input.dim()) if axis != 1]
        shape = [1, -1, *(1 for _ in axes[1:])]
        processes = dist.get_world_size()
        # The mean first: squares of what is far from it would cancel.
        mean = _sum(input.mean(axes)) / processes
        centred = input - mean.view(shape)
        variance = _sum(centred.square().mean(axes)) / processes
        self._remember(mean.detach(), variance.detach(), input.numel() // len(mean) * processes)
        normal = centred * torch.rsqrt(variance + self.eps).view(shape)
        if self.weight is not None:
            normal = normal * self.weight.view(shape) + self.bias.view(shape)
        return normal.to(dtype)

    @torch.no_grad()
    def _remember(self, mean: Tensor, variance: Tensor, count: int) -> None:
        if not self.track_running_stats:
            return
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        share = self.momentum
        if share is None:
            share = 1.0 / float(self.num_batches_tracked)
        for kept, seen in ((self.running_mean, mean), (self.running_var, variance)):
            assert kept is not None
            kept.lerp_(seen * (count / (count - 1) if kept is self.running_var else 1.0), share)


def synchronised(network: nn.Module, device: torch.device) -> nn.Module:
    """``network`` with all its batch normalisations over all processes; weights are kept.

    Raises:
        DistillError: one of them does more than normalise, as timm's that also activate; put in its
            place, PyTorch's would not.
    """
    for path, module in network.named_modules():
        if isinstance(module, _BatchNorm) and type(module).forward not in _PLAIN:
            raise DistillError(
                f"execution.sync_batch_norm: is true, must be false: {path} is a "
                f"{type(module).__name__}, which does more than batch normalisation"
            )
    if device.type != "cpu":
        return nn.SyncBatchNorm.convert_sync_batchnorm(network)
    return _replaced(network)


def _replaced(module: nn.Module) -> nn.Module:
    if isinstance(module, _BatchNorm):
        ours = SyncBatchNormOnCpu(
            module.num_features,
            module.eps,
            module.momentum,
            module.affine,
            module.track_running_stats,
        )
        ours.load_state_dict(module.state_dict())
        return ours.train(module.training)
    for name, child in module.named_children():
        module.add_module(name, _replaced(child))
    return module


class _Sum(torch.autograd.Function):
    """Over all processes; each one's values count in all their losses, so gradients are summed."""

    @staticmethod
    def forward(_ctx: Any, values: Tensor) -> Tensor:
        total = values.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(_ctx: Any, gradient: Tensor) -> Tensor:
        return _Sum.forward(_ctx, gradient)


def _sum(values: Tensor) -> Tensor:
    total: Tensor = _Sum.apply(values)
    return total
