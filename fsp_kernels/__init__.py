"""Fused FSP (flow of solution procedure) matrices and distillation loss for PyTorch."""

from fsp_kernels import compat, operators
from fsp_kernels._version import __version__
from fsp_kernels.backends import available_backends, use_backend
from fsp_kernels.distiller import Distilled, Distiller
from fsp_kernels.features.taps import FeatureTaps
from fsp_kernels.functional import explain, fsp_loss, fsp_matrix
from fsp_kernels.loss_plan import LossPlan
from fsp_kernels.modules import FSPLoss, pairs_of

__all__ = [
    "Distilled",
    "Distiller",
    "FSPLoss",
    "FeatureTaps",
    "LossPlan",
    "__version__",
    "available_backends",
    "compat",
    "explain",
    "fsp_loss",
    "fsp_matrix",
    "operators",
    "pairs_of",
    "use_backend",
]
