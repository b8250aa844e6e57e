"""What the machine code of a workload's launches is read to be, and the times it is predicted."""

import json
import os
import subprocess
import sys
from collections import Counter

import pytest
import torch

pytest.importorskip("triton")

from benchmarks.kernel_model import CHIPS, Memory, loops_by_entry, residency, step_cycles
from benchmarks.machine_code import Loop, product_of

H100 = CHIPS["sm_90"]


def facts(*arguments):
    """What ``python -m benchmarks.kernels --json -`` prints, without Triton's interpreter."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "benchmarks.kernels", *arguments, "--json", "-"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


# One whose loops all stay, one whose gradients' loops are unrolled; rows are multiples of 4 bytes.
@pytest.mark.slow
@pytest.mark.parametrize("workload", ["cifar-resnet", "tokens-vit-b"])
def test_loops_read_and_write_units_and_wait_at_few_barriers(workload):
    (found,) = facts("--workload", workload, "--dtype", "bf16")
    assert found["predicted_us"] > found["floor_us"] > 0
    loops = [loop for launch in found["launches"] for loop in launch["loops"]]
    assert {"residual.residual_tile", "elementwise.fsp_finish"} <= {x["function"] for x in loops}
    for loop in loops:
        assert "LDG 2" not in loop
        assert "STG 2" not in loop
        assert loop["function"] == "in no loop" or loop.get("BAR", 0) <= 4
    for launch in found["launches"]:
        assert launch["kernel"] == "fsp_finish" or launch["programs"] >= H100.sms
    products = sum(n for loop in loops for name, n in loop.items() if "MMA" in name)
    assert products > 0


def test_a_chip_without_a_model_is_refused():
    result = subprocess.run(
        [sys.executable, "-m", "benchmarks.kernels", "--workload", "all", "--family", "sm_120"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 2
    assert "sm_80, sm_90" in result.stderr


@pytest.mark.parametrize(
    ("name", "unit", "flops"),
    [
        ("HMMA.16816.F32.BF16", "HMMA 16", 2 * 16 * 8 * 16),
        ("HMMA.1688.F32.TF32", "HMMA tf32", 2 * 16 * 8 * 8),
        ("HGMMA.64x128x16.F32.BF16", "HGMMA 16", 2 * 64 * 128 * 16 // 4),
        ("HGMMA.64x32x8.F32.TF32", "HGMMA tf32", 2 * 64 * 32 * 8 // 4),
    ],
)
def test_flops_of_an_instruction(name, unit, flops):
    assert product_of(name) == (unit, flops)


def loop(function="gram._sweep", **counts):
    named = {name.replace("_", " "): n for name, n in counts.items()}
    return Loop(function, 0, 99, Counter(named))


def test_loads_that_are_not_asynchronous_are_waited_for():
    waits = step_cycles(loop(instructions=50, LDG_2=4), 4, 3, 1, H100)
    copies = step_cycles(loop(instructions=400, LDGSTS_16=4), 4, 3, 1, H100)
    assert waits["latency"] == 2 * 50 + 600
    assert copies["latency"] == 2 * 400  # hidden by two steps of as many cycles


def test_programs_side_by_side_share_what_an_sm_has():
    one, two = (step_cycles(loop(instructions=80), 8, 2, n, H100) for n in (1, 2))
    assert (one["instructions"], two["instructions"]) == (160, 320)
    assert one["latency"] == two["latency"]


@pytest.mark.parametrize(
    ("warps", "registers", "shared", "programs"),
    [(8, 255, 0, 1), (4, 128, 0, 4), (4, 32, 100 << 10, 2), (1, 16, 0, 32)],
)
def test_how_many_programs_an_sm_holds(warps, registers, shared, programs):
    assert residency(warps, registers, shared, H100) == programs


def test_loops_belong_to_the_pairs_in_order_and_unrolled_ones_to_the_shortest():
    class Entry:
        def __init__(self, channels):
            self.m = self.block_m = type("Constant", (), {"value": channels})
            self.block_m = type("Constant", (), {"value": 16})

    entries = [Entry(512), Entry(64), Entry(1024)]
    loops = [loop(instructions=i) for i in range(6)]
    assert loops_by_entry(loops, entries) == [loops[:2], loops[2:4], loops[4:]]
    assert loops_by_entry(loops[:2], entries) == [loops[:1], [], loops[1:2]]


def test_what_the_l2_still_holds_is_not_read_again():
    x, y, z = (torch.empty(100, dtype=torch.uint8, device="meta") for _ in range(3))
    memory = Memory(250)
    assert memory.bytes_of([x, x], [y]) == 200  # read once, written
    assert memory.bytes_of([x, y], [z]) == 100
    assert memory.bytes_of([x], []) == 100  # 300 bytes later
