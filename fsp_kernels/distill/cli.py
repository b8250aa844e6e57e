"""The entry point of ``fsp-distill``; it works without the extra ``train``, to say so."""

from __future__ import annotations

import sys

from fsp_kernels._machine import prepare_terminal


def main() -> None:
    """Run the command line. Without the extra ``train`` the exit code is 2."""
    prepare_terminal()
    try:
        from fsp_kernels.distill.commands import app
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("fsp_kernels"):
            raise
        print(
            f"fsp-distill needs the package {error.name}: pip install 'fsp-kernels[train]'",
            file=sys.stderr,
        )
        raise SystemExit(2) from None
    app()
