"""The reference trainer: FSP distillation end to end (extra ``train``, script ``fsp-distill``).

What needs PyTorch alone can be imported from here; the rest needs the extra.
"""

from fsp_kernels.distill.taps import FeatureTaps

__all__ = ["FeatureTaps"]
