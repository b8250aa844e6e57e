"""The images: which ones each network sees, and the batches they come in."""

from fsp_kernels.distill.data.batches import (
    check_batch_size,
    evaluation_batches,
    training_batches,
)
from fsp_kernels.distill.data.split import Batch, Sample, Split, Splits
from fsp_kernels.distill.data.splits import load_splits

__all__ = [
    "Batch",
    "Sample",
    "Split",
    "Splits",
    "check_batch_size",
    "evaluation_batches",
    "load_splits",
    "training_batches",
]
