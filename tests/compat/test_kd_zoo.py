"""`compat.kd_zoo.FSP` against the formula of Knowledge-Distillation-Zoo, stated here anew."""

import pytest
import torch
import torch.nn.functional as F

from fsp_kernels.compat.kd_zoo import FSP

# (B, m, H, W) and (B, n, H, W) of the student, then of the teacher
SHAPES = {
    "one size": [(3, 4, 6, 6), (3, 5, 6, 6), (3, 4, 6, 6), (3, 5, 6, 6)],
    "first larger": [(2, 4, 8, 8), (2, 6, 4, 4), (2, 4, 8, 8), (2, 6, 4, 4)],
    "uneven windows": [(2, 3, 7, 7), (2, 4, 5, 5), (2, 3, 7, 7), (2, 4, 5, 5)],
    "not square": [(2, 3, 9, 6), (2, 4, 4, 5), (2, 3, 9, 6), (2, 4, 4, 5)],
    "teacher of another size": [(2, 3, 6, 6), (2, 4, 3, 3), (2, 3, 10, 10), (2, 4, 5, 5)],
}


def matrix(first, second):
    first = F.adaptive_avg_pool2d(first, second.shape[2:])  # to its own size: changes nothing
    return torch.einsum("bmhw,bnhw->bmn", first, second) / second[0, 0].numel()


def formula(fm_s1, fm_s2, fm_t1, fm_t2):
    residual = matrix(fm_s1, fm_s2) - matrix(fm_t1, fm_t2)
    return residual.pow(2).sum() / residual.numel()


@pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES)
def test_values_and_gradients(shapes, maps_of, assert_same):
    assert_same(FSP(), formula, maps_of(shapes))


def test_second_map_larger_is_pooled_too(maps_of, assert_same):
    shapes = [(2, 3, 4, 4), (2, 5, 8, 8)] * 2

    def with_layers_swapped(fm_s1, fm_s2, fm_t1, fm_t2):  # G^T has the entries of G
        return formula(fm_s2, fm_s1, fm_t2, fm_t1)

    assert_same(FSP(), with_layers_swapped, maps_of(shapes))


def test_axes_are_pooled_separately(maps_of, assert_same):
    shapes = [(2, 3, 8, 3), (2, 5, 4, 6)] * 2

    def pooled_beforehand(*maps):
        return formula(*(F.adaptive_avg_pool2d(x, (4, 3)) for x in maps))

    assert_same(FSP(), pooled_beforehand, maps_of(shapes))


@pytest.mark.parametrize("channel_dim", [1, -1])
def test_maps_of_three_axes_say_where_their_channels_are(channel_dim, maps_of, assert_same):
    shapes = [(2, 7, 3), (2, 7, 5)] * 2

    def as_images(*maps):
        return formula(*(x.movedim(channel_dim, 1).unsqueeze(3) for x in maps))

    if channel_dim == 1:
        shapes = [(2, 3, 7), (2, 5, 7)] * 2
    assert_same(FSP(channel_dim=channel_dim), as_images, maps_of(shapes))
    with pytest.raises(ValueError, match=r"channel_dim=-1 for \(B, T, C\)"):
        FSP()(*maps_of(shapes))


def test_crops_are_accepted(maps_of, assert_same):
    def cropped(criterion):
        return lambda *maps: criterion(*(x[..., 1:-1, 1:-1] for x in maps))

    assert_same(cropped(FSP()), cropped(formula), maps_of(SHAPES["first larger"]))


def test_teacher_under_no_grad_gets_no_gradient(maps_of):
    fm_s1, fm_s2, fm_t1, fm_t2 = maps_of(SHAPES["one size"])
    FSP()(fm_s1, fm_s2, fm_t1.detach(), fm_t2.detach()).backward()
    assert fm_s1.grad is not None
    assert fm_s2.grad is not None
    assert fm_t1.grad is None
    assert fm_t2.grad is None


def test_other_channels_in_the_teacher_are_an_error(maps_of):
    shapes = [(2, 3, 4, 4), (2, 4, 4, 4), (2, 1, 4, 4), (2, 4, 4, 4)]  # 1 would broadcast
    with pytest.raises(ValueError, match=r"channels|shape"):
        FSP()(*maps_of(shapes))
