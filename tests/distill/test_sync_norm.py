"""Batch normalisation over two processes against that of the whole batch in one."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from distill.processes import run_group
from fsp_kernels.distill.errors import DistillError
from fsp_kernels.distill.models import CifarResNet
from fsp_kernels.distill.sync_norm import SyncBatchNormOnCpu, synchronised

CPU = torch.device("cpu")
# Two sums of halves for one of the whole: the numbers are below 100, in float64.
TOLERANCE = {"rtol": 0.0, "atol": 1e-12}
SHAPES = [(6, 3, 5, 4), (4, 3, 7), (8, 3)]
OPTIONS: list[dict[str, Any]] = [
    {},
    {"momentum": None},
    {"affine": False},
    {"track_running_stats": False},
]
CASES = list(itertools.product(SHAPES, OPTIONS))
Results = dict[str, Tensor]


def of_one_process(shape: tuple[int, ...], options: dict[str, Any]) -> nn.Module:
    kind = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d}[len(shape)]
    norm = kind(3, dtype=torch.float64, **options)
    if norm.affine:
        with torch.no_grad():
            norm.weight.copy_(torch.tensor([0.5, 2.0, -1.0]))
            norm.bias.copy_(torch.tensor([0.0, 1.0, -3.0]))
    return norm


def batches(shape: tuple[int, ...]) -> list[tuple[Tensor, Tensor]]:
    """Two, of images far from 0 and the weights of a loss of the outputs; halves differ."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for _ in range(2):
        x, weights = torch.randn(2, *shape, generator=generator, dtype=torch.float64)
        ramp = torch.arange(len(x), dtype=torch.float64).view(-1, *(1 for _ in shape[1:]))
        found.append((x * (1 + ramp) + 10, weights))
    return found


def results(norm: nn.Module, shape: tuple[int, ...], half: slice) -> Results:
    """All that two steps over ``half`` of the batches compute, parameters' gradients summed."""
    found: Results = {}
    for number, (x, weights) in enumerate(batches(shape)):
        images = x[half].clone().requires_grad_()
        output = norm(images)
        (output.square() * weights[half]).sum().backward()
        assert images.grad is not None
        found |= {f"output {number}": output.detach(), f"images' gradient {number}": images.grad}
    found |= {name: p.grad for name, p in norm.named_parameters() if p.grad is not None}
    return found | {name: buffer.double() for name, buffer in norm.named_buffers()}


def run_cases(rank: int, folder: Path) -> None:
    found = []
    for shape, options in CASES:
        norm = synchronised(nn.Sequential(of_one_process(shape, options)).double(), CPU)[0]
        half = slice(0, shape[0] // 2) if rank == 0 else slice(shape[0] // 2, None)
        found.append(results(norm.double(), shape, half))
    torch.save(found, folder / f"{rank}.pt")

    halves = SyncBatchNormOnCpu(3)
    images = batches(SHAPES[0])[0][0][3 * rank : 3 * rank + 3].bfloat16()
    torch.save([halves(images), halves.running_mean, halves.running_var], folder / f"half{rank}.pt")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the two processes made of all cases."""
    folder = tmp_path_factory.mktemp("group")
    run_group(2, run_cases, folder)
    return folder


@pytest.mark.parametrize("case", range(len(CASES)), ids=lambda case: str(CASES[case]))
def test_two_processes_compute_what_one_does_of_the_whole_batch(folder: Path, case: int) -> None:
    shape, options = CASES[case]
    expected = results(of_one_process(shape, options), shape, slice(None))
    first, second = (torch.load(folder / f"{rank}.pt")[case] for rank in range(2))
    assert first.keys() == second.keys() == expected.keys()
    for name, whole in expected.items():
        if "output" in name or "images" in name:
            found = torch.cat([first[name], second[name]])
        elif name in ("weight", "bias"):
            found = first[name] + second[name]  # DDP adds them, too, but for a factor
        else:  # buffers
            assert torch.equal(first[name], second[name]), name
            found = first[name]
        torch.testing.assert_close(
            found, whole, **TOLERANCE, msg=lambda text, n=name: f"{n}: {text}"
        )


def test_statistics_of_half_precision_are_taken_in_single(folder: Path) -> None:
    whole = batches(SHAPES[0])[0][0].bfloat16()
    norm = nn.BatchNorm2d(3)
    expected = norm(whole.float()).bfloat16()
    halves = [torch.load(folder / f"half{rank}.pt") for rank in range(2)]
    output = torch.cat([half[0] for half in halves])
    assert output.dtype == torch.bfloat16
    # Half an ulp of bfloat16 where a float32 falls on the other side of it.
    torch.testing.assert_close(output, expected, rtol=2**-8, atol=0)
    torch.testing.assert_close(halves[0][1], norm.running_mean, rtol=1e-6, atol=0)
    torch.testing.assert_close(halves[0][2], norm.running_var, rtol=1e-6, atol=0)


def test_in_evaluation_it_is_batch_normalisation_and_needs_no_group() -> None:
    norm = of_one_process(SHAPES[0], {})
    x = batches(SHAPES[0])[0][0]
    norm(x)
    synced = SyncBatchNormOnCpu(3).double()
    synced.load_state_dict(norm.state_dict())
    assert torch.equal(synced.eval()(x), norm.eval()(x))


def test_all_of_a_network_is_converted_and_its_weights_stay() -> None:
    network = CifarResNet(8)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    count = sum(isinstance(module, nn.BatchNorm2d) for module in network.modules())
    converted = synchronised(network, CPU)
    kinds = [type(module) for module in converted.modules()]
    assert kinds.count(SyncBatchNormOnCpu) == count > 0
    assert nn.BatchNorm2d not in kinds
    assert list(converted.state_dict()) == list(before)
    assert all(torch.equal(x, before[name]) for name, x in converted.state_dict().items())


def test_what_does_more_than_normalise_is_refused() -> None:
    class BatchNormAndRelu(nn.BatchNorm2d):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).relu()

    network = nn.Sequential(nn.Conv2d(3, 3, 1), BatchNormAndRelu(3))
    with pytest.raises(DistillError, match=r"execution\.sync_batch_norm: .* 1 is a BatchNormAndRe"):
        synchronised(network, CPU)


def test_an_input_of_one_axis_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 2D"):
        SyncBatchNormOnCpu(3).eval()(torch.zeros(3))
