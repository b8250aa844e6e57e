"""What a call prepares is prepared once: for which calls it serves, and how long it is kept."""

from __future__ import annotations

import pytest
import torch
from calls import four_of, run

from fsp_kernels.backends import get_backend

pytestmark = [
    pytest.mark.usefixtures("small"),
    pytest.mark.parametrize("regime", ["one pass"], indirect=True),
]


def test_a_signature_is_prepared_once(regime, programs):
    student, teacher = four_of(regime)
    for _ in range(3):
        run(student, teacher)
    assert len(programs) == 1


def test_strides_are_part_of_the_signature(regime, programs):
    for layout in ("contiguous", "channels last", "contiguous", "cropped"):
        run(*four_of(regime, layout=layout))
    assert len(programs) == 3


def test_weights_are_no_part_of_the_signature(regime, programs):
    student, teacher = four_of(regime)
    for weight in (1.0, 2.0, 0.0):
        run(student, teacher, weights=[weight])
    assert len(programs) == 1


@pytest.mark.usefixtures("chip_with_tf32")
def test_a_change_of_precision_reaches_a_signature_seen_before(regime, programs):
    student, teacher = four_of(regime)
    first = run(student, teacher)
    torch.set_float32_matmul_precision("high")
    other = run(student, teacher)
    torch.set_float32_matmul_precision("highest")
    again = run(student, teacher)
    assert not torch.equal(first[1], other[1])
    assert torch.equal(first[1], again[1])
    assert len(programs) == 2


def test_what_is_prepared_does_not_grow_without_bound(backend, regime, programs, monkeypatch):
    monkeypatch.setattr(get_backend(backend), "most_prepared", 3)
    for batch in range(1, 6):
        run(*four_of(regime, batch=batch, grad=False))
        assert len(programs) <= 3
