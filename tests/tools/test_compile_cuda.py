"""The record says what every kernel of csrc/ takes of every chip; a few are compiled again."""

from __future__ import annotations

import itertools

import pytest

from tools import compile_cuda, record
from tools.compile_cuda import REMEDY, SHARED_MEMORY, Usage, compare_sample, described, nvcc

ONE_PASS = Usage(80, "fsp_one_pass", "bf16", 128, 200, 0, 2, 107 << 10)
OF_EACH_OPERAND = ("fsp_one_pass", "fsp_residual", "fsp_gradients")
OF_ANY_OPERAND = (*("fsp_gram", "fsp_combine", "fsp_matrix_gradients", "fsp_finish", "fsp_scale"),)


def test_the_record_is_of_the_sources_at_hand():
    assert record.read(compile_cuda.RECORD).digest == compile_cuda.digest(), REMEDY


def test_the_record_has_every_kernel_on_every_chip_and_none_has_a_fault():
    rows = record.read(compile_cuda.RECORD).rows
    assert {row[0] for row in rows} == {f"sm_{chip}" for chip in SHARED_MEMORY}
    for chip, kernel, operand in itertools.product(
        SHARED_MEMORY, OF_EACH_OPERAND, ("fp32", "fp16", "bf16")
    ):
        assert [f"sm_{chip}", kernel, operand] in [row[:3] for row in rows]
    for chip, kernel in itertools.product(SHARED_MEMORY, OF_ANY_OPERAND):
        assert [f"sm_{chip}", kernel] in [row[:2] for row in rows]
    usages = [
        Usage(int(chip[3:]), name, of, *map(int, numbers)) for chip, name, of, *numbers in rows
    ]
    assert [fault for usage in usages for fault in usage.faults()] == []


@pytest.mark.skipif(nvcc() is None, reason="needs nvcc 12.0 or newer")
def test_a_sample_compiles_to_what_the_record_says():
    assert compare_sample() == []


def test_a_stack_is_a_fault():
    assert ONE_PASS.faults() == []
    assert ONE_PASS._replace(stack=8).faults() == ["spills 8 bytes to the stack"]


def test_too_much_shared_memory_is_a_fault_unless_another_kernel_takes_its_place():
    on_turing = ONE_PASS._replace(architecture=75)
    assert on_turing.faults() == []
    (fault,) = on_turing._replace(kernel="fsp_residual").faults()
    assert fault == f"wants {107 << 10} bytes of shared memory, the chip has 64 KiB"


@pytest.mark.parametrize(
    ("symbol", "wanted"),
    [
        ("_ZN3fsp12fsp_residualIfEEvNS_5GroupINS_4PairELi6EEE", ("fsp_residual", "fp32", 0)),
        (
            "_ZN3fsp12fsp_one_passI6__halfLb1EEEvNS_5GroupINS_4PairELi6EEE",
            ("fsp_one_pass", "fp16", 128),
        ),
        ("_ZN3fsp8fsp_gramILi64EEEvNS_5GroupINS_4PairELi6EEE", ("fsp_gram", "", 64)),
        ("_ZN3fsp10fsp_finishENS_3SumE", ("fsp_finish", "", 0)),
    ],
)
def test_a_symbol_tells_its_kernel(symbol, wanted):
    assert described(symbol) == wanted
