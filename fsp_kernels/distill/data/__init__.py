"""The images: which ones each network sees, and the batches they come in."""

from fsp_kernels.distill.data.batches import (
    EvaluationBatches,
    check_batch_size,
    training_batches,
)
from fsp_kernels.distill.data.split import Batch, Sample, Split, Splits
from fsp_kernels.distill.data.splits import load_splits

__all__ = [
    "Batch",
    "EvaluationBatches",
    "Sample",
    "Split",
    "Splits",
    "check_batch_size",
    "load_splits",
    "training_batches",
]
