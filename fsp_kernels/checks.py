"""Every input error of the library, in one place: which argument, what it was, what it must be.

Checks look at metadata only, never at values: NaN and Inf in the data propagate, as
:func:`fsp_kernels.fsp_loss` says.
"""

from __future__ import annotations

import difflib
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from numbers import Rational, Real
from typing import Any, NoReturn

import torch
from torch import Tensor

from fsp_kernels.loss_plan import MapSpec, PairSpec, TeacherSpec

POOLS = ("max", "avg")
NORMS = ("frobenius", "mse", "column")
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
RANKS = (3, 4, 5)


def flatten_pairs(
    student: Any, teacher: Any, channel_dim: int | None = None
) -> tuple[list[Tensor], tuple[PairSpec, ...], tuple[TeacherSpec, ...]]:
    """The tensors of a loss in order, and what planning needs to know of them.

    Maps come as ``(B, C, *spatial)``, in a view where ``channel_dim`` is -1. A ready matrix of
    batch 1 comes as a view that has it for every sample.

    Raises:
        TypeError: an argument is not a sequence of pairs of dense tensors.
        ValueError: there are no pairs, or not as many for the teacher as for the student.
    """
    if channel_dim is not None:  # for most calls cheaper than the function
        check_channel_dim(channel_dim)
    expected = "a list or tuple of (first, second) pairs; for one pair write [(first, second)]"
    _require_sequence("student", student, expected, "pairs_of(list(student.values()))")
    _require_sequence("teacher", teacher, expected, "pairs_of(list(teacher.values()))")
    maps: list[Tensor] = []
    student_specs = tuple(
        [_read_pair("student", student, i, maps, channel_dim) for i in range(len(student))]
    )
    if len(student) != len(teacher):
        raise ValueError(
            f"teacher: got {len(teacher)} entries for {len(student)} student pairs, expected as "
            "many: one pair of maps or one ready FSP matrix for each student pair"
            + (_pairs_hint("teacher", teacher) if len(teacher) == len(student) + 1 else "")
        )
    if not student:
        raise ValueError(
            "student: got no pairs, expected at least one (first, second) pair of maps"
        )
    # The order in which backends expect the tensors: pair by pair, student before teacher.
    ordered: list[Tensor] = []
    teacher_specs: list[TeacherSpec] = []
    for i, entry in enumerate(teacher):
        ordered += maps[2 * i : 2 * i + 2]
        if isinstance(entry, Tensor):
            spec = spec_of(f"teacher[{i}]", entry)
            if _serves_all_samples(spec, student_specs[i]):
                # In fp32, so that its gradient, a sum over samples, is rounded once.
                wide = entry.float() if entry.dtype in (torch.float16, torch.bfloat16) else entry
                entry = wide.expand(student_specs[i][0].shape[0], -1, -1)
                spec = MapSpec.of(entry)
            teacher_specs.append((spec,))
            ordered.append(entry)
        else:
            teacher_specs.append(_read_pair("teacher", teacher, i, ordered, channel_dim))
    return ordered, student_specs, tuple(teacher_specs)


def channels_first(x: Tensor) -> Tensor:
    """A map ``(B, *spatial, C)`` as a view ``(B, C, *spatial)``; what is no map stays as it is."""
    return x.movedim(-1, 1) if x.ndim > 2 and x.layout == torch.strided else x


def check_loss(
    student: Sequence[PairSpec],
    teacher: Sequence[TeacherSpec],
    channel_dim: int | None = None,
) -> None:
    """Raise ``TypeError`` or ``ValueError`` unless the loss of these maps is defined.

    The specs are those of :func:`flatten_pairs`; messages give shapes as the caller did.
    """
    device = student[0][0].device
    for i, (pair, entry) in enumerate(zip(student, teacher, strict=True)):
        check_pair(f"student[{i}]", *pair, channel_dim)
        if len(entry) == 1:
            _check_ready_matrix(i, entry[0], pair)
        else:
            check_pair(f"teacher[{i}]", *entry, channel_dim)
            _check_same_network_shape(i, pair, entry, channel_dim)
        for name, spec in zip(_names(i, entry), (*pair, *entry), strict=True):
            if spec.device != device:
                raise ValueError(
                    f"{name}: is on {spec.device}, expected {device}, where student[0][0] is"
                )


def check_options(pool: Any, norm: Any) -> None:
    """Raise ``ValueError`` unless both are among the known."""
    check_choice("pool", pool, POOLS)
    check_choice("norm", norm, NORMS)


def check_channel_dim(channel_dim: Any) -> None:
    """Raise ``ValueError`` unless it is 1, -1 or ``None``."""
    if channel_dim is not None and (type(channel_dim) is not int or channel_dim not in (1, -1)):
        raise ValueError(
            f"channel_dim: got {channel_dim!r}, expected 1 for maps (B, C, *spatial), "
            "-1 for maps (B, *spatial, C), or None"
        )


def check_features(features: Any) -> None:
    """Raise unless ``features`` is a sequence of at least two things."""
    expected = "a list or tuple of feature maps"
    _require_sequence("features", features, expected, "list(features.values())")
    if len(features) < 2:
        raise ValueError(
            f"features: got {len(features)}, expected at least two maps to form a pair"
        )


