"""``FSPLoss`` is ``fsp_loss`` with its options fixed; ``pairs_of`` pairs consecutive layers."""

import copy
import pickle

import pytest
import torch

import fsp_kernels as fsp


def maps(seed: int, sizes: tuple[int, ...] = (8, 8, 4)) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(2, 3 + i, size, size, generator=generator).requires_grad_()
        for i, size in enumerate(sizes)
    ]


@pytest.fixture
def student() -> list[torch.Tensor]:
    return maps(0)


@pytest.fixture
def teacher() -> list[torch.Tensor]:
    return [x.detach() for x in maps(1)]


OPTIONS = [
    {},
    {"weights": [0.5, 2.0]},
    {"pool": "avg"},
    {"norm": "mse"},
    {"weights": (1, 0), "pool": "avg", "norm": "column"},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_module_has_the_value_of_the_function(student, teacher, options):
    pairs = fsp.pairs_of(student), fsp.pairs_of(teacher)
    # The same evaluation of the same numbers: not a bit may differ.
    assert torch.equal(fsp.FSPLoss(**options)(*pairs), fsp.fsp_loss(*pairs, **options))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_module_has_the_gradients_of_the_function(student, teacher, options):
    pairs = fsp.pairs_of(student), fsp.pairs_of(teacher)
    by_module = torch.autograd.grad(fsp.FSPLoss(**options)(*pairs), student)
    by_function = torch.autograd.grad(fsp.fsp_loss(*pairs, **options), student)
    assert all(torch.equal(x, y) for x, y in zip(by_module, by_function, strict=True))


def test_options_matter(student, teacher):
    pairs = fsp.pairs_of(student), fsp.pairs_of(teacher)
    assert len({fsp.FSPLoss(**options)(*pairs).item() for options in OPTIONS}) == len(OPTIONS)


def test_module_takes_ready_teacher_matrices(student, teacher):
    pairs, loss = fsp.pairs_of(student), fsp.FSPLoss()
    ready = [fsp.fsp_matrix(*pair) for pair in fsp.pairs_of(teacher)]
    by_maps = loss(pairs, fsp.pairs_of(teacher))
    # The teacher's matrices are rounded to fp32 on one side only.
    torch.testing.assert_close(loss(pairs, ready), by_maps, rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"pool": "mx"}, ValueError, r"^pool: got 'mx', expected one of 'max', 'avg'"),
        ({"norm": "l2"}, ValueError, r"^norm: got 'l2', expected one of 'frobenius', 'mse'"),
        ({"weights": [1.0, -2.0]}, ValueError, r"^weights\[1\]: got -2.0, expected a finite"),
        ({"weights": ["heavy"]}, TypeError, r"^weights\[0\]: got 'heavy', expected a real number"),
        ({"weights": 1.0}, TypeError, r"^weights: got builtins.float, expected a sequence"),
    ],
    ids=["pool", "norm", "negative weight", "weight of a wrong type", "bare weight"],
)
def test_constructor_refuses_a_bad_option(options, error, message):
    with pytest.raises(error, match=message):
        fsp.FSPLoss(**options)


def test_number_of_weights_is_checked_when_the_pairs_are_known(student, teacher):
    loss = fsp.FSPLoss(weights=[1.0])
    with pytest.raises(ValueError, match="weights: got 1 for 2 pairs, expected one for each pair"):
        loss(fsp.pairs_of(student), fsp.pairs_of(teacher))


def test_later_changes_to_the_given_weights_do_not_reach_the_module():
    weights = [1.0, 2.0]
    loss = fsp.FSPLoss(weights=weights)
    weights[0] = 100.0
    assert loss.weights == (1.0, 2.0)


def test_repr_shows_the_options():
    assert repr(fsp.FSPLoss()) == "FSPLoss(weights=None, pool='max', norm='frobenius')"
    assert (
        repr(fsp.FSPLoss([1, 0.5], pool="avg", norm="mse"))
        == "FSPLoss(weights=(1.0, 0.5), pool='avg', norm='mse')"
    )
    assert (
        repr(fsp.FSPLoss(channel_dim=-1))
        == "FSPLoss(weights=None, pool='max', norm='frobenius', channel_dim=-1)"
    )


def test_module_has_no_state():
    loss = fsp.FSPLoss(weights=[1.0, 2.0])
    assert loss.state_dict() == {}
    assert list(loss.parameters()) == []
    assert list(loss.buffers()) == []


@pytest.mark.parametrize(
    "duplicate",
    [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))],
    ids=["copy", "pickle"],
)
def test_copies_compute_the_same(student, teacher, duplicate):
    pairs = fsp.pairs_of(student), fsp.pairs_of(teacher)
    loss = fsp.FSPLoss(weights=[0.5, 2.0], pool="avg", norm="column")
    assert repr(duplicate(loss)) == repr(loss)
    assert torch.equal(duplicate(loss)(*pairs), loss(*pairs))


@pytest.mark.parametrize("change", [lambda m: m.half(), lambda m: m.eval()], ids=["half", "eval"])
def test_module_wide_changes_do_not_reach_the_loss(student, teacher, change):
    pairs = fsp.pairs_of(student), fsp.pairs_of(teacher)
    loss = fsp.FSPLoss(weights=[0.5, 2.0])
    before = loss(*pairs)
    assert torch.equal(change(loss)(*pairs), before)


def test_pairs_of_joins_consecutive_layers():
    f0, f1, f2, f3 = (torch.zeros(1, 1, 1) for _ in range(4))
    pairs = fsp.pairs_of([f0, f1, f2, f3])
    assert [tuple(map(id, pair)) for pair in pairs] == [
        (id(f0), id(f1)),
        (id(f1), id(f2)),
        (id(f2), id(f3)),
    ]


def test_pairs_of_takes_a_tuple():
    f0, f1 = torch.zeros(1, 1, 1), torch.ones(1, 1, 1)
    ((first, second),) = fsp.pairs_of((f0, f1))
    assert first is f0
    assert second is f1


@pytest.mark.parametrize("count", [0, 1])
def test_pairs_of_needs_two_layers(count):
    with pytest.raises(ValueError, match=rf"^features: got {count}, expected at least two maps"):
        fsp.pairs_of([torch.zeros(1, 1, 1)] * count)


def test_weights_that_are_a_parameter_are_trained_with_the_rest(student, teacher):
    criterion = fsp.FSPLoss(weights=torch.nn.Parameter(torch.tensor([0.5, 2.0])))
    criterion(fsp.pairs_of(student), fsp.pairs_of(teacher)).backward()
    (weights,) = criterion.parameters()
    alone = [
        fsp.fsp_loss([s], [t])
        for s, t in zip(fsp.pairs_of(student), fsp.pairs_of(teacher), strict=True)
    ]
    torch.testing.assert_close(weights.grad, torch.stack(alone).detach())
