"""The logits of a network that gives them within a tuple, a mapping or an object."""

from __future__ import annotations

from torch import Tensor, nn

from fsp_kernels.distill.errors import DistillError, prefixed
from fsp_kernels.distill.paths import parse_path, select


class SelectLogits:
    """A forward hook that leaves of all that a network gives its logits alone.

    Copies and files of the network have it too; DDP, ``torch.compile`` and ``torch.export`` run it.
    A tensor stays as it is, since there are networks that give more than logits only in training.

    Args:
        path: of the logits, as ``:output[0]`` or ``:output.logits``.
        where: the path's key in a recipe, for messages.

    Raises:
        DistillError: ``path`` is no path, or one of a module within the network. Or, as the network
            runs: there is no tensor.
    """

    def __init__(self, path: str, where: str) -> None:
        self._where = where
        with prefixed(where):
            self._path = parse_path(path)
        if self._path.module or self._path.side != "output":
            raise DistillError(
                f"{where}: is {path!r}, must choose in the network's own output, as ':output[0]'"
            )

    def __call__(self, _network: nn.Module, _args: object, output: object) -> Tensor:
        if isinstance(output, Tensor):
            return output
        with prefixed(self._where):
            return select(output, self._path)
