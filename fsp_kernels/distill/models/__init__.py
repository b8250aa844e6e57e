"""Networks by name, and the weights they start from."""

from fsp_kernels.distill.models.cifar import CifarResNet, WideResNet
from fsp_kernels.distill.models.registry import build_model, parameter_count
from fsp_kernels.distill.models.weights import load_weights, read_weights

__all__ = [
    "CifarResNet",
    "WideResNet",
    "build_model",
    "load_weights",
    "parameter_count",
    "read_weights",
]
