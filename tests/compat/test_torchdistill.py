"""`compat.torchdistill.FSPLoss` against the formula of torchdistill, stated here anew.

Where torchdistill is installed its own class and registry are used as well.
"""

import sys
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F

from fsp_kernels.compat.torchdistill import FSPLoss, register

# for each pair (B, m, H, W) and (B, n, H, W) of the student, then of the teacher
SHAPES = {
    "one pair": [[(3, 4, 6, 6), (3, 5, 6, 6), (3, 4, 6, 6), (3, 5, 6, 6)]],
    "pooled both ways": [
        [(2, 3, 8, 8), (2, 5, 4, 4), (2, 3, 8, 8), (2, 5, 4, 4)],
        [(2, 4, 3, 3), (2, 2, 6, 6), (2, 4, 3, 3), (2, 2, 6, 6)],
    ],
    "uneven windows": [[(2, 3, 7, 7), (2, 4, 5, 5), (2, 3, 7, 7), (2, 4, 5, 5)]],
    "axis by axis": [[(2, 3, 8, 3), (2, 4, 4, 6), (2, 3, 8, 3), (2, 4, 4, 6)]],
    "teacher of another size": [[(2, 3, 6, 6), (2, 4, 3, 3), (2, 3, 9, 9), (2, 4, 5, 5)]],
}
WEIGHTS = [0.5, None]  # None: left out, so 1


def fsp_pairs(number):
    """Pair i lies between the input and the output of ``layer{i}`` in both networks."""
    pairs = {}
    for i in range(number):
        first, second = ({"io": io, "path": f"layer{i}"} for io in ("input", "output"))
        pairs[f"pair{i}"] = {
            "student_first": first,
            "student_second": second,
            "teacher_first": first,
            "teacher_second": second,
        }
        if WEIGHTS[i] is not None:
            pairs[f"pair{i}"]["weight"] = WEIGHTS[i]
    return pairs


def io_dicts(maps):
    """What torchdistill's hooks record, from the maps of all pairs in the order of `SHAPES`."""
    student, teacher = (
        {
            f"layer{i}": {"input": maps[4 * i + offset], "output": maps[4 * i + offset + 1]}
            for i in range(len(maps) // 4)
        }
        for offset in (0, 2)
    )
    return student, teacher


def formula(*maps):
    def matrix(first, second):
        size = [min(sizes) for sizes in zip(first.shape[2:], second.shape[2:], strict=True)]
        first, second = (F.adaptive_max_pool2d(x, size) for x in (first, second))
        return torch.einsum("bmhw,bnhw->bmn", first, second) / (size[0] * size[1])

    total = 0
    for i, weight in enumerate(WEIGHTS[: len(maps) // 4]):
        s_first, s_second, t_first, t_second = maps[4 * i : 4 * i + 4]
        residual = matrix(s_first, s_second) - matrix(t_first, t_second)
        columns = residual.pow(2).sum(dim=1).sqrt()  # (B, n)
        total = total + (1 if weight is None else weight) * columns.sum() / len(columns)
    return total


def over_maps(criterion):
    return lambda *maps: criterion(*io_dicts(maps))


def test_tokens_say_where_their_channels_are(maps_of, assert_same):
    maps = maps_of([(2, 7, 3), (2, 7, 5)] * 2)

    def as_images(*maps):
        return formula(*(x.mT.unsqueeze(3) for x in maps))

    assert_same(over_maps(FSPLoss(fsp_pairs(1), channel_dim=-1)), as_images, maps)
    with pytest.raises(ValueError, match=r"channel_dim=-1 for \(B, T, C\)"):
        over_maps(FSPLoss(fsp_pairs(1)))(*maps)


@pytest.fixture
def registry(monkeypatch):
    """torchdistill's registry, or a stand-in where it isn't installed; restored afterwards."""
    try:
        from torchdistill.losses import registry
    except ImportError:
        registry = ModuleType("torchdistill.losses.registry")
        registry.MIDDLE_LEVEL_LOSS_DICT = losses = {}
        registry.register_mid_level_loss = lambda cls: losses.update({cls.__name__: cls})
        registry.get_mid_level_loss = lambda config: losses[config["key"]](**config["kwargs"])
        for name in ("torchdistill", "torchdistill.losses"):
            monkeypatch.setitem(sys.modules, name, ModuleType(name))
        monkeypatch.setitem(sys.modules, registry.__name__, registry)
    taken = registry.MIDDLE_LEVEL_LOSS_DICT.get("FSPLoss", torch.nn.Identity)
    monkeypatch.setitem(registry.MIDDLE_LEVEL_LOSS_DICT, "FSPLoss", taken)
    return registry


@pytest.mark.parametrize("pairs", SHAPES.values(), ids=SHAPES)
def test_values_and_gradients(pairs, maps_of, assert_same):
    maps = maps_of([shape for pair in pairs for shape in pair])
    assert_same(over_maps(FSPLoss(fsp_pairs(len(pairs)))), formula, maps)


@pytest.mark.parametrize("pairs", SHAPES.values(), ids=SHAPES)
def test_values_and_gradients_of_torchdistill_itself(pairs, maps_of, assert_same):
    original = pytest.importorskip("torchdistill.losses.mid_level").FSPLoss
    maps = maps_of([shape for pair in pairs for shape in pair])
    config = fsp_pairs(len(pairs))
    assert_same(over_maps(FSPLoss(config)), over_maps(original(config)), maps)


def test_register_replaces_the_class_of_that_name(registry, maps_of, assert_same):
    config = {"key": "FSPLoss", "kwargs": {"fsp_pairs": fsp_pairs(1)}}
    assert not isinstance(registry.get_mid_level_loss(config), FSPLoss)
    register()
    criterion = registry.get_mid_level_loss(config)
    assert isinstance(criterion, FSPLoss)
    assert_same(over_maps(criterion), formula, maps_of(SHAPES["one pair"][0]))


@pytest.mark.parametrize("found", [None, ModuleType("torchdistill.losses.registry")])
def test_register_says_what_is_missing(found, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchdistill.losses.registry", found)
    with pytest.raises(ImportError, match=r"torchdistill 1\.0 or newer: pip install torchdistill"):
        register()


def test_extra_arguments_are_ignored_as_in_torchdistill(maps_of):
    student, teacher = io_dicts(maps_of(SHAPES["one pair"][0]))
    criterion = FSPLoss(fsp_pairs(1), reduction="mean")
    targets = torch.zeros(3)
    assert criterion(student, teacher, targets, epoch=1) == criterion(student, teacher)


@pytest.mark.parametrize("network", ["student", "teacher"])
def test_unrecorded_module_is_named(network, maps_of):
    student, teacher = io_dicts(maps_of(SHAPES["one pair"][0]))
    config = fsp_pairs(1)
    config["pair0"][f"{network}_first"] = {"io": "input", "path": "layer9"}
    with pytest.raises(KeyError, match=rf"pair0\.{network}_first: module 'layer9' was not"):
        FSPLoss(config)(student, teacher)


def test_unrecorded_io_is_named(maps_of):
    student, teacher = io_dicts(maps_of(SHAPES["one pair"][0]))
    del teacher["layer0"]["output"]
    message = r"pair0\.teacher_second: the 'output' of module 'layer0' was not recorded"
    with pytest.raises(KeyError, match=message):
        FSPLoss(fsp_pairs(1))(student, teacher)
