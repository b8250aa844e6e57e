"""Errors near convergence: what the accuracy table claims, on smaller maps."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import accuracy

SHAPE = (2, 64, 5, 5)


@pytest.fixture(scope="module")
def errors() -> list[accuracy.Error]:
    return accuracy.measure(noises=(1e-5,), shape=SHAPE)


def test_ours_keeps_the_gradient_the_naive_op_loses(errors: list[accuracy.Error]) -> None:
    gradient = {error.way: error.gradient for error in errors}
    naive = gradient.pop("einsum")
    assert naive > 1e-4
    assert len(gradient) == 3
    # fp32 resolves 6e-8; a few such errors may add up, none of them is amplified.
    assert max(gradient.values()) < 2e-6


def test_the_student_is_off_by_the_noise() -> None:
    student, teacher = accuracy.nearby_maps(1e-3, SHAPE)
    off = (student[0][0] - teacher[0][0]).std().item()
    assert off == pytest.approx(1e-3, rel=0.1)


def test_results_say_what_made_them(errors: list[accuracy.Error], tmp_path: Path) -> None:
    accuracy.write(errors, tmp_path, "the command")
    assert "- command: `the command`" in (tmp_path / "accuracy.md").read_text()
    kept = json.loads((tmp_path / "accuracy.json").read_text())
    assert [accuracy.Error(**error) for error in kept["errors"]] == errors
