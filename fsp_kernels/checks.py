"""Every input error of the library, in one place: which argument, what it was, what it must be.

Checks look at metadata only, never at values: NaN and Inf in the data propagate, as
:func:`fsp_kernels.fsp_loss` says.
"""

from __future__ import annotations

import difflib
import math
import sys
from collections.abc import Sequence
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
    student: Any, teacher: Any
) -> tuple[list[Tensor], tuple[PairSpec, ...], tuple[TeacherSpec, ...]]:
    """The tensors of a loss in order, and what planning needs to know of them.

    Raises:
        TypeError: an argument is not a sequence of pairs of dense tensors.
        ValueError: there are no pairs, or not as many for the teacher as for the student.
    """
    expected = "a list or tuple of (first, second) pairs; for one pair write [(first, second)]"
    _require_sequence("student", student, expected)
    _require_sequence("teacher", teacher, expected)
    if len(student) != len(teacher):
        raise ValueError(
            f"teacher: got {len(teacher)} entries for {len(student)} student pairs, expected as "
            "many: one pair of maps or one ready FSP matrix for each student pair"
        )
    if not student:
        raise ValueError(
            "student: got no pairs, expected at least one (first, second) pair of maps"
        )
    maps: list[Tensor] = []
    student_specs = tuple(_read_pair(f"student[{i}]", pair, maps) for i, pair in enumerate(student))
    # The order in which backends expect the tensors: pair by pair, student before teacher.
    ordered: list[Tensor] = []
    teacher_specs: list[TeacherSpec] = []
    for i, entry in enumerate(teacher):
        ordered += maps[2 * i : 2 * i + 2]
        if isinstance(entry, Tensor):
            teacher_specs.append((spec_of(f"teacher[{i}]", entry),))
            ordered.append(entry)
        else:
            teacher_specs.append(_read_pair(f"teacher[{i}]", entry, ordered))
    return ordered, student_specs, tuple(teacher_specs)


def check_loss(student: Sequence[PairSpec], teacher: Sequence[TeacherSpec]) -> None:
    """Raise ``TypeError`` or ``ValueError`` unless the loss of these maps is defined."""
    device = student[0][0].device
    for i, (pair, entry) in enumerate(zip(student, teacher, strict=True)):
        check_pair(f"student[{i}]", *pair)
        if len(entry) == 1:
            _check_ready_matrix(i, entry[0], pair)
        else:
            check_pair(f"teacher[{i}]", *entry)
            _check_same_network_shape(i, pair, entry)
        for name, spec in zip(_names(i, entry), (*pair, *entry), strict=True):
            if spec.device != device:
                raise ValueError(
                    f"{name}: is on {spec.device}, expected {device}, where student[0][0] is"
                )


def check_options(pool: Any, norm: Any) -> None:
    """Raise ``ValueError`` unless both are among the known."""
    check_choice("pool", pool, POOLS)
    check_choice("norm", norm, NORMS)


def check_features(features: Any) -> None:
    """Raise unless ``features`` is a sequence of at least two things."""
    _require_sequence("features", features, "a list or tuple of feature maps")
    if len(features) < 2:
        raise ValueError(
            f"features: got {len(features)}, expected at least two maps to form a pair"
        )


