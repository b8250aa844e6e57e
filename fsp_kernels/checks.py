"""All input errors of the library. Each message says which argument, what it was, what it must be.

Checks read metadata, never the values of maps. :func:`fsp_kernels.fsp_loss` says what NaN and Inf
do.
"""

from __future__ import annotations

import difflib
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from numbers import Rational, Real
from typing import Any

import torch
from torch import Tensor

from fsp_kernels.loss_plan import NO_MASKS, MapSpec, Masks, PairSpec, TeacherSpec, by_network

POOLS = ("max", "avg")
NORMS = ("frobenius", "mse", "column")
REDUCTIONS = ("sum", "none")
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
RANKS = (3, 4, 5)
# By argument: what to write if it is a dict of feature maps, and what is expected.
_PAIRS = "a list or tuple of (first, second) pairs; for one pair write [(first, second)]"
_EXPECTED = {
    "student": ("pairs_of(list(student.values()))", _PAIRS),
    "teacher": ("pairs_of(list(teacher.values()))", _PAIRS),
    "features": ("list(features.values())", "a list or tuple of feature maps"),
}


def flatten_pairs(
    student: Any, teacher: Any, channel_dim: int | None = None
) -> tuple[list[Any], tuple[bool, ...], tuple[bool, ...]]:
    """The maps of a loss in order, and two flags for each pair.

    The first flags say whether the teacher is a ready matrix. The second say whether the pair is
    symmetric: its two maps are one tensor, in the teacher too if that has maps.

    Backends take the maps in this order: pair by pair, student before teacher. Each map is
    ``(B, C, *spatial)``, as a view if ``channel_dim`` is -1. A ready matrix of batch 1 is expanded
    to all samples. :func:`specs_of` checks that all are tensors.

    Raises:
        TypeError: an argument is not a sequence of pairs.
        ValueError: there are no pairs, or not as many for the teacher as for the student.
    """
    if channel_dim is not None:  # saves a function call: most calls leave it out
        check_channel_dim(channel_dim)
    _require_sequence("student", student)
    _require_sequence("teacher", teacher)
    if len(student) != len(teacher):
        for i in range(len(student)):
            _checked_pair("student", student, i)
        raise ValueError(
            f"teacher: got {len(teacher)} entries for {len(student)} student pairs, expected one "
            "pair of maps or one ready FSP matrix for each student pair"
            + (_pairs_hint("teacher", teacher) if len(teacher) == len(student) + 1 else "")
        )
    if not student:
        raise ValueError(
            "student: got no pairs, expected at least one (first, second) pair of maps"
        )
    maps: list[Any] = []
    ready, symmetric = [], []
    for i, entry in enumerate(teacher):
        is_matrix = isinstance(entry, Tensor)
        pair = _checked_pair("student", student, i)
        entry = (entry,) if is_matrix else _checked_pair("teacher", teacher, i)
        if channel_dim == -1:
            pair = _views(pair)
            entry = entry if is_matrix else _views(entry)
        maps += pair
        maps += entry
        ready.append(is_matrix)
        symmetric.append(pair[0] is pair[1] and (is_matrix or entry[0] is entry[1]))
    if True in ready:
        _expand_matrices(maps, ready)
    return maps, tuple(ready), tuple(symmetric)


def specs_of(
    maps: Sequence[Any], ready: Sequence[bool]
) -> tuple[tuple[PairSpec, ...], tuple[TeacherSpec, ...]]:
    """The metadata of what :func:`flatten_pairs` returns, for the student and for the teacher.

    Raises:
        TypeError: a map is not a dense tensor.
    """
    names = [name for i, is_matrix in enumerate(ready) for name in _argument_names(i, is_matrix)]
    return by_network([spec_of(name, x) for name, x in zip(names, maps, strict=True)], ready)


def channels_first(x: Any) -> Any:
    """A map ``(B, *spatial, C)`` as a view ``(B, C, *spatial)``; other values stay as they are."""
    if not isinstance(x, Tensor) or x.is_nested or x.ndim < 3 or x.layout != torch.strided:
        return x
    return x.movedim(-1, 1)


def _views(pair: Any) -> tuple[Any, Any]:
    """:func:`channels_first` of both maps: one view if they are one tensor."""
    first = channels_first(pair[0])
    return first, first if pair[0] is pair[1] else channels_first(pair[1])


