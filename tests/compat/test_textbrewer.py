"""`compat.textbrewer.fsp_loss` against the formula of TextBrewer, stated here anew.

Where TextBrewer is installed its own function and table are used as well.
"""

import sys
from types import ModuleType

import pytest
import torch

from fsp_kernels.compat.textbrewer import fsp_loss, register

# (B, T, m) and (B, T, n) of the student, then of the teacher
SHAPES = {
    "one hidden size": [(3, 7, 4)] * 4,
    "two hidden sizes": [(2, 6, 3), (2, 6, 5)] * 2,
    "long": [(2, 40, 3), (2, 40, 3)] * 2,
    "one token": [(3, 1, 4)] * 4,
}
MASK_DTYPES = [torch.bool, torch.uint8, torch.int64, torch.float16, torch.float64]


def padding(shape, dtype=torch.int64):
    """A mask (B, T) with a one for each word: 1, 3, 5, ... words, or as many as there is room."""
    batch, length = shape[:2]
    words = (2 * torch.arange(batch) + 1).clamp(max=length)
    return (torch.arange(length) < words[:, None]).to(dtype)


def formula(state_s, state_t, mask=None):
    def matrix(first, second):
        if mask is None:
            return torch.einsum("btm,btn->bmn", first, second) / first.shape[1]
        weights = mask.to(first.dtype)
        sums = torch.einsum("bt,btm,btn->bmn", weights, first, second)
        return sums / weights.sum(dim=1)[:, None, None]

    residual = matrix(*state_s) - matrix(*state_t)
    return residual.pow(2).sum() / residual.numel()


def over_states(criterion, mask=None):
    """The same over one flat list of states."""
    return lambda *states: criterion(list(states[:2]), list(states[2:]), mask=mask)


@pytest.mark.parametrize("masked", [False, True], ids=["all words", "padded"])
@pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES)
def test_values_and_gradients(shapes, masked, maps_of, assert_same):
    mask = padding(shapes[0]) if masked else None
    assert_same(over_states(fsp_loss, mask), over_states(formula, mask), maps_of(shapes))


@pytest.mark.parametrize("masked", [False, True], ids=["all words", "padded"])
@pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES)
def test_values_and_gradients_of_textbrewer_itself(shapes, masked, maps_of, assert_same):
    original = pytest.importorskip("textbrewer.losses").fsp_loss
    mask = padding(shapes[0]) if masked else None
    assert_same(over_states(fsp_loss, mask), over_states(original, mask), maps_of(shapes))


@pytest.mark.parametrize("masked", [False, True], ids=["all words", "padded"])
def test_fp32_states(masked, maps_of):
    shapes = SHAPES["two hidden sizes"]
    mask = padding(shapes[0]) if masked else None
    exact = maps_of(shapes)
    states = [x.detach().float().requires_grad_() for x in exact]
    loss, expected = over_states(fsp_loss, mask)(*states), over_states(formula, mask)(*exact)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected.float())
    found, wanted = torch.autograd.grad(loss, states), torch.autograd.grad(expected, exact)
    torch.testing.assert_close(found, tuple(x.float() for x in wanted))


@pytest.mark.parametrize("dtype", MASK_DTYPES, ids=str)
def test_masks_have_any_dtype(dtype, maps_of, assert_same):
    shapes = SHAPES["two hidden sizes"]
    mask = padding(shapes[0], dtype)
    assert_same(over_states(fsp_loss, mask), over_states(formula, mask), maps_of(shapes))


def test_masks_may_have_gaps(maps_of, assert_same):
    shapes = SHAPES["one hidden size"]
    mask = torch.tensor([[0, 1, 0, 1, 1, 0, 1], [1, 0, 0, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1, 1]])
    assert_same(over_states(fsp_loss, mask), over_states(formula, mask), maps_of(shapes))


