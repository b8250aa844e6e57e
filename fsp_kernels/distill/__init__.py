"""The reference trainer: FSP distillation end to end (extra ``train``, script ``fsp-distill``).

``FeatureTaps`` needs PyTorch only; everything else needs the extra.
"""

from fsp_kernels.distill.taps import FeatureTaps

__all__ = ["FeatureTaps"]
