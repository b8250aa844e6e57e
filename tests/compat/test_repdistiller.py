"""`compat.repdistiller.FSP` against the formula of RepDistiller, stated here anew."""

import pytest
import torch
import torch.nn.functional as F

from fsp_kernels.compat.repdistiller import FSP

# (B, C, H, W) of each network's maps in order, those of the teacher having the same channels
SHAPES = {
    "two maps": [(3, 4, 6, 6), (3, 5, 6, 6)],
    "a small network": [(2, 3, 8, 8), (2, 3, 8, 8), (2, 5, 4, 4), (2, 7, 2, 2)],
    "uneven windows": [(2, 3, 7, 7), (2, 4, 5, 5), (2, 2, 3, 3)],
    "growing": [(2, 4, 3, 3), (2, 3, 8, 8)],
    "not square": [(2, 3, 4, 6), (2, 5, 4, 6)],
}


def formula(g_s, g_t):
    def matrix(bottom, top):
        smaller = min(bottom.shape[2:], top.shape[2:])
        bottom, top = (F.adaptive_avg_pool2d(x, smaller) for x in (bottom, top))
        return torch.einsum("bmhw,bnhw->bmnhw", bottom, top).mean(dim=(3, 4))

    return [
        (matrix(g_s[i], g_s[i + 1]) - matrix(g_t[i], g_t[i + 1])).pow(2).mean()
        for i in range(len(g_s) - 1)
    ]


def stacked(criterion):
    """The same over one flat list of maps, the student's then the teacher's."""

    def losses(*maps):
        half = len(maps) // 2
        return torch.stack(criterion(list(maps[:half]), list(maps[half:])))

    return losses


@pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES)
def test_values_and_gradients(shapes, maps_of, assert_same):
    assert_same(stacked(FSP(shapes, shapes)), stacked(formula), maps_of([*shapes, *shapes]))


def test_teacher_may_have_other_sizes(maps_of, assert_same):
    s_shapes = [(2, 3, 4, 4), (2, 5, 2, 2), (2, 4, 2, 2)]
    t_shapes = [(2, 3, 8, 8), (2, 5, 8, 8), (2, 4, 3, 3)]
    assert_same(stacked(FSP(s_shapes, t_shapes)), stacked(formula), maps_of([*s_shapes, *t_shapes]))


def test_axes_are_pooled_separately(maps_of, assert_same):
    shapes = [(2, 3, 8, 3), (2, 5, 4, 6)]

    def pooled_beforehand(g_s, g_t):
        return formula(*([F.adaptive_avg_pool2d(x, (4, 3)) for x in maps] for maps in (g_s, g_t)))

    assert_same(
        stacked(FSP(shapes, shapes)), stacked(pooled_beforehand), maps_of([*shapes, *shapes])
    )


@pytest.mark.parametrize("channel_dim", [1, -1])
def test_maps_of_three_axes_say_where_their_channels_are(channel_dim, maps_of, assert_same):
    shapes = [(2, 7, 3), (2, 7, 5)] if channel_dim == -1 else [(2, 3, 7), (2, 5, 7)]

    def as_images(g_s, g_t):
        return formula(*([x.movedim(channel_dim, 1).unsqueeze(3) for x in g] for g in (g_s, g_t)))

    criterion = FSP(shapes, shapes, channel_dim=channel_dim)
    assert_same(stacked(criterion), stacked(as_images), maps_of([*shapes, *shapes]))
    with pytest.raises(ValueError, match=r"channel_dim=-1 for \(B, T, C\)"):
        FSP(shapes, shapes)(maps_of(shapes), maps_of(shapes))


def test_the_constructor_compares_channels_where_they_are():
    FSP([(2, 7, 3), (2, 7, 5)], [(2, 9, 3), (2, 9, 5)], channel_dim=-1)
    with pytest.raises(ValueError, match=r"the student has \[3, 5\], the teacher \[4, 5\]"):
        FSP([(2, 7, 3), (2, 7, 5)], [(2, 7, 4), (2, 7, 5)], channel_dim=-1)


def test_gives_a_list_of_one_scalar_per_pair(maps_of):
    shapes = SHAPES["a small network"]
    losses = FSP(shapes, shapes)(maps_of(shapes), maps_of(shapes))
    assert isinstance(losses, list)
    assert [loss.shape for loss in losses] == [torch.Size([])] * 3


def test_constructor_takes_what_tensor_shape_gives(maps_of):
    shapes = [x.shape for x in maps_of(SHAPES["two maps"])]
    assert not list(FSP(shapes, shapes).parameters())


def test_another_number_of_shapes_is_an_error():
    shapes = SHAPES["a small network"]
    with pytest.raises(ValueError, match="the student has 4, the teacher 3"):
        FSP(shapes, shapes[1:])


def test_other_channels_are_an_error():
    with pytest.raises(ValueError, match=r"the student has \[4, 5\], the teacher \[4, 6\]"):
        FSP([(3, 4, 6, 6), (3, 5, 6, 6)], [(3, 4, 6, 6), (3, 6, 6, 6)])


def test_another_number_of_maps_is_an_error(maps_of):
    shapes = SHAPES["a small network"]
    maps = maps_of(shapes)
    with pytest.raises(ValueError, match="the student has 4, the teacher 3"):
        FSP(shapes, shapes)(maps, maps[1:])
