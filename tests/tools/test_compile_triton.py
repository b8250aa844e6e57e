"""The record says what every Triton kernel takes of every chip; a few are compiled again."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fsp_kernels.backends.triton.configurations import FAMILIES, KERNELS, Configuration, Row

pytest.importorskip("triton")

import triton

from tools import compile_triton, record
from tools.calls import Case, cases
from tools.compile_triton import MOST_STACK, REMEDY, TABLE_TRITON, Usage, faults, sample, variants

ROOT = Path(__file__).resolve().parents[2]
ROW = Row("sm_89", "one_pass", "tf32x3", "aligned", 64, Configuration(64, 64, 32, 4, 1), None)


def _python(*arguments):
    """Run Python without the interpreter of Triton that the tests use."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, *arguments], env=environment, capture_output=True, text=True, check=False
    )


def test_the_record_is_of_the_kernels_and_the_table_at_hand():
    assert record.read(compile_triton.RECORD).digest == compile_triton.digest(), REMEDY


def test_the_record_has_every_row_of_the_table_and_every_variant():
    recorded = {tuple(row[:2]) for row in record.read(compile_triton.RECORD).rows}
    assert recorded == {(x.family, str(x)) for x in (*cases(), *variants())}, REMEDY


def test_no_recorded_kernel_has_a_fault():
    known = {(x.family, str(x)): x for x in (*cases(), *variants())}
    rows = record.read(compile_triton.RECORD).rows
    usages = [(known[family, case], Usage(name, *map(int, n))) for family, case, name, *n in rows]
    assert [found for case, usage in usages for found in faults(case, usage)] == []


@pytest.mark.slow
def test_a_sample_compiles_to_what_the_record_says():
    result = _python("-m", "tools.compile_triton", "--sample")
    assert result.returncode == 0, result.stdout + result.stderr


def test_the_sample_has_every_kernel_and_every_family():
    *rows, variant = sample()
    assert {case.row.kernel for case in rows} == set(KERNELS)
    assert {case.family for case in rows} == set(FAMILIES)
    assert variant in list(variants())


def test_a_kernel_that_spills_is_refused():
    script = (
        "import torch\n"
        "from tools.calls import Case\n"
        "from tools.compile_triton import compile_case, faults\n"
        "from fsp_kernels.backends.triton.configurations import Configuration, Row, using\n"
        "row = Row('sm_80', 'one_pass', 'half', 'odd', 64, Configuration(64, 64, 32, 1, 1), None)\n"
        "case = Case(row, torch.bfloat16)\n"
        "with using([row]):\n"
        "    print([c for u in compile_case(case) for c in faults(case, u)])\n"
    )
    result = _python("-c", script)
    assert "to the stack" in result.stdout, result.stderr


@pytest.mark.slow
def test_tensor_cores_load_masked_maps_as_they_load_others():
    script = (
        "import torch\n"
        "from tools.calls import call_on, instead_of_launches\n"
        "from tools.compile_triton import compiled\n"
        "maps = [torch.empty(128, 256, 64, dtype=torch.bfloat16, device='meta').mT] * 4\n"
        "options = (True, True, False, False), 'max', 'frobenius'\n"
        "for masks in ((None, None), (0, 0)):\n"
        "    call = lambda: call_on(maps, *options, masks)()\n"
        "    kernel, _ = instead_of_launches(compiled, call, 'sm_80', 'half')\n"
        "    print(kernel.asm['ptx'].count('ldmatrix'))\n"
    )
    result = _python("-c", script)
    unmasked, masked = result.stdout.split()
    assert int(masked) == int(unmasked) > 0, result.stderr


@pytest.mark.slow
def test_no_loop_chooses_an_address_at_run_time():
    """Triton 3.6 does not know that such addresses are aligned, and reads 2 bytes at a time."""
    script = (
        "import re, torch\n"
        "from tools.calls import call_on, instead_of_launches\n"
        "from tools.compile_triton import compiled\n"
        "few = torch.empty(64, 49, 32, dtype=torch.bfloat16, device='meta').mT\n"
        "many = torch.empty(64, 49, 256, dtype=torch.bfloat16, device='meta').mT\n"
        "for x in (few, many, few[..., ::2]):\n"
        "    call = lambda: call_on([x] * 4)()\n"
        "    for kernel in instead_of_launches(compiled, call, 'sm_90', 'half'):\n"
        "        loops = r'(?ms)^( *)[^\\n]*scf[.]for.*?^\\1}'\n"
        "        for loop in re.finditer(loops, kernel.asm['ttir']):\n"
        "            print(kernel.metadata.name, 'scf.if' in loop[0])\n"
    )
    result = _python("-c", script)
    found = result.stdout.split("\n")
    assert {x.split()[0] for x in found if x} >= {"fsp_one_pass", "fsp_gram"}, result.stderr
    assert not [x for x in found if x.endswith("True")]


def test_the_pinned_triton_may_use_no_stack():
    pinned = (ROOT / "constraints.txt").read_text()
    assert f"triton=={TABLE_TRITON}." in pinned
    assert MOST_STACK == 0 or f"triton=={triton.__version__}" not in pinned


@pytest.mark.parametrize(("of_table", "kept"), [(True, 1), (False, 0)])
def test_only_the_triton_of_the_table_writes_the_record(monkeypatch, tmp_path, of_table, kept):
    monkeypatch.setattr(compile_triton, "IS_OF_TABLE", of_table)
    monkeypatch.setattr(compile_triton, "RECORD", tmp_path / "triton.csv")
    monkeypatch.setattr(compile_triton, "cases", lambda *_: [])
    monkeypatch.setattr(compile_triton, "variants", lambda *_: [])
    assert compile_triton.main([]) == 0
    assert len(list(tmp_path.iterdir())) == kept


def test_a_kernel_that_does_not_compile_is_reported(monkeypatch):
    def crash(_):
        raise RuntimeError("PassManager::run failed")

    monkeypatch.setattr(compile_triton, "compile_case", crash)
    (row,) = compile_triton._rows(Case(ROW, torch.float32))
    assert row == (
        ["sm_89", str(Case(ROW, torch.float32))],
        ["does not compile: PassManager::run failed"],
    )


def test_a_stack_and_too_much_shared_memory_are_faults():
    case = Case(ROW, torch.float32)
    assert faults(case, Usage("fsp_one_pass", 255, MOST_STACK, 99 << 10)) == []
    spills = MOST_STACK + 8
    assert f"spills {spills} bytes" in faults(case, Usage("fsp_one_pass", 255, spills, 0))[0]
    assert "shared memory" in faults(case, Usage("fsp_one_pass", 32, 0, (99 << 10) + 1))[0]


def test_a_variant_may_spill_in_kernels_that_the_table_configures():
    variant = next(variants("sm_80"))
    assert faults(variant, Usage("fsp_one_pass", 255, MOST_STACK + 8, 0)) == []
    assert faults(variant, Usage("fsp_finish", 255, MOST_STACK + 8, 0)) != []
