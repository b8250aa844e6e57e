"""DTensors on two gloo processes: an error, and what it says to write instead is right."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from distilled_steps import naive_fsp_loss
from processes import run_group
from tolerances import assert_close
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

import fsp_kernels as fsp

pytestmark = pytest.mark.slow
PLACEMENTS = {"batch": Shard(0), "channels": Shard(1), "replicated": Replicate()}


def maps() -> list[Tensor]:
    """The student's pair and the teacher's, the same in every process."""
    torch.manual_seed(0)
    return [torch.randn(4, channels, 6, 6) for channels in (4, 6, 4, 6)]


def distributed(tensors: list[Tensor], placement: str) -> list[Any]:
    mesh = init_device_mesh("cpu", (2,))
    found = [distribute_tensor(x, mesh, [PLACEMENTS[placement]]) for x in tensors]
    return [x.requires_grad_(i < 2) for i, x in enumerate(found)]


CALLS = {
    "fsp_loss": (lambda a, b, c, d: fsp.fsp_loss([(a, b)], [(c, d)]), "student[0][0]"),
    "explain": (lambda a, b, c, d: fsp.explain([(a, b)], [(c, d)]), "student[0][0]"),
    "fsp_matrix": (lambda a, b, c, d: fsp.fsp_matrix(a, b), "first"),  # noqa: ARG005
    "tokens": (
        lambda *maps: fsp.fsp_loss(
            [tuple(x.flatten(2).mT for x in maps[:2])],
            [tuple(x.flatten(2).mT for x in maps[2:])],
            channel_dim=-1,
        ),
        "student[0][0]",
    ),
    "a matrix": (
        lambda a, b, c, d: fsp.fsp_loss(
            [(a.full_tensor(), b.full_tensor())], [torch.einsum("bmhw,bnhw->bmn", c, d)]
        ),
        "teacher[0]",
    ),
    "FSPLoss": (lambda a, b, c, d: fsp.FSPLoss()([(a, b)], [(c, d)]), "student[0][0]"),
    "the teacher alone": (
        lambda a, b, c, d: fsp.fsp_loss([(a.full_tensor(), b.full_tensor())], [(c, d)]),
        "teacher[0][0]",
    ),
}


def raises(_rank: int, placement: str) -> None:
    for call, argument in CALLS.values():
        expected = rf"^{re.escape(argument)}: got a DTensor, expected a plain tensor; if all maps "
        with pytest.raises(TypeError, match=expected + r".*\.to_local\(\).*\.full_tensor\(\)$"):
            call(*distributed(maps(), placement))


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_they_are_an_error(placement: str) -> None:
    run_group(2, raises, placement)


def of_shards(a: Any, b: Any, c: Any, d: Any) -> Tensor:
    a, b, c, d = (x.to_local() for x in (a, b, c, d))
    return fsp.fsp_loss([(a, b)], [(c, d)]) / 2


def of_whole_maps(a: Any, b: Any, c: Any, d: Any) -> Tensor:
    a, b, c, d = (x.full_tensor() for x in (a, b, c, d))
    return fsp.fsp_loss([(a, b)], [(c, d)])


def gradients(_rank: int, instead: Callable[..., Tensor], placement: str) -> None:
    exact = [x.double().requires_grad_() for x in maps()]
    naive_fsp_loss([tuple(exact[:2])], [tuple(exact[2:])]).backward()
    found = distributed(maps(), placement)
    instead(*found).backward()
    for x, expected in zip(found[:2], exact[:2], strict=True):
        assert_close(x.grad.full_tensor(), expected.grad)


@pytest.mark.parametrize(
    ("instead", "placement"),
    [(of_shards, "batch"), (of_whole_maps, "batch"), (of_whole_maps, "channels")],
)
def test_what_the_error_says_to_write_has_the_gradients_of_the_whole_batch(
    instead: Callable[..., Tensor], placement: str
) -> None:
    run_group(2, gradients, instead, placement)
