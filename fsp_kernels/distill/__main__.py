"""``python -m fsp_kernels.distill``: ``fsp-distill`` for launchers that want a module."""

from fsp_kernels.distill.cli import main

main()
