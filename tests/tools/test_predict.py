"""What the machine code of a workload's launches is read to be, and the times it is predicted."""

import dataclasses
import json
import math
import os
import runpy
import subprocess
import sys
import types
from collections import Counter
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

import fake_gpu

from benchmarks.workloads import BY_NAME, Case
from fsp_kernels import explain
from tools import predict
from tools.launches import (
    LANES,
    Launched,
    Part,
    Work,
    a_stage,
    loops_by_entry,
    steps_by_work,
    taken,
    unit_of,
    waiting,
    work_of,
)
from tools.machine_code import (
    Instruction,
    Loop,
    function_among,
    instructions_of,
    line_of_branch,
    loops_of,
    product_of,
)
from tools.predict import CHIPS, Memory, conversions, misses, residency, step_cycles

ROOT = Path(__file__).resolve().parents[2]
SETUP = runpy.run_path(str(ROOT / "setup.py"), run_name="setup")
H100 = CHIPS["sm_90"]


def facts(*arguments):
    """What ``python -m tools.predict --json -`` prints, without Triton's interpreter."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tools.predict", *arguments, "--json", "-"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


# One whose loops all stay, one whose gradients' loops are unrolled; rows are multiples of 4 bytes.
@pytest.mark.slow
@pytest.mark.parametrize("workload", ["cifar-resnet", "tokens-vit-b"])
def test_loops_of_triton_miss_nothing(workload):
    (found,) = facts(workload, "--dtype", "bf16", "--backend", "triton", "--strict")
    assert found["predicted_us"] > found["floor_us"] > 0
    assert [x["misses"] for x in found["launches"]] == [[] for _ in found["launches"]]
    loops = [loop for launch in found["launches"] for loop in launch["loops"]]
    functions = {x["function"] for x in loops}
    assert functions & {"residual.residual_tile", "tiles.fsp_residual"}
    assert "elementwise.fsp_finish" in functions
    assert all(loop["steps"] for loop in loops if loop["function"] != "in no loop")
    products = sum(n for loop in loops for name, n in loop.items() if "MMA" in name)
    assert products > 0
    assert "measured_us" not in found or torch.cuda.is_available()


@pytest.mark.thorough  # compiles all of csrc/
@pytest.mark.skipif(
    not (SETUP["find_nvcc"]() and SETUP["is_recent"](SETUP["find_nvcc"]())),
    reason="needs nvcc 12.0 or newer",
)
def test_launches_of_cuda_are_those_of_the_plan_and_loops_are_read():
    (found,) = facts("tokens-vit-b", "--dtype", "bf16", "--backend", "cuda")
    assert found["predicted_us"] > found["floor_us"] > 0
    residual, gradients, finish = found["launches"]
    names = "fsp_residual", "fsp_gradients", "fsp_finish"
    assert (residual["kernel"], gradients["kernel"], finish["kernel"]) == names
    assert residual["programs"] == 64 * 6 * 6  # 768 channels in tiles of 128
    for launch in (residual, gradients):
        loops = launch["loops"]
        assert launch["registers"] > 100
        assert launch["shared"] >= 64 << 10
        assert any("HMMA" in name for loop in loops for name in loop)
        assert any("LDGSTS 16" in loop for loop in loops)  # rows are multiples of 16 bytes
        assert any(loop.get("BAR") for loop in loops)
        assert all(".cuh:" in loop["function"] for loop in loops)
        assert launch["predicted_us"] > 1e6 * predict.LAUNCH


def test_a_chip_without_a_model_is_refused():
    result = subprocess.run(
        [sys.executable, "-m", "tools.predict", "all", "--family", "sm_120"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 2
    assert "'sm_80', 'sm_90'" in result.stderr


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


def loop(function="gram._write_gradient", **counts):
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
    (outer, inner), outside = loops_of(code, line_of_branch)
    assert outer == Loop("x.cuh:4", 1, 52, Counter({"instructions": 22, "LDGSTS 16": 20, "BAR": 2}))
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
    assert function_among(["tiles._gradient_tile"])(code) == "tiles._gradient_tile"
    assert function_among(["gram._write_gradient"])(code) == "tiles.fsp_gradients"
    # Where only the innermost function is told, most of a loop is in what it calls.
    code = [Instruction("FADD", (("maps.py", 200),), None)] * 3
    code += [Instruction("IADD3", frames[:1], None)]
    assert function_among(["tiles._gradient_tile"])(code) == "tiles._gradient_tile"


# --- csrc/, whose kernels have the code of every way through them ---------------------------------


def nested(first, last, **counts):
    return loop(**counts)._replace(first=first, last=last)


COPIES_2, COPIES_4 = nested(1, 20, LDG_2=8), nested(21, 40, LDGSTS_4=1, LDG_2=3)
COPIES_16, WRITES = nested(41, 60, LDGSTS_16=1), nested(61, 80, STG_16=1, STG_2=6)
OUTER, PRODUCTS = nested(0, 99, BAR=2, LDG_16=9), nested(81, 98, **{"HMMA.16816.F32": 4})
EVERY = [OUTER, COPIES_2, COPIES_4, COPIES_16, WRITES, PRODUCTS]


@pytest.mark.parametrize(
    ("unit", "reads", "writes"),
    [(16, COPIES_16, {"STG 16": 1}), (8, COPIES_4, {"STG 16": 1}), (2, COPIES_2, {"STG 16": 1})],
)
def test_loops_are_taken_that_copy_in_the_widest_units_that_fit(unit, reads, writes):
    kinds = taken(EVERY, unit)
    assert kinds["products"] == [PRODUCTS]
    assert [x.first for x in kinds["reads"]] == [reads.first]
    assert "LDG 2" not in kinds["reads"][0].counts or unit == 2
    assert kinds["writes"][0].counts == Counter(writes)


def test_loops_take_the_steps_that_their_work_has():
    flops = 4 * 2 * 16 * 8 * 16 / LANES  # of a thread in a step
    work = Work(flops=flops * 256 * 10, read=16 * 256 * 5, written=16 * 256 * 3)
    steps = {x.function: n for x, n in steps_by_work(taken(EVERY, 16), work, 256)}
    assert steps == {"products": 10, "reads": 5, "writes": 3}


def test_loops_with_barriers_count_as_stages_and_a_single_stage_is_waited_for():
    waits = waiting([*EVERY, nested(100, 200, instructions=60, BAR=4)])
    assert [(x.counts["BAR"], x.counts["LDG 16"]) for x in waits] == [(2, 0), (4, 0)]
    two, one = (step_cycles(a_stage(waits, n), 8, math.inf, 1, H100) for n in (2, 1))
    assert two["latency"] == 2 * 30 + 3 * 30  # of the mean of both loops
    assert one["latency"] == two["latency"] + 600


def test_work_of_each_kernel():
    student, teacher = ([(torch.empty(2, 64, 8, 8), torch.empty(2, 128, 8, 8))] for _ in range(2))
    for x in student[0]:
        x.requires_grad_()
    (pair,) = explain(student, teacher).pairs
    product, maps, stored = 2 * 64 * 128 * 64, 4 * 2 * (64 + 128) * 64, 4 * 64 * 128
    pair = dataclasses.replace(pair, parts=2, scratch_bytes=1, slope_dtype=torch.float32)
    assert work_of("residual", pair, 0, 8, "tf32x3") == (6 * product, 2 * maps, 2 * stored)
    assert work_of("residual", pair, 0, 2, "tf32") == (2 * product, maps, 2 * stored)
    own, other = 4 * 64 * 64, 4 * 128 * 64
    assert work_of("gradients", pair, 0, 4, "tf32") == (product, 2 * (other + stored), own)
    assert work_of("combine", pair, 0, 4, "tf32") == (0, 2 * stored, stored)


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
        (launched(loop(LDG_2=3, STG_2=1)), "gram._write_gradient copies 2 bytes 4 times a step"),
        (launched(loop(BAR=5)), "gram._write_gradient has 5 barriers a step"),
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


@pytest.mark.parametrize(("strict", "status"), [(True, 1), (False, 0)])
def test_only_strict_fails_on_a_miss(monkeypatch, capsys, strict, status):
    launch = predict.facts_of(launched(loop(BAR=5)), Memory(0), H100)

    def facts(workload, dtype, family, backend):
        of = {"workload": workload.name, "dtype": dtype, "family": family, "backend": backend}
        return of | {"launches": [launch], "predicted_us": 9.0, "floor_us": 3.0}

    monkeypatch.setattr(predict, "workload_facts", facts)
    arguments = ["wide-late-512", "--dtype", "bf16", "--family", "sm_90", "--backend", "cuda"]
    assert predict.main(arguments + ["--strict"] * strict) == status
    printed = capsys.readouterr().out
    assert "wide-late-512 bf16 cuda: k: gram._write_gradient has 5 barriers a step" in printed
    assert "not measured" in printed


# --- on a device ----------------------------------------------------------------------------------


@pytest.fixture
def measured(monkeypatch):
    """What is measured of a call where the launches are called so."""
    fake_gpu.install(monkeypatch)
    monkeypatch.setattr(predict, "CALLS", 2)
    case = Case(BY_NAME["wide-late-512"], 2)

    def of(*kernels):
        launches = [{"kernel": kernel} for kernel in kernels]
        facts = {"family": "sm_80", "backend": "torch", "launches": launches}
        predict.add_measured(facts, case)
        return facts

    return of


def test_each_launch_is_told_its_own_time_and_the_workload_that_from_first_to_last(measured):
    facts = measured(*(f"fsp_{i}" for i in range(fake_gpu.KERNELS)))
    assert [x["measured_us"] for x in facts["launches"]] == [1.0 + i for i in range(7)]
    assert facts["measured_us"] == 60.0 + 7.0


@pytest.mark.parametrize("kernels", [("fsp_0",), tuple(f"fsp_{6 - i}" for i in range(7))])
def test_launches_that_are_not_those_of_the_model_are_refused(measured, kernels):
    with pytest.raises(RuntimeError, match="the GPU ran"):
        measured(*kernels)


def test_a_gpu_without_a_model_is_not_measured(monkeypatch):
    assert predict.device_family() is None or torch.cuda.is_available()
    fake_gpu.install(monkeypatch)
    assert predict.device_family() == "sm_90"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (12, 0))
    assert predict.device_family() is None
