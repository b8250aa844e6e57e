"""What a run's numbers may depend on, without names of the machine or its user."""

from __future__ import annotations

import platform

import torch

from fsp_kernels._machine import cores, cpu_model, installed

_PACKAGES = ("fsp-kernels", "torch", "torchvision", "accelerate", "numpy")


def describe_environment(device: torch.device) -> dict[str, str]:
    """Versions, platform and device, by name."""
    name = f"{cpu_model()}, {cores()} cores" if device.type == "cpu" else device.type
    return {
        "python": platform.python_version(),
        **{package: installed(package) for package in _PACKAGES},
        "platform": f"{platform.system()} {platform.machine()}",
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else name,
    }
