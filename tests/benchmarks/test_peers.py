"""Every peer computes the loss of the definition, value and gradients."""

import pytest
import torch

from benchmarks import contenders, peers
from benchmarks.checks import evaluate
from benchmarks.workloads import Case, Workload, feature_maps
from fsp_kernels import reference

# Equal sizes, the first map pooled, the second map pooled, tokens, a map with itself.
SMALL = (
    Workload("plain", 16, (((6, 4), (5, 4)), ((3, 2), (4, 2)))),
    Workload("first-pooled", 16, (((6, 8), (5, 4)),)),
    Workload("second-pooled", 16, (((6, 3), (5, 7)),)),
    Workload("tokens", 16, (((6, 10), (5, 10)),), tokens=True),
    Workload("symmetric", 16, (((6, 4), (6, 4)), ((3, 2), (3, 2))), symmetric=True),
    Workload("padded", 16, (((6, 10), (5, 10)),), tokens=True, padded=True),
)
MATRICES = (peers.einsum_matrix, peers.bmm_matrix, peers.broadcast_matrix)


def assert_is_the_loss(loss, workload):
    student, teacher = feature_maps(workload, batch=3, dtype=torch.float64)
    case = Case(workload, 3)
    value, gradients = evaluate(case.masked(loss, "cpu"), student, teacher)
    definition = case.masked(reference.fsp_loss, "cpu")
    true_value, true_gradients = evaluate(definition, student, teacher)
    torch.testing.assert_close(value, true_value)
    torch.testing.assert_close(gradients, true_gradients)


@pytest.mark.parametrize("workload", SMALL, ids=lambda w: w.name)
@pytest.mark.parametrize("matrix", MATRICES, ids=lambda f: f.__name__)
def test_eager_peers(matrix, workload):
    assert_is_the_loss(peers.loss_over(matrix), workload)


@pytest.mark.parametrize(("workload", "pooled"), [(SMALL[0], 0), (SMALL[1], 1), (SMALL[2], 1)])
def test_only_the_larger_map_is_pooled(monkeypatch, workload, pooled):
    seen = []
    pool = peers.F.adaptive_max_pool2d
    monkeypatch.setattr(
        peers.F, "adaptive_max_pool2d", lambda x, size: (seen.append(x.shape), pool(x, size))[1]
    )
    (first, second), *_ = feature_maps(workload, batch=3)[1]
    peers.flattened(first, second)
    assert seen == [max(first.shape, second.shape, key=lambda shape: shape[2])] * pooled


@pytest.mark.slow
@pytest.mark.parametrize("workload", [SMALL[1], SMALL[3]], ids=lambda w: w.name)
def test_compiled_peer(workload):
    assert_is_the_loss(peers.compiled_einsum(), workload)


def test_on_a_gpu_ours_is_each_backend_that_serves_it_best_first(monkeypatch):
    monkeypatch.setattr(contenders, "registered_backends", lambda: dict.fromkeys("abc"))
    monkeypatch.setattr(contenders, "serves", lambda *x: x[:2] != ("b", "cuda"))
    competing = contenders.on("cuda")
    assert [c.name for c in competing if c.ours] == ["ours (a)", "ours (c)"]
    assert competing[2:] == contenders.PEERS


def test_the_broadcast_product_is_sized_by_its_largest_pair():
    assert peers.broadcast_bytes(SMALL[0], batch=3) == 4 * 3 * 6 * 5 * 16
