"""What the host's side does around a launch: devices, limits, captured graphs, Python's lock.

On machines without a GPU: the kernels are compiled for a host that has two devices.
"""

from __future__ import annotations

import ctypes

import pytest
import torch
from cuda_entries import flat_map, plain_product
from cuda_on_host.module import Machine, extension_is

import fsp_kernels as fsp
from fsp_kernels.backends import cuda

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the host stands for two GPUs")

FP32, BF16 = torch.float32, torch.bfloat16
CALL_BEFORE = "call it once before capturing$"
KERNEL = ("fsp_residual", "fp32")


@pytest.fixture
def machine(tmp_path):
    """Two devices that nothing has been done on, and the backend that serves them."""
    machine = Machine(tmp_path)
    with extension_is(machine.module):
        yield machine


@pytest.fixture
def on_second_device(monkeypatch):
    """Maps count as those of the second device."""
    for user in (cuda, cuda.loss, cuda.product):
        monkeypatch.setattr(user, "index_of", lambda _: 1)


def loss_of(channels: int = 8, dtype: torch.dtype = FP32) -> torch.Tensor:
    pairs = [
        [tuple(torch.randn(2, channels, 8, 8).to(dtype).requires_grad_() for _ in range(2))]
        for _ in range(2)
    ]
    return fsp.fsp_loss(*pairs, backend="cuda")


def product(machine: Machine, device: int, **changes):
    """One launch: a (1, 1) matrix of maps of one position, at the addresses that a call brings."""
    module = machine.module
    first, second, out = (flat_map(module, slot, 1, 1, 1, "fp32") for slot in range(3))
    pair = plain_product(module, maps=[first, second, None, None], out=out, **changes)
    program = module.LaunchSequence(device, "a product")
    program.add_residual(module.Scalar.fp32, [pair])
    return program


def launch(machine: Machine, device: int) -> None:
    numbers = torch.ones(3)
    product(machine, device)(0, [x.data_ptr() for x in numbers], [1.0])


def scale(machine: Machine, device: int) -> None:
    factor, gradient = torch.ones(()), torch.ones(4)
    fp32 = machine.module.Scalar.fp32
    tensors = [(gradient.data_ptr(), gradient.data_ptr(), 4, fp32, fp32, 0)]
    machine.module.scale(device, 0, tensors, factor.data_ptr(), False)


# --- shared memory --------------------------------------------------------------------------------


@pytest.mark.usefixtures("machine")
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_a_program_runs_after_one_of_the_same_kernel_that_needs_less_shared_memory(dtype):
    for channels in (64, 32, 64):
        assert loss_of(channels, dtype).isfinite()


# --- devices --------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", [0, 1])
@pytest.mark.parametrize(
    ("act", "launches"),
    [
        (lambda machine, device: machine.module.why_not_on(device, 0), 0),
        (lambda machine, device: product(machine, device), 0),
        (launch, 1),
        (scale, 1),
    ],
    ids=["asking", "preparing", "launching", "scaling"],
)
def test_work_is_done_on_its_device_and_the_current_one_stays(machine, act, launches, device):
    act(machine, device)
    assert machine.current_device == 0
    expected = [0, 0]
    expected[device] = launches
    assert list(machine.seen.launches) == expected


@pytest.mark.usefixtures("on_second_device")
def test_a_call_for_the_second_device_runs_there(machine):
    (3 * loss_of()).backward()
    assert machine.current_device == 0
    first, second = machine.seen.launches
    assert (first, second >= 3) == (0, True)  # the loss, its sum, and the scaling


def test_the_current_device_stays_after_an_error(machine):
    with pytest.raises(RuntimeError, match="invalid configuration argument"):
        product(machine, 1, samples=0)(0, [0, 0, 0], [1.0])
    assert machine.current_device == 0


def test_a_device_that_is_not_there_is_told(machine):
    assert machine.module.why_not_on(2, 0) == "invalid device ordinal"
    assert machine.module.why_not_on(1, 0) == ""


# --- captured graphs ------------------------------------------------------------------------------


@pytest.mark.parametrize("device", [0, 1])
@pytest.mark.parametrize(
    "act",
    [lambda machine, device: machine.module.why_not_on(device, 0), launch, scale],
    ids=["asking", "launching", "scaling"],
)
def test_a_first_call_while_a_graph_is_captured_is_an_error_that_says_what_to_do(
    machine, act, device
):
    machine.seen.capturing = True
    with pytest.raises(RuntimeError, match=rf"first used on cuda:{device}.*{CALL_BEFORE}"):
        act(machine, device)
    assert list(machine.seen.launches) == [0, 0]
    machine.seen.capturing = False
    act(machine, device)


def test_after_one_call_every_other_can_be_captured(machine):
    loss_of()
    machine.seen.capturing = True
    before = machine.seen.launches[0]
    for dtype in (FP32, BF16, torch.float16):
        for channels in (8, 70, 140):
            (3 * loss_of(channels, dtype)).backward()
    assert machine.seen.launches[0] >= before + 3 * 3 * 3


# --- Python's lock --------------------------------------------------------------------------------


@pytest.mark.parametrize("act", [launch, scale])
def test_other_python_threads_go_on_during_a_launch(machine, act):
    holds_the_lock = ctypes.cast(ctypes.pythonapi.PyGILState_Check, ctypes.c_void_p)
    machine.seen.observer, machine.seen.observed = holds_the_lock.value, -1
    act(machine, 0)
    machine.seen.observer = None
    assert machine.seen.observed == 0


# --- sizes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "blocks"),
    [
        ({"samples": 1 << 30, "parts": 4}, 1 << 32),  # 0 in 32 bits
        ({"samples": 1 << 30, "channels": (65, 1)}, 1 << 31),
        ({"channels": (1 << 22, 1 << 22)}, 1 << 32),
    ],
    ids=["parts", "samples", "tiles"],
)
def test_more_blocks_than_a_launch_can_have_are_an_error(machine, changes, blocks):
    with pytest.raises(ValueError, match=rf"^fsp_residual on a product would take {blocks} blocks"):
        product(machine, 0, **changes)


@pytest.mark.parametrize(
    "changes",
    [{"samples": 1 << 31}, {"channels": (1, (1 << 31) - 1)}, {"positions": (1 << 32, 1)}],
    ids=lambda changes: next(iter(changes)),
)
def test_a_size_beyond_32_bits_is_an_error(machine, changes):
    (what,) = changes
    with pytest.raises(
        ValueError, match=rf"^{what} are \d+, but the kernels .* at most 2147482623"
    ):
        product(machine, 0, **changes)


# --- what is launched -----------------------------------------------------------------------------


def test_a_program_tells_what_its_launches_take(machine):
    [facts] = product(machine, 0).launches
    assert (facts.kernel, facts.operand, facts.tile) == ("fsp_residual", "fp32", 0)
    assert (facts.blocks, facts.threads) == ([1], 256)
    [(_, _, _, one, two)] = [x for x in machine.module.shared_bytes() if x[:2] == KERNEL]
    assert (facts.stages, facts.shared_bytes) == (2, two)
    machine.module.assume_chip(major=7, most_shared_bytes=64 << 10)  # Turing copies nothing itself
    [facts] = product(machine, 5).launches  # of a device that is not there
    assert (facts.stages, facts.shared_bytes) == (1, one)