def check_pair(
    name: str | None, first: MapSpec, second: MapSpec, channel_dim: int | None = None
) -> None:
    """Raise unless two maps have an FSP matrix. ``name`` is the argument that held them, if one."""
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
    """Raise unless a tensor holds loss weights; ``pairs`` and ``device`` of the maps, if known.

    Its values are not read.
    """
    _check_dense_floating("weights", spec_of("weights", weights))
    if weights.dim() != 1:
        raise ValueError(
            f"weights: has shape {tuple(weights.shape)}, expected a 1-D tensor with one entry for "
            "each pair"
        )
    if device is not None and weights.device.type != "cpu" and weights.device != device:
        raise ValueError(f"weights: is on {weights.device}, expected cpu or {device}, as the maps")
    _check_count(weights, pairs)


def check_weights(weights: Any, pairs: int | None) -> tuple[float, ...]:
    """The loss weights as floats, one for each of ``pairs`` if that is known.

    Raises:
        TypeError: not a sequence of real numbers.
        ValueError: not as many as ``pairs``; or a weight is negative or not finite.
    """
    if isinstance(weights, (str, bytes, dict, set)) or not hasattr(weights, "__len__"):
        raise TypeError(f"weights: got {_kind(weights)}, expected a sequence of numbers or None")
    _check_count(weights, pairs)
    for i, weight in enumerate(weights):
        if not isinstance(weight, Real) or isinstance(weight, bool):
            raise TypeError(f"weights[{i}]: got {weight!r}, expected a real number")
        if not _is_nonnegative_float(weight):
            raise ValueError(f"weights[{i}]: got {weight!r}, expected a finite number >= 0")
    return tuple(float(weight) for weight in weights)


def check_not_traced() -> None:
    """Raise ``RuntimeError`` inside ``torch.jit.trace``: it would record nothing of a call."""
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
    return MapSpec.of(value)


def _check_count(weights: Any, pairs: int | None) -> None:
    if pairs is not None and len(weights) != pairs:
        raise ValueError(
            f"weights: got {len(weights)} for {pairs} pairs, expected one for each pair"
        )


def _require_sequence(name: str, value: Any, expected: str, of_mapping: str) -> None:
    # A tensor has a length and would unpack along its batch without complaint.
    if isinstance(value, (list, tuple)):
        return
    hint = ""
    if isinstance(value, Mapping):
        meant = of_mapping if _are_maps(value.values()) else f"list({name}.values())"
        hint = f"; did you mean {meant}?"
    elif isinstance(value, Iterable) and not isinstance(value, (Tensor, str, bytes)):
        hint = f"; did you mean list({name})?"
    raise TypeError(f"{name}: got {_kind(value)}, expected {expected}{hint}")


def _read_pair(
    argument: str, entries: Sequence[Any], index: int, maps: list[Tensor], channel_dim: int | None
) -> PairSpec:
    """The specs of ``entries[index]``, whose maps are added to ``maps``."""
    name, pair = f"{argument}[{index}]", entries[index]
    # A tensor would unpack along its batch without complaint, so the type matters here.
    if not isinstance(pair, (tuple, list)):
        _fail_pair(name, _kind(pair), _pairs_hint(argument, entries))
    if len(pair) != 2:
        _fail_pair(name, f"{len(pair)} items", _pairs_hint(name, pair))
    specs = spec_of(f"{name}[0]", pair[0]), spec_of(f"{name}[1]", pair[1])
    if channel_dim == -1:
        pair = channels_first(pair[0]), channels_first(pair[1])
        specs = MapSpec.of(pair[0]), MapSpec.of(pair[1])
    maps += pair
    return specs


def _fail_pair(name: str, got: str, hint: str) -> NoReturn:
    also = " or one FSP matrix (B, m, n)" if name.startswith("teacher") else ""
    raise TypeError(
        f"{name}: got {got}, expected a pair of feature maps (first, second){also}{hint}"
    )


def _pairs_hint(name: str, entries: Sequence[Any]) -> str:
    """What to write where ``entries``, expected to be pairs, are the maps of a network's layers."""
    if len(entries) < 2 or not _are_maps(entries):
        return ""
    return f"; did you mean pairs_of({name})? One pair is written [(first, second)]"


def _are_maps(values: Iterable[Any]) -> bool:
    return all(isinstance(x, Tensor) for x in values)


def _check_dense_floating(name: str, spec: MapSpec) -> None:
    if spec.layout != torch.strided:
        raise TypeError(
            f"{name}: has layout {spec.layout}, expected a dense (strided) tensor; use .to_dense()"
        )
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
    for axis, size in zip(("batch", "channels", *["spatial"] * 3), spec.shape, strict=False):
        if size == 0:
            raise ValueError(f"{name}: has shape {shape}, expected no empty axis ({axis} is 0)")


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


def _names(index: int, entry: TeacherSpec) -> tuple[str, ...]:
    student = (f"student[{index}][0]", f"student[{index}][1]")
    if len(entry) == 1:
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
    # An integer or a fraction is less than infinity and may yet be too large for a float.
    exact = isinstance(number, Rational)
    return bool(0 <= number <= int(sys.float_info.max) if exact else 0 <= number < math.inf)


def _kind(value: Any) -> str:
    if isinstance(value, Tensor):
        return "a nested tensor" if value.is_nested else f"a tensor of shape {tuple(value.shape)}"
    return "None" if value is None else f"{type(value).__module__}.{type(value).__qualname__}"