def distinct_masks(student_mask: Any, teacher_mask: Any) -> Masks:
    """The masks as given, each tensor once. :func:`check_loss` checks that they suit the maps.

    Raises:
        TypeError: a mask is not a dense tensor of bool.
    """
    if student_mask is None and teacher_mask is None:  # saves calls: most losses have no masks
        return NO_MASKS
    for name, mask in (("student_mask", student_mask), ("teacher_mask", teacher_mask)):
        if mask is not None:
            _check_mask_dtype(name, mask)
    return Masks.of(student_mask, teacher_mask)


def check_mask(mask: Any, first: MapSpec, second: MapSpec, channel_dim: int | None) -> None:
    """Raise unless ``mask`` suits the maps of :func:`fsp_kernels.fsp_matrix`."""
    _check_mask_dtype("mask", mask)
    for name, spec in (("first", first), ("second", second)):
        _check_mask_of("mask", MapSpec.of(mask), name, spec, channel_dim)


def check_loss(
    student: Sequence[PairSpec],
    teacher: Sequence[TeacherSpec],
    channel_dim: int | None = None,
    masks: tuple[MapSpec | None, MapSpec | None] = (None, None),
) -> None:
    """Raise ``TypeError`` or ``ValueError`` unless the loss of these maps is defined.

    The specs come from :func:`specs_of`. ``masks`` are those of the student's and the teacher's
    mask. Messages show shapes as the caller passed them.
    """
    device = student[0][0].device
    for i, (pair, entry) in enumerate(zip(student, teacher, strict=True)):
        check_pair(f"student[{i}]", *pair, channel_dim)
        if len(entry) == 1:
            _check_ready_matrix(i, entry[0], pair)
        else:
            check_pair(f"teacher[{i}]", *entry, channel_dim)
            _check_same_network_shape(i, pair, entry, channel_dim)
        for name, spec in zip(_argument_names(i, len(entry) == 1), (*pair, *entry), strict=True):
            if spec.device != device:
                raise ValueError(
                    f"{name}: is on {spec.device}, expected {device}, where student[0][0] is"
                )
    for network, mask, entries in zip(
        ("student", "teacher"), masks, (student, teacher), strict=True
    ):
        if mask is not None:
            _check_mask_of_network(network, mask, entries, channel_dim)


def check_options(pool: Any, norm: Any, reduction: Any = "sum") -> None:
    """Raise ``ValueError`` unless ``pool``, ``norm`` and ``reduction`` are known."""
    check_choice("pool", pool, POOLS)
    check_choice("norm", norm, NORMS)
    check_choice("reduction", reduction, REDUCTIONS)


def check_channel_dim(channel_dim: Any) -> None:
    """Raise ``ValueError`` unless it is 1, -1 or ``None``."""
    if channel_dim is not None and (type(channel_dim) is not int or channel_dim not in (1, -1)):
        raise ValueError(
            f"channel_dim: got {channel_dim!r}, expected 1 for maps (B, C, *spatial), "
            "-1 for maps (B, *spatial, C), or None"
        )


def check_features(features: Any) -> None:
    """Raise unless ``features`` is a sequence of at least two entries."""
    _require_sequence("features", features)
    if len(features) < 2:
        raise ValueError(
            f"features: got {len(features)}, expected at least two maps to form a pair"
        )


def check_pair(
    name: str | None, first: MapSpec, second: MapSpec, channel_dim: int | None = None
) -> None:
    """Raise unless two maps have an FSP matrix. ``name``: the argument they came from, if one."""
    first_name, second_name = ("first", "second") if name is None else (f"{name}[0]", f"{name}[1]")
    _check_map(first_name, first, channel_dim)
    _check_map(second_name, second, channel_dim)
    if len(first.shape) != len(second.shape):
        raise ValueError(
            f"{second_name}: has {len(second.shape) - 2} spatial axes, shape "
            f"{_given_shape(second, channel_dim)}, expected {len(first.shape) - 2} as "
            f"{first_name}, shape {_given_shape(first, channel_dim)}"
        )
    if len(first.shape) == 3 and channel_dim is None:
        raise ValueError(
            f"{first_name}: has three axes, shape {_shape(first)}, which does not tell where the "
            "channels are; expected channel_dim=-1 for (B, T, C), as transformers have it, or "
            "channel_dim=1 for (B, C, K)"
        )
    if first.shape[0] != second.shape[0]:
        raise ValueError(
            f"{second_name}: has batch size {second.shape[0]}, expected {first.shape[0]} as "
            f"{first_name}: both maps of a pair come from the same samples"
        )
    if first.device != second.device:
        raise ValueError(
            f"{second_name}: is on {second.device}, expected {first.device} as {first_name}"
        )


