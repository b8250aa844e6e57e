"""Drop-in replacements for the FSP losses of other libraries: change one import, keep the rest.

| from | here |
|---|---|
| RepDistiller, ``distiller_zoo/FSP.py`` | `fsp_kernels.compat.repdistiller.FSP` |
| Knowledge-Distillation-Zoo, ``kd_losses/fsp.py`` | `fsp_kernels.compat.kd_zoo.FSP` |
| torchdistill, ``torchdistill/losses/mid_level.py`` | `fsp_kernels.compat.torchdistill.FSPLoss` |
| TextBrewer, ``textbrewer/losses.py`` | `fsp_kernels.compat.textbrewer.fsp_loss` |

Each has the constructor, call signature and value of what it replaces. Like the original, it
passes gradients to the teacher's maps unless you detach them. All of them differ in these points:
maps of any strides are accepted (the first two libraries fail on crops such as ``x[..., 1:-1]``),
the loss of half-precision maps is fp32, and it is once differentiable, as `fsp_kernels.fsp_loss`
is. In the three classes, maps of three axes need the constructor's ``channel_dim``, which is that
of `fsp_loss`; 1 matches the first two libraries. None of the libraries is imported here.
"""

from fsp_kernels.compat import kd_zoo, repdistiller, textbrewer, torchdistill

__all__ = ["kd_zoo", "repdistiller", "textbrewer", "torchdistill"]
