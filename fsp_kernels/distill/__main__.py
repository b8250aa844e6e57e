"""``python -m fsp_kernels.distill`` is ``fsp-distill``, for launchers that need a module."""

from fsp_kernels.distill.cli import main

main()
