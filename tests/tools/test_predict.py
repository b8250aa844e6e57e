"""The loops that are found in machine code, their steps, and the times that follow."""

import os
import subprocess
import sys
import types
from collections import Counter
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from tools import predict
from tools.launches import Launched, Part, loops_by_entry, unit_of
from tools.machine_code import (
    Instruction,
    Loop,
    instructions_of,
    loops_of,
    name_of_loop,
    product_of,
)
from tools.predict import CHIPS, Memory, conversions, misses, residency, step_cycles

ROOT = Path(__file__).resolve().parents[2]
H100 = CHIPS["sm_90"]


# One whose loops all stay, one whose gradients' loops are unrolled; rows are multiples of 4 bytes.
@pytest.mark.slow
@pytest.mark.parametrize("workload", ["cifar-resnet", "tokens-vit-b"])
def test_launches_of_a_workload_miss_nothing(workload):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tools.predict", workload, "--dtype", "bf16", "--strict"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "Misses" not in result.stdout
    lines = [line.split("  ") for line in result.stdout.splitlines()]
    loops = {line[0].strip(): " ".join(line[1:]) for line in lines if "." in line[0]}
    assert loops.keys() & {"residual.residual_tile", "tiles.fsp_residual"}
    assert "elementwise.fsp_finish" in loops
    assert any("MMA" in text for text in loops.values())


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
    def constant(value):
        return types.SimpleNamespace(value=value)

    class Entry:
        def __init__(self, channels):
            self.m = self.n = constant(channels)
            self.block_m, self.parts = constant(16), constant(2)

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


# --- loops in machine code ------------------------------------------------------------------------

SASS = """
        //## File "/x/tiles.cuh", line 7 inlined at "/x/one.cuh", line 70
        //## File "/x/one.cuh", line 70
        /*0000*/                   MOV R1, c[0x0][0x28] ;
.L_x_1:
        /*0010*/                   HMMA.16816.F32 R4, R8, R12, R4 ;
        //## File "/x/pipe.cuh", line 30
        /*0020*/              @!P0 BRA `(.L_x_1) ;
        /*0030*/                   BRA `(.L_x_2) ;
.L_x_2:
        /*0040*/                   EXIT ;
"""


def test_instructions_have_their_lines_and_the_place_they_branch_to():
    move, product, back, on, end = instructions_of(SASS)
    place = (("tiles.cuh", 7), ("one.cuh", 70))
    assert move == Instruction("MOV", place, None)
    assert product == Instruction("HMMA.16816.F32", place, None)
    assert back == Instruction("BRA", (("pipe.cuh", 30),), 1)
    assert (on.target, end.name) == (4, "EXIT")


def code_of(*parts):
    """Instructions of one line of a file each: name, how many, line, and where the last goes."""
    found = []
    for name, count, file, line, target in parts:
        found += [Instruction(name, ((file, line),), None)] * (count - 1)
        found.append(Instruction(name, ((file, line),), target))
    return found


def test_loops_are_counted_without_those_inside_them():
    code = code_of(
        ("STG.E.64", 1, "x.cuh", 1, None),
        ("LDGSTS.E.BYPASS.128", 20, "x.cuh", 2, None),
        ("HMMA.16816.F32", 30, "x.cuh", 3, 21),  # from 21 to 50
        ("BAR.SYNC", 2, "x.cuh", 4, 1),  # from 1 to 52
        ("BRA", 1, "x.cuh", 5, 51),  # waits for something: too short to be a loop
    )
    (outer, inner), outside = loops_of(code, ())
    assert outer == Loop("?", 1, 52, Counter({"instructions": 22, "LDGSTS 16": 20, "BAR": 2}))
    assert inner.counts == Counter({"instructions": 30, "HMMA.16816.F32": 30})
    assert outside == Counter({"instructions": 2, "STG 8": 1})


def test_a_loop_in_a_function_without_steps_is_told_by_its_kernel():
    source = ROOT / "fsp_kernels" / "backends" / "triton" / "tiles.py"
    lines = source.read_text().splitlines()
    inner, outer = (
        next(i for i, x in enumerate(lines, 1) if x.startswith(f"def {name}")) + 1
        for name in ("_gradient_tile", "fsp_gradients")
    )
    frames = (("tiles.py", inner), ("tiles.py", outer))
    code = [Instruction("FADD", frames, None)] * 3
    assert name_of_loop(code, ["tiles._gradient_tile"]) == "tiles._gradient_tile"
    assert name_of_loop(code, ["gram._sweep"]) == "tiles.fsp_gradients"


# --- misses ---------------------------------------------------------------------------------------


def launched(*loops, programs=132, shape=(64, 64, 14, 14), unknown=()):
    x = torch.empty(shape, dtype=torch.bfloat16, device="meta")
    used = (8, 128, 0, 0)
    parts = [Part(programs, 1, [])]
    return Launched("k", programs, *used, loops, Counter(), parts, [x], [], frozenset(unknown))


def test_a_launch_that_misses_nothing():
    fine = loop(LDG_4=3, STG_16=2, BAR=4)
    assert misses(launched(fine), H100) == []
    assert misses(launched(fine, programs=1, shape=(2, 2, 14, 14)), H100) == []  # next to no work


@pytest.mark.parametrize(
    ("launch", "said"),
    [
        (launched(loop(LDG_2=3, STG_2=1)), "gram._sweep copies 2 bytes 4 times a step"),
        (launched(loop(BAR=5)), "gram._sweep has 5 barriers a step"),
        (launched(loop(), programs=131), "131 programs for 132 SMs"),
        (launched(loop("new._loop"), unknown=["new._loop"]), "new._loop has a loop whose steps"),
    ],
)
def test_what_a_launch_misses(launch, said):
    (miss,) = misses(launch, H100)
    assert miss.startswith(said)


def test_copies_of_2_bytes_are_no_miss_where_lines_allow_no_more():
    launch = launched(loop(LDG_2=3), programs=500, shape=(64, 512, 7, 7))
    assert misses(launch, H100) == []


@pytest.mark.parametrize(
    ("x", "unit"),
    [
        (torch.empty(2, 3, 14, 14, dtype=torch.bfloat16), 8),
        (torch.empty(2, 3, 7, 7, dtype=torch.bfloat16), 2),
        (torch.empty(2, 3, 7, 7), 4),
        (torch.empty(2, 196, 768, dtype=torch.bfloat16).mT, 16),
    ],
)
def test_unit_of_lines(x, unit):
    assert unit_of([x]) == unit


def test_conversions_are_stores_to_shared_memory_of_what_was_not_loaded():
    assert conversions(loop(STS_16=4, STS_4=1, LDGSTS_16=2)) == 5
    assert conversions(loop(STS_16=4, LDG_16=4)) == 0


@pytest.mark.parametrize(("strict", "status"), [(["--strict"], 1), ([], 0)])
def test_only_strict_fails_on_a_miss(monkeypatch, capsys, strict, status):
    launch = predict.facts_of(launched(loop(BAR=5)), Memory(0), H100)

    def facts(workload, dtype, _):
        of = {"workload": workload.name, "dtype": dtype, "launches": [launch]}
        return of | {"predicted_us": 9.0, "floor_us": 3.0}

    monkeypatch.setattr(predict, "workload_facts", facts)
    assert predict.main(["wide-late-512", "--dtype", "bf16", *strict]) == status
    printed = capsys.readouterr().out
    assert "wide-late-512 bf16: k: gram._sweep has 5 barriers a step" in printed
    assert "not measured" in printed