def check_weight_tensor(
    weights: Tensor, pairs: int | None, device: torch.device | None = None
) -> None:
    """Raise unless a tensor can hold the loss weights. Its values are not read.

    ``pairs`` is the number of pairs and ``device`` that of the maps, where they are known.
    """
    _check_dense_floating("weights", spec_of("weights", weights))
    if weights.dim() != 1:
        raise ValueError(
            f"weights: has shape {tuple(weights.shape)}, expected a 1-D tensor with one entry for "
            "each pair"
        )
    if device is not None and weights.device.type != "cpu" and weights.device != device:
        raise ValueError(f"weights: is on {weights.device}, expected cpu or {device}, as the maps")
    check_count(weights, pairs)


def check_weights(weights: Any, pairs: int | None) -> tuple[float, ...]:
    """The loss weights as floats. ``pairs`` is the number of pairs, if known.

    Raises:
        TypeError: not a sequence of real numbers.
        ValueError: their number is not ``pairs``, or a weight is negative or not finite.
    """
    if isinstance(weights, (str, bytes, dict, set)) or not hasattr(weights, "__len__"):
        raise TypeError(f"weights: got {_kind(weights)}, expected a sequence of numbers or None")
    check_count(weights, pairs)
    for i, weight in enumerate(weights):
        if not isinstance(weight, Real) or isinstance(weight, bool):
            raise TypeError(f"weights[{i}]: got {weight!r}, expected a real number")
        if not _is_nonnegative_float(weight):
            raise ValueError(f"weights[{i}]: got {weight!r}, expected a finite number >= 0")
    return tuple(float(weight) for weight in weights)


def check_networks(student: Any, teacher: Any, example: Any) -> None:
    """Raise unless these are two modules and, if there is one, an example of their inputs."""
    for name, network in (("student", student), ("teacher", teacher)):
        if not isinstance(network, torch.nn.Module):
            raise TypeError(f"{name}: got {_kind(network)}, expected a torch.nn.Module")
    if student is teacher:
        raise ValueError("teacher: is the student itself, expected another network or a copy")
    if not isinstance(example, (Tensor, tuple, Mapping, type(None))):
        raise TypeError(
            f"example: got {_kind(example)}, expected a tensor, a tuple of arguments or a dict of "
            "keywords"
        )


def check_keyword(name: str, value: Any) -> None:
    """Raise ``TypeError`` unless ``value`` can be the name of a keyword, or is ``None``."""
    if value is not None and not (isinstance(value, str) and value.isidentifier()):
        raise TypeError(
            f"{name}: got {value!r}, expected the name of a keyword such as 'attention_mask', "
            "or None"
        )


def mask_among(keyword: str, keywords: Mapping[str, Any]) -> Tensor:
    """The mask that came as a keyword, as bool.

    Raises:
        TypeError: there is no such keyword, or it is no tensor.
    """
    found = keywords.get(keyword)
    if not isinstance(found, Tensor):
        got = f"got {_kind(found)}" if keyword in keywords else "is missing"
        raise TypeError(f"{keyword}: {got}, expected a tensor (B, *spatial) by this keyword")
    return found if found.dtype == torch.bool else found != 0


def check_not_traced() -> None:
    """Raise ``RuntimeError`` inside ``torch.jit.trace``, which cannot record a call."""
    if torch.jit.is_tracing():
        raise RuntimeError(
            "torch.jit.trace (and what calls it, such as TensorBoard's add_graph) cannot record "
            "fsp_loss and fsp_matrix; use torch.export.export"
        )


