"""A plan as a value: what is equal, and what survives being saved."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

import fsp_kernels as fsp


def plan(batch: int = 2, **options) -> fsp.LossPlan:
    pair = torch.empty(batch, 3, 4, 4), torch.empty(batch, 5, 4, 4)
    return fsp.explain([pair], [pair], **options)


COPIES = {
    "pickled": lambda plan: pickle.loads(pickle.dumps(plan)),
    "copied": copy.copy,
    "copied deeply": copy.deepcopy,
}


@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
def test_a_copy_equals_its_original(copied):
    original = plan()
    same = copied(original)
    assert same is not original
    assert same == original
    assert {original: "prepared"}[same] == "prepared"
    assert str(same) == str(original)


def test_plans_of_other_calls_differ():
    assert plan() != plan(norm="mse")
    assert plan() != plan(batch=3)


def test_a_hash_is_not_saved_since_it_holds_in_one_process():
    original = plan()
    hash(original)
    assert b"_hash" not in pickle.dumps(original)
