"""The table of tiles, warps and stages: complete for all that the planner can send."""

from __future__ import annotations

import itertools
import json
import os

import pytest

from fsp_kernels import plan
from fsp_kernels.backends.triton import configurations
from fsp_kernels.backends.triton.configurations import (
    ACCESSES,
    FAMILIES,
    KERNELS,
    KINDS,
    Configuration,
    configuration_of,
    family_of,
    replaced,
    rows,
    using,
    write,
)


def limit_of(kernel: str, kind: str) -> int:
    """The largest size of a kernel that some chip has a row for, if there is one."""
    if kernel == "one_pass":
        return 128 if kind == "half" else 64
    return plan.GPU_GRAM_POSITIONS if kernel == "gram" else 1024


# A product has no windows, and one stride.
SENT = [
    (kernel, kind, access)
    for kernel in KERNELS
    for kind in KINDS
    for access in ACCESSES
    if kernel != "product" or access != "scattered"
]


@pytest.mark.parametrize(("kernel", "kind", "access"), SENT)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_call_finds_a_row_that_holds_it(family, kernel, kind, access):
    most = limit_of(kernel, kind)
    wanted = (family, kernel, kind, access)
    found = [r for r in rows() if (r.family, r.kernel, r.kind, r.access) == wanted]
    assert found
    for size in range(most + 1):
        c = configuration_of(kernel, kind, family, access, size)
        if c is None:  # it does not fit the registers of this chip: the planner takes another way
            assert kernel in ("one_pass", "gram")
            assert size > found[-1].limit
            continue
        if kernel == "one_pass":
            assert c.block_m >= size
            assert c.block_n >= size
        if kernel == "gram":
            assert c.block_k >= size


def test_rows_of_a_kernel_ascend_and_none_is_double():
    def group(row):
        return row.family, row.kernel, row.kind, row.access

    groups = {key: list(found) for key, found in itertools.groupby(rows(), group)}
    assert sum(len(found) for found in groups.values()) == len(rows())
    for found in groups.values():
        limits = [row.limit for row in found]
        assert limits == sorted(set(limits))


def test_blocks_are_those_a_tensor_core_takes():
    for row in rows():
        c = row.configuration
        for size in (c.block_m, c.block_n, c.block_k):
            assert size >= 16
            assert size & (size - 1) == 0
        assert c.warps in (1, 2, 4, 8, 16)
        assert 1 <= c.stages <= 6


def test_the_first_row_that_is_large_enough_serves():
    table = [
        rows()[0]._replace(limit=limit, configuration=Configuration(limit, limit, 32, 4, 2))
        for limit in (16, 32, 64)
    ]
    row = table[0]
    with using(table):
        for size, wanted in ((1, 16), (16, 16), (17, 32), (64, 64)):
            found = configuration_of(row.kernel, row.kind, row.family, row.access, size)
            assert found.block_m == wanted
        assert configuration_of(row.kernel, row.kind, row.family, row.access, 65) is None


# Every family and kernel has rows among every sixth; the others differ in numbers alone.
@pytest.mark.parametrize("row", rows()[::6], ids=lambda r: "-".join(map(str, r[:5])))
def test_the_order_of_a_table_does_not_matter(row):
    trial = row._replace(configuration=Configuration(7, 7, 7, 7, 7))
    for table in ([trial, *(r for r in rows() if r != row)], replaced(rows(), row, trial)[::-1]):
        with using(table):
            size = row.limit or 1024
            found = configuration_of(row.kernel, row.kind, row.family, row.access, size)
        assert found == trial.configuration


def test_a_row_without_a_limit_serves_what_no_other_does():
    row = rows()[0]
    small, large = (Configuration(size, size, 32, 4, 2) for size in (64, 128))
    with using([row._replace(limit=0, configuration=large), row._replace(configuration=small)]):
        key = row.kernel, row.kind, row.family, row.access
        assert configuration_of(*key, row.limit) == small
        assert configuration_of(*key, row.limit + 1) == large


def test_another_table_is_in_force_for_a_while():
    before = rows()
    row = before[0]
    key = (row.kernel, row.kind, row.family, row.access, row.limit)
    other = Configuration(16, 16, 16, 1, 1)
    configuration_of(*key)
    with using([row._replace(configuration=other)]):
        assert configuration_of(*key) == other
    assert rows() == before
    assert configuration_of(*key) == row.configuration


@pytest.fixture
def copy(monkeypatch, tmp_path):
    """A table of its own, to write to."""
    table = tmp_path / "configurations.json"
    table.write_bytes(configurations.TABLE.read_bytes())
    with using(()):  # forgets what was looked up
        pass
    configurations._read.cache_clear()
    monkeypatch.setattr(configurations, "TABLE", table)
    yield table
    monkeypatch.undo()
    configurations._read.cache_clear()
    configuration_of.cache_clear()


def test_a_table_written_reads_as_it_was(copy):
    before, text = rows(), copy.read_text()
    write(before[::-1])
    assert rows() == before
    assert copy.read_text() == text


def test_a_measured_row_is_found_at_once(copy):  # noqa: ARG001
    first, *others = rows()
    key = (first.kernel, first.kind, first.family, first.access, first.limit)
    configuration_of(*key)
    faster = first._replace(configuration=Configuration(16, 16, 32, 8, 4), measured="NVIDIA Fake 1")
    write([faster, *others])
    assert configuration_of(*key) == faster.configuration
    assert rows()[0].measured == "NVIDIA Fake 1"


def test_a_table_can_be_written_elsewhere_and_read_there(tmp_path):
    before, other = configurations.TABLE.read_bytes(), tmp_path / "other.json"
    write(rows()[:3], other)
    assert configurations.read(other) == rows()[:3]
    assert configurations.TABLE.read_bytes() == before


def test_a_table_that_cannot_be_finished_leaves_the_old_one(copy, monkeypatch):
    before = copy.read_text()

    def interrupted(*_):
        assert copy.read_text() == before
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "rename", interrupted)
    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write(rows()[:1])
    assert json.loads(copy.read_text()) == json.loads(before)
    assert [path.name for path in copy.parent.iterdir()] == [copy.name]


@pytest.mark.parametrize(
    ("capability", "family"),
    [
        (80, "sm_80"),
        (86, "sm_89"),
        (87, "sm_89"),
        (89, "sm_89"),
        (90, "sm_90"),
        (100, "sm_100"),
        (103, "sm_100"),
        (110, "sm_100"),
        (120, "sm_120"),
        (121, "sm_120"),
    ],
)
def test_a_chip_has_the_table_of_the_oldest_of_its_kind(capability, family):
    assert family_of(capability) == family