def check_choice(name: str, value: Any, choices: Sequence[str]) -> None:
    """Raise ``ValueError`` unless ``value`` is one of ``choices``."""
    if isinstance(value, str) and value in choices:
        return
    near = difflib.get_close_matches(str(value), choices, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise ValueError(
        f"{name}: got {value!r}, expected one of {', '.join(map(repr, choices))}{hint}"
    )


def spec_of(name: str, value: Any) -> MapSpec:
    """The metadata of a tensor argument; ``TypeError`` if it is not a dense tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: got {_kind(value)}, expected a torch.Tensor")
    if value.is_nested:
        raise TypeError(
            f"{name}: got a nested tensor, expected a dense one; use .to_padded_tensor()"
        )
    if hasattr(value, "full_tensor"):
        raise TypeError(
            f"{name}: got a DTensor, expected a plain tensor; if all maps are sharded evenly over "
            "the batch, use .to_local() of each and divide the loss by the number of shards, as "
            "the loss of the batch is the mean of the shards' losses; else use .full_tensor()"
        )
    return MapSpec.of(value)


def check_count(weights: Any, pairs: int | None) -> None:
    if pairs is not None and len(weights) != pairs:
        raise ValueError(
            f"weights: got {len(weights)} for {pairs} pairs, expected one for each pair"
        )


def _require_sequence(name: str, value: Any) -> None:
    # A tensor has a length too, and would be split along its batch without an error.
    if isinstance(value, (list, tuple)):
        return
    of_mapping, expected = _EXPECTED[name]
    hint = ""
    if isinstance(value, Mapping):
        meant = of_mapping if _are_maps(value.values()) else f"list({name}.values())"
        hint = f"; did you mean {meant}?"
    elif isinstance(value, Iterable) and not isinstance(value, (Tensor, str, bytes)):
        hint = f"; did you mean list({name})?"
    raise TypeError(f"{name}: got {_kind(value)}, expected {expected}{hint}")


def _checked_pair(argument: str, entries: Sequence[Any], index: int) -> Any:
    """``entries[index]``; raises ``TypeError`` unless it is a pair."""
    pair = entries[index]
    # The type is checked since a tensor would be split along its batch without an error.
    if isinstance(pair, (tuple, list)) and len(pair) == 2:
        return pair
    name = f"{argument}[{index}]"
    if isinstance(pair, (tuple, list)):
        got, hint = f"{len(pair)} items", _pairs_hint(name, pair)
    else:
        got, hint = _kind(pair), _pairs_hint(argument, entries)
    also = " or one FSP matrix (B, m, n)" if argument == "teacher" else ""
    raise TypeError(
        f"{name}: got {got}, expected a pair of feature maps (first, second){also}{hint}"
    )


def _pairs_hint(name: str, entries: Sequence[Any]) -> str:
    """What to write instead, if ``entries`` should be pairs but are the maps of layers."""
    if len(entries) < 2 or not _are_maps(entries):
        return ""
    return f"; did you mean pairs_of({name})? One pair is written [(first, second)]"


def _are_maps(values: Iterable[Any]) -> bool:
    return all(isinstance(x, Tensor) for x in values)


def _check_dense(name: str, spec: MapSpec) -> None:
    if spec.layout != torch.strided:
        raise TypeError(
            f"{name}: has layout {spec.layout}, expected a dense (strided) tensor; use .to_dense()"
        )


def _check_dense_floating(name: str, spec: MapSpec) -> None:
    _check_dense(name, spec)
    if spec.dtype not in DTYPES:
        hint = "; use .dequantize()" if "q" in str(spec.dtype) else ""
        raise TypeError(
            f"{name}: has dtype {spec.dtype}, expected one of {', '.join(map(str, DTYPES))}{hint}"
        )


def _check_map(name: str, spec: MapSpec, channel_dim: int | None) -> None:
    _check_dense_floating(name, spec)
    shape = _given_shape(spec, channel_dim)
    if len(shape) not in RANKS:
        expected = "(B, *spatial, C)" if channel_dim == -1 else "(B, C, *spatial)"
        raise ValueError(f"{name}: has shape {shape}, expected {expected} with 1 to 3 spatial axes")
    for i, size in enumerate(spec.shape):
        if size == 0:
            axis = ("batch", "channels", "spatial")[min(i, 2)]
            raise ValueError(f"{name}: has shape {shape}, expected no empty axis ({axis} is 0)")


def _check_mask_dtype(name: str, mask: Any) -> None:
    spec = spec_of(name, mask)
    _check_dense(name, spec)
    if spec.dtype != torch.bool:
        raise TypeError(
            f"{name}: has dtype {spec.dtype}, expected torch.bool, true where a position counts; "
            "use .bool()"
        )


def _check_mask_of_network(
    network: str, mask: MapSpec, entries: Sequence[TeacherSpec], channel_dim: int | None
) -> None:
    pairs = [(i, entry) for i, entry in enumerate(entries) if len(entry) == 2]
    if not pairs:
        raise ValueError(
            f"{network}_mask: got a mask, expected None, because the teacher has ready matrices "
            "alone; pass the mask to fsp_matrix, which computes them"
        )
    for i, entry in pairs:
        for side, spec in enumerate(entry):
            _check_mask_of(f"{network}_mask", mask, f"{network}[{i}][{side}]", spec, channel_dim)


def _check_mask_of(
    name: str, mask: MapSpec, map_name: str, spec: MapSpec, channel_dim: int | None
) -> None:
    expected = (spec.shape[0], *spec.shape[2:])
    if tuple(mask.shape) != expected:
        raise ValueError(
            f"{name}: has shape {_shape(mask)}, expected (B, *spatial) = {expected}, one entry for "
            f"each position of {map_name}, shape {_given_shape(spec, channel_dim)}; maps of other "
            "spatial sizes need another call, with their own mask"
        )
    if mask.device != spec.device:
        raise ValueError(f"{name}: is on {mask.device}, expected {spec.device}, as {map_name}")


def _expand_matrices(maps: list[Any], ready: Sequence[bool]) -> None:
    """Expand ready matrices ``(1, m, n)`` to all samples, in the list ``maps``."""
    place = 0
    for pair, entry in zip(*specs_of(maps, ready), strict=True):
        if len(entry) == 1 and _serves_all_samples(entry[0], pair):
            matrix = maps[place + 2]
            # In fp32, so that its gradient, a sum over samples, is rounded only once.
            wide = matrix.float() if matrix.dtype in (torch.float16, torch.bfloat16) else matrix
            maps[place + 2] = wide.expand(pair[0].shape[0], -1, -1)
        place += 2 + len(entry)


def _serves_all_samples(matrix: MapSpec, pair: PairSpec) -> bool:
    """Whether a ready matrix is ``(1, m, n)`` and the pair has more samples."""
    if len(matrix.shape) != 3 or matrix.shape[0] != 1 or matrix.layout != torch.strided:
        return False
    batches, *channels = pair[0].shape[:1], pair[0].shape[1:2], pair[1].shape[1:2]
    return batches != (1,) and (*channels[0], *channels[1]) == tuple(matrix.shape[1:])


def _check_ready_matrix(index: int, matrix: MapSpec, pair: PairSpec) -> None:
    name = f"teacher[{index}]"
    _check_dense_floating(name, matrix)
    expected = (pair[0].shape[0], pair[0].shape[1], pair[1].shape[1])
    if tuple(matrix.shape) != expected:
        hint = "" if len(matrix.shape) == 3 else "; of a list of maps, make pairs_of(teacher)"
        raise ValueError(
            f"{name}: is a ready FSP matrix of shape {_shape(matrix)}, expected (B, m, n) = "
            f"{expected} as the maps of student[{index}] give it, or {(1, *expected[1:])} for all "
            f"samples{hint}"
        )


def _check_same_network_shape(
    index: int, student: PairSpec, teacher: PairSpec, channel_dim: int | None
) -> None:
    axis = 1 if channel_dim is None else channel_dim
    for side, s, t in zip((0, 1), student, teacher, strict=True):
        name = f"teacher[{index}][{side}]"
        if s.shape[0] != t.shape[0]:
            raise ValueError(
                f"{name}: has batch size {t.shape[0]}, expected {s.shape[0]} as "
                f"student[{index}][{side}]: both networks see the same samples"
            )
        if s.shape[1] != t.shape[1]:
            sizes = f"{s.shape[1]}, {t.shape[1]}"
            layer = (
                f"linear layer, torch.nn.Linear({sizes})"
                if axis == -1
                else f"1x1 convolution, e.g. torch.nn.Conv{len(s.shape) - 2}d({sizes}, "
                "kernel_size=1)"
            )
            raise ValueError(
                f"pair {index}: student[{index}][{side}] has {s.shape[1]} channels and {name} has "
                f"{t.shape[1]} (axis {axis} of {_given_shape(s, channel_dim)} and "
                f"{_given_shape(t, channel_dim)}), but FSP compares matrices of equal size, so it "
                f"needs equal channel counts; project the student's map with a {layer}"
            )


def _argument_names(index: int, is_matrix: bool) -> tuple[str, ...]:
    student = (f"student[{index}][0]", f"student[{index}][1]")
    if is_matrix:
        return (*student, f"teacher[{index}]")
    return (*student, f"teacher[{index}][0]", f"teacher[{index}][1]")


def _shape(spec: MapSpec) -> tuple[int, ...]:
    return tuple(spec.shape)


def _given_shape(spec: MapSpec, channel_dim: int | None) -> tuple[int, ...]:
    """The shape of a map before :func:`channels_first`."""
    if channel_dim != -1 or len(spec.shape) < 3:
        return _shape(spec)
    batch, channels, *spatial = spec.shape
    return (batch, *spatial, channels)


def _is_nonnegative_float(number: Any) -> bool:
    # An integer or a fraction can be too large for a float although it is less than infinity.
    exact = isinstance(number, Rational)
    return bool(0 <= number <= int(sys.float_info.max) if exact else 0 <= number < math.inf)


def _kind(value: Any) -> str:
    if isinstance(value, Tensor):
        return "a nested tensor" if value.is_nested else f"a tensor of shape {tuple(value.shape)}"
    return "None" if value is None else f"{type(value).__module__}.{type(value).__qualname__}"