def check_pair(name: str | None, first: MapSpec, second: MapSpec) -> None:
    """Raise unless two maps have an FSP matrix. ``name`` is the argument that held them, if one."""
    first_name, second_name = ("first", "second") if name is None else (f"{name}[0]", f"{name}[1]")
    _check_map(first_name, first)
    _check_map(second_name, second)
    if len(first.shape) != len(second.shape):
        raise ValueError(
            f"{second_name}: has {len(second.shape) - 2} spatial axes, shape {_shape(second)}, "
            f"expected {len(first.shape) - 2} as {first_name}, shape {_shape(first)}"
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


def check_weights(weights: Any, pairs: int | None) -> tuple[float, ...]:
    """The loss weights as floats, one for each of ``pairs`` if that is known.

    Raises:
        TypeError: not a sequence of real numbers.
        ValueError: not as many as ``pairs``; or a weight is negative or not finite.
    """
    if isinstance(weights, Tensor):
        raise TypeError(
            "weights: got a tensor, expected a sequence of numbers: reading a tensor back would "
            "stall its device on every call; pass weights.tolist()"
        )
    if isinstance(weights, (str, bytes, dict, set)) or not hasattr(weights, "__len__"):
        raise TypeError(f"weights: got {_kind(weights)}, expected a sequence of numbers or None")
    if pairs is not None and len(weights) != pairs:
        raise ValueError(
            f"weights: got {len(weights)} for {pairs} pairs, expected one for each pair"
        )
    for i, weight in enumerate(weights):
        if not isinstance(weight, Real) or isinstance(weight, bool):
            raise TypeError(f"weights[{i}]: got {weight!r}, expected a real number")
        if not _is_nonnegative_float(weight):
            raise ValueError(f"weights[{i}]: got {weight!r}, expected a finite number >= 0")
    return tuple(float(weight) for weight in weights)


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


def _require_sequence(name: str, value: Any, expected: str) -> None:
    # A tensor has a length and would unpack along its batch without complaint.
    if not isinstance(value, (list, tuple)):
        raise TypeError(f"{name}: got {_kind(value)}, expected {expected}")


def _read_pair(name: str, pair: Any, maps: list[Tensor]) -> PairSpec:
    # A tensor would unpack along its batch without complaint, so the type matters here.
    if not isinstance(pair, (tuple, list)):
        _fail_pair(name, _kind(pair))
    if len(pair) != 2:
        _fail_pair(name, f"{len(pair)} items")
    maps += pair
    return spec_of(f"{name}[0]", pair[0]), spec_of(f"{name}[1]", pair[1])


def _fail_pair(name: str, got: str) -> NoReturn:
    also = " or one FSP matrix (B, m, n)" if name.startswith("teacher") else ""
    raise TypeError(f"{name}: got {got}, expected a pair of feature maps (first, second){also}")


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


def _check_map(name: str, spec: MapSpec) -> None:
    _check_dense_floating(name, spec)
    if len(spec.shape) not in RANKS:
        raise ValueError(
            f"{name}: has shape {_shape(spec)}, expected (B, C, *spatial) with 1 to 3 spatial axes"
        )
    for axis, size in zip(("batch", "channels", *["spatial"] * 3), spec.shape, strict=False):
        if size == 0:
            raise ValueError(
                f"{name}: has shape {_shape(spec)}, expected no empty axis ({axis} is 0)"
            )


def _check_ready_matrix(index: int, matrix: MapSpec, pair: PairSpec) -> None:
    name = f"teacher[{index}]"
    _check_dense_floating(name, matrix)
    expected = (pair[0].shape[0], pair[0].shape[1], pair[1].shape[1])
    if tuple(matrix.shape) != expected:
        raise ValueError(
            f"{name}: is a ready FSP matrix of shape {_shape(matrix)}, expected (B, m, n) = "
            f"{expected} as the maps of student[{index}] give it"
        )


def _check_same_network_shape(index: int, student: PairSpec, teacher: PairSpec) -> None:
    for side, s, t in zip((0, 1), student, teacher, strict=True):
        name = f"teacher[{index}][{side}]"
        if s.shape[0] != t.shape[0]:
            raise ValueError(
                f"{name}: has batch size {t.shape[0]}, expected {s.shape[0]} as "
                f"student[{index}][{side}]: both networks see the same samples"
            )
        if s.shape[1] != t.shape[1]:
            raise ValueError(
                f"pair {index}: student[{index}][{side}] has {s.shape[1]} channels and {name} has "
                f"{t.shape[1]}, but FSP compares matrices of equal size, so it needs equal channel "
                f"counts; project the student's map with a 1x1 convolution, e.g. "
                f"torch.nn.Conv{len(s.shape) - 2}d({s.shape[1]}, {t.shape[1]}, kernel_size=1)"
            )


def _names(index: int, entry: TeacherSpec) -> tuple[str, ...]:
    student = (f"student[{index}][0]", f"student[{index}][1]")
    if len(entry) == 1:
        return (*student, f"teacher[{index}]")
    return (*student, f"teacher[{index}][0]", f"teacher[{index}][1]")


def _shape(spec: MapSpec) -> tuple[int, ...]:
    return tuple(spec.shape)


def _is_nonnegative_float(number: Any) -> bool:
    # An integer or a fraction is less than infinity and may yet be too large for a float.
    exact = isinstance(number, Rational)
    return bool(0 <= number <= int(sys.float_info.max) if exact else 0 <= number < math.inf)


def _kind(value: Any) -> str:
    if isinstance(value, Tensor):
        return "a nested tensor" if value.is_nested else f"a tensor of shape {tuple(value.shape)}"
    return "None" if value is None else f"{type(value).__module__}.{type(value).__qualname__}"
