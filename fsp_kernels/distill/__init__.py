"""The reference trainer: FSP distillation end to end (extra ``train``, script ``fsp-distill``)."""

from fsp_kernels.features.taps import FeatureTaps

__all__ = ["FeatureTaps"]