def test_without_a_mask_the_teacher_may_have_another_length(maps_of, assert_same):
    shapes = [(2, 6, 3), (2, 6, 5), (2, 9, 3), (2, 9, 5)]
    assert_same(over_states(fsp_loss), over_states(formula), maps_of(shapes))


def test_a_sample_of_padding_alone_has_a_zero_matrix(maps_of, assert_same):
    shapes = SHAPES["one hidden size"]
    mask = padding(shapes[0])
    mask[1] = 0

    def without_it(*states):
        words = [0, 2]
        loss = over_states(formula, mask[words])(*(x[words] for x in states))
        return loss * len(words) / len(mask)

    assert_same(over_states(fsp_loss, mask), without_it, maps_of(shapes))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
def test_padded_positions_may_hold_anything(value, maps_of):
    shapes = SHAPES["one hidden size"]
    mask, states = padding(shapes[0]), maps_of(shapes)
    filled = [x.detach().masked_fill(mask[..., None] == 0, value).requires_grad_() for x in states]
    loss, expected = over_states(fsp_loss, mask)(*filled), over_states(fsp_loss, mask)(*states)
    torch.testing.assert_close(loss, expected)
    for gradient in torch.autograd.grad(loss, filled):
        assert gradient.isfinite().all()
        assert not gradient[mask == 0].any()


def test_teacher_under_no_grad_gets_no_gradient(maps_of):
    s_first, s_second, t_first, t_second = maps_of(SHAPES["one hidden size"])
    fsp_loss([s_first, s_second], [t_first.detach(), t_second.detach()]).backward()
    assert s_first.grad is not None
    assert s_second.grad is not None
    assert t_first.grad is None
    assert t_second.grad is None


def test_other_hidden_sizes_in_the_teacher_are_an_error(maps_of):
    states = maps_of([(2, 6, 3), (2, 6, 5), (2, 6, 1), (2, 6, 5)])  # 1 would broadcast
    with pytest.raises(ValueError, match=r"has 3 channels and .* has 1 \("):
        over_states(fsp_loss)(*states)


def test_one_state_or_three_states_are_an_error(maps_of):
    states = maps_of(SHAPES["one hidden size"])
    with pytest.raises(TypeError, match="expected a pair of feature maps"):
        fsp_loss(states[:3], states[:3])
    with pytest.raises(TypeError, match=r"a tensor of shape \(3, 7, 4\), expected a pair"):
        fsp_loss(states[0], states[2])


def test_a_mask_of_another_length_is_an_error(maps_of):
    states = maps_of(SHAPES["one hidden size"])
    with pytest.raises(ValueError, match=r"mask: has shape \(3, 6\), expected .* = \(3, 7\)"):
        over_states(fsp_loss, torch.ones(3, 6))(*states)


@pytest.fixture
def table(monkeypatch):
    """TextBrewer's table of losses, or a stand-in where it isn't installed; restored afterwards."""
    try:
        from textbrewer import presets
    except ImportError:
        presets = ModuleType("textbrewer.presets")
        presets.MATCH_LOSS_MAP = dict.fromkeys(("fsp", "gram", "mmd"), formula)
        monkeypatch.setitem(sys.modules, "textbrewer", ModuleType("textbrewer"))
        monkeypatch.setitem(sys.modules, presets.__name__, presets)
    for name, loss in presets.MATCH_LOSS_MAP.items():
        monkeypatch.setitem(presets.MATCH_LOSS_MAP, name, loss)
    return presets.MATCH_LOSS_MAP


def test_register_replaces_the_loss_under_both_of_its_names(table):
    others = {name: loss for name, loss in table.items() if name not in ("fsp", "gram")}
    register()
    assert table == others | {"fsp": fsp_loss, "gram": fsp_loss}


@pytest.mark.parametrize("found", [None, ModuleType("textbrewer.presets")])
def test_register_says_what_is_missing(found, monkeypatch):
    monkeypatch.setitem(sys.modules, "textbrewer.presets", found)
    with pytest.raises(ImportError, match="needs TextBrewer: pip install textbrewer"):
        register()
