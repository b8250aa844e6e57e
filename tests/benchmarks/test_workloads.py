"""The workload table and the tensors made from it."""

import pytest
import torch

from benchmarks.workloads import BY_NAME, Workload, feature_maps

TINY_TOKENS = Workload("tiny-tokens", 16, (((6, 10), (5, 10)),), tokens=True)
TINY_SYMMETRIC = Workload("tiny-symmetric", 16, (((6, 4),) * 2, ((5, 3),) * 2), symmetric=True)
TINY_POOLED = Workload("tiny-pooled", 16, (((6, 8), (5, 4)),))


@pytest.mark.parametrize(
    ("name", "batch"), [("cifar-resnet", 32), ("wide-late-512", 4), ("segmentation", 4)]
)
def test_a_cpu_takes_an_eighth_of_the_batch_and_at_least_four(name, batch):
    assert BY_NAME[name].batch_on("cpu") == batch
    assert BY_NAME[name].batch_on("cuda") == BY_NAME[name].batch


def test_a_pair_has_the_positions_of_its_smaller_map():
    assert TINY_POOLED.positions(TINY_POOLED.layers[0]) == 16
    assert TINY_TOKENS.positions(TINY_TOKENS.layers[0]) == 10


def test_students_want_gradients_and_teachers_do_not():
    student, teacher = feature_maps(TINY_POOLED, batch=2)
    assert all(x.requires_grad for x in student[0])
    assert not any(x.requires_grad for x in teacher[0])
    assert not torch.equal(student[0][0], teacher[0][0])


def test_a_symmetric_workload_has_each_map_twice():
    for network in feature_maps(TINY_SYMMETRIC, batch=2):
        assert all(first is second for first, second in network)
        assert network[0][0] is not network[1][0]
    assert all(first == second for first, second in BY_NAME["style-vgg"].layers)


def test_maps_look_like_the_output_of_a_relu():
    x = feature_maps(TINY_POOLED, batch=2)[1][0][0]
    assert x.min() == 0
    assert 0.3 < (x == 0).float().mean() < 0.7


def test_tokens_are_seen_across_their_rows():
    first, second = feature_maps(TINY_TOKENS, batch=2)[0][0]
    assert (first.shape, second.shape) == ((2, 6, 10), (2, 5, 10))
    assert first.stride() == (60, 1, 6)


def test_a_padded_workload_has_sequences_from_an_eighth_of_the_tokens_to_all():
    padded = Workload("tiny-padded", 16, TINY_TOKENS.layers, tokens=True, padded=True)
    assert padded.mask(3).tolist() == [
        [True] + [False] * 9,
        [True] * 6 + [False] * 4,
        [True] * 10,
    ]
    assert TINY_TOKENS.mask(3) is None


def test_the_same_seed_gives_the_same_maps():
    one, other = feature_maps(TINY_POOLED, batch=2), feature_maps(TINY_POOLED, batch=2)
    assert torch.equal(one[0][0][0], other[0][0][0])
