"""``fsp-distill``: the entry point, able to say what is missing without the extra ``train``."""

from __future__ import annotations

import sys

from fsp_kernels._machine import prepare_terminal


def main() -> None:
    """Run the command line; exit code 2 when the extra ``train`` is not installed."""
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
