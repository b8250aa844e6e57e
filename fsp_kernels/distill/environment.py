"""What a run's numbers may depend on; nothing that names the machine or its user."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

import torch

_PACKAGES = ("fsp-kernels", "torch", "torchvision", "accelerate", "numpy")


def describe_environment(device: torch.device) -> dict[str, str]:
    """Versions, platform and device, by name."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return found | {"platform": f"{platform.system()} {platform.machine()}", "device": name}
