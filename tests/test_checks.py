"""Every input error: its type, and that it names the argument, what it was and what it must be.

All of it runs with and without gradients, because the two take different ways to the checks.
"""

import contextlib
import fractions
import math
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import fsp_kernels as fsp
from fsp_kernels import backends


@pytest.fixture(autouse=True, params=[True, False], ids=["grad", "no_grad"])
def _grad_mode(request) -> Iterator[None]:
    with torch.set_grad_enabled(request.param):
        yield


@contextlib.contextmanager
def refuses(error: type[Exception], *says: str) -> Iterator[None]:
    """Exactly this exception is raised, and its message has all of these parts."""
    with pytest.raises(error) as caught:
        yield
    assert caught.type is error
    for part in says:
        assert part in str(caught.value)


def by_function(student: Any, teacher: Any, **options: Any) -> Any:
    return fsp.fsp_loss(student, teacher, **options)


def by_module(student: Any, teacher: Any) -> Any:
    return fsp.FSPLoss()(student, teacher)


def by_explain(student: Any, teacher: Any, **options: Any) -> Any:
    return fsp.explain(student, teacher, **options)


def by_operator(student: Any, teacher: Any, **options: Any) -> Any:
    """Under a dispatch mode the call goes to ``torch.ops.fsp``."""
    with FlopCounterMode(display=False):
        return fsp.fsp_loss(student, teacher, **options)


Loss = Callable[..., Any]
every_loss = pytest.mark.parametrize("loss", [by_function, by_module, by_explain, by_operator])
losses_with_options = pytest.mark.parametrize("loss", [by_function, by_explain, by_operator])

B, M, N = 2, 3, 5


def first(*spatial: int) -> Tensor:
    return torch.randn(B, M, *(spatial or (4, 4)))


def second(*spatial: int) -> Tensor:
    return torch.randn(B, N, *(spatial or (4, 4)))


def pair(*spatial: int) -> tuple[Tensor, Tensor]:
    return first(*spatial), second(*spatial)


# --- containers -----------------------------------------------------------------------------------


@every_loss
@pytest.mark.parametrize("name", ["student", "teacher"])
@pytest.mark.parametrize(
    ("value", "got"),
    [
        (None, "None"),
        ((p for p in [pair()]), "builtins.generator"),
        ({"layer1": pair()}, "builtins.dict"),
        ("layer1", "builtins.str"),
    ],
    ids=["none", "generator", "dict", "string"],
)
def test_pairs_must_be_in_a_list_or_tuple(loss, name, value, got):
    arguments = {"student": [pair()], "teacher": [pair()], name: value}
    with refuses(
        TypeError, f"{name}: got {got}", "expected a list or tuple of (first, second) pairs"
    ):
        loss(arguments["student"], arguments["teacher"])


@every_loss
@pytest.mark.parametrize("name", ["student", "teacher"])
def test_a_tensor_is_no_sequence_of_pairs(loss, name):
    arguments = {"student": [pair()], "teacher": [pair()], name: first()}
    with refuses(
        TypeError,
        f"{name}: got a tensor of shape (2, 3, 4, 4)",
        "expected a list or tuple of (first, second) pairs",
        "[(first, second)]",
    ):
        loss(arguments["student"], arguments["teacher"])


def features(count: int = 3) -> list[Tensor]:
    """The maps of a network's layers."""
    return [torch.randn(B, M, 4, 4) for _ in range(count)]


@every_loss
@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("sequence", [list, tuple])
def test_a_list_of_maps_gets_told_of_pairs_of(loss, sequence, count):
    with refuses(TypeError, "student[0]: got a tensor", "did you mean pairs_of(student)?"):
        loss(sequence(features(count)), sequence(features(count)))


@every_loss
def test_two_maps_in_place_of_a_list_of_pairs_get_told_how_one_is_written(loss):
    with refuses(TypeError, "One pair is written [(first, second)]"):
        loss(pair(), pair())


@every_loss
def test_maps_of_the_teacher_beside_pairs_get_told_of_pairs_of(loss):
    with refuses(ValueError, "got 3 entries for 2 student", "did you mean pairs_of(teacher)?"):
        loss(fsp.pairs_of(features()), features())
    with refuses(ValueError, "is a ready FSP matrix of shape", "make pairs_of(teacher)"):
        loss(fsp.pairs_of(features()), features()[:2])


@every_loss
def test_maps_of_the_student_beside_pairs_get_told_of_pairs_of(loss):
    with refuses(TypeError, "student[0]: got a tensor", "did you mean pairs_of(student)?"):
        loss(features(), fsp.pairs_of(features()))


@every_loss
@pytest.mark.parametrize("name", ["student", "teacher"])
def test_a_list_of_lists_of_maps_gets_told_of_pairs_of(loss, name):
    arguments = {"student": [pair()], "teacher": [pair()], name: [features()]}
    with refuses(TypeError, f"{name}[0]: got 3 items", f"did you mean pairs_of({name}[0])?"):
        loss(**arguments)


@every_loss
@pytest.mark.parametrize("name", ["student", "teacher"])
@pytest.mark.parametrize(
    ("make", "meant"),
    [
        (lambda: dict(enumerate(features())), "pairs_of(list({}.values()))"),
        (lambda: {"layer1": pair()}, "list({}.values())"),
        (lambda: (p for p in [pair()]), "list({})"),
        (lambda: zip(features(), features(), strict=True), "list({})"),
        (lambda: {"layer1": pair()}.values(), "list({})"),
    ],
    ids=["dict of maps", "dict of pairs", "generator", "zip", "values of a dict"],
)
def test_other_collections_get_told_what_to_make_of_them(loss, name, make, meant):
    arguments = {"student": [pair()], "teacher": [pair()], name: make()}
    with refuses(TypeError, f"{name}: got ", f"; did you mean {meant.format(name)}?"):
        loss(**arguments)


@every_loss
def test_a_hint_is_only_given_where_it_would_help(loss):
    for student in ([pair(), first()], [first()], [None], "layer1", None, first()):
        with pytest.raises(TypeError) as caught:
            loss(student, [pair()])
        assert "did you mean" not in str(caught.value)


@every_loss
def test_a_nested_tensor_is_no_sequence_of_pairs(loss):
    for nested in (ragged(), jagged()):
        with refuses(TypeError, "student: got a", "tensor", "expected a list or tuple"):
            loss(nested, [pair()])


@every_loss
@pytest.mark.parametrize("empty", [[], ()], ids=["list", "tuple"])
def test_there_must_be_a_pair(loss, empty):
    with refuses(ValueError, "student: got no pairs", "expected at least one (first, second) pair"):
        loss(empty, empty)


@every_loss
@pytest.mark.parametrize(("students", "teachers"), [(1, 2), (2, 1), (1, 0), (0, 1)])
def test_student_and_teacher_have_as_many_pairs(loss, students, teachers):
    with refuses(
        ValueError, f"teacher: got {teachers} entries for {students} student pairs", "expected one"
    ):
        loss([pair()] * students, [pair()] * teachers)


@every_loss
def test_a_tensor_is_no_student_pair_though_its_batch_of_two_unpacks(loss):
    with refuses(
        TypeError,
        "student[1]: got a tensor of shape (2, 3, 4, 4)",
        "expected a pair of feature maps (first, second)",
    ):
        loss([pair(), first()], [pair(), pair()])


@every_loss
def test_a_teacher_map_alone_is_taken_for_a_ready_matrix_and_refused_by_its_shape(loss):
    with refuses(
        ValueError,
        "teacher[0]: is a ready FSP matrix of shape (2, 3, 4, 4)",
        "expected (B, m, n) = (2, 3, 5)",
        "or (1, 3, 5) for all samples",
    ):
        loss([pair()], [first()])


@every_loss
@pytest.mark.parametrize("name", ["student", "teacher"])
@pytest.mark.parametrize(
    ("entry", "got"),
    [
        ((first(), second(), first()), "3 items"),
        ((first(),), "1 items"),
        (iter(pair()), "builtins.tuple_iterator"),
        ({"first": first(), "second": second()}, "builtins.dict"),
        (None, "None"),
        (np.zeros((2, 3, 4, 4)), "numpy.ndarray"),
    ],
    ids=["triple", "single", "iterator", "dict", "none", "array"],
)
def test_an_entry_must_be_a_pair(loss, name, entry, got):
    arguments = {"student": [pair()] * 2, "teacher": [pair()] * 2}
    arguments[name] = [pair(), entry]
    with refuses(TypeError, f"{name}[1]: got {got}", "expected a pair of feature maps"):
        loss(arguments["student"], arguments["teacher"])


@every_loss
def test_only_the_teacher_is_offered_a_ready_matrix(loss):
    with refuses(TypeError, "expected a pair of feature maps (first, second) or one FSP matrix"):
        loss([pair()], [None])
    with pytest.raises(TypeError) as caught:
        loss([None], [pair()])
    assert "matrix" not in str(caught.value)


# --- what a map must be ---------------------------------------------------------------------------


def compressed(x: Tensor) -> Tensor:
    with warnings.catch_warnings():  # creation warns of being in beta
        warnings.simplefilter("ignore")
        return x.to_sparse_csr()


def quantized(x: Tensor) -> Tensor:
    with warnings.catch_warnings():  # creation warns of its deprecation
        warnings.simplefilter("ignore")
        return torch.quantize_per_tensor(x, scale=0.1, zero_point=0, dtype=torch.qint8)


def jagged() -> Tensor:
    return torch.nested.nested_tensor([torch.randn(4, 3), torch.randn(5, 3)], layout=torch.jagged)


def ragged() -> Tensor:
    with warnings.catch_warnings():  # nested tensors of this layout warn of being a prototype
        warnings.simplefilter("ignore")
        return torch.nested.nested_tensor([torch.randn(3, 4), torch.randn(3, 5)])


DTYPES = "expected one of torch.float64, torch.float32, torch.float16, torch.bfloat16"
DENSE = "expected a dense (strided) tensor; use .to_dense()"

# What stands in for a map (B, 3, 4, 4): its maker, the exception, what it says after the name.
BAD_MAPS = [
    pytest.param(lambda: None, TypeError, ("got None", "expected a torch.Tensor"), id="none"),
    pytest.param(lambda: 1.0, TypeError, ("got builtins.float", "torch.Tensor"), id="float"),
    pytest.param(
        lambda: first().numpy(),
        TypeError,
        ("got numpy.ndarray", "expected a torch.Tensor"),
        id="numpy",
    ),
    pytest.param(
        lambda: first().tolist(),
        TypeError,
        ("got builtins.list", "expected a torch.Tensor"),
        id="nested lists",
    ),
    *(
        pytest.param(
            lambda dtype=dtype: torch.zeros(B, M, 4, 4).to(dtype),
            TypeError,
            (f"has dtype {dtype}", DTYPES),
            id=str(dtype),
        )
        for dtype in (
            torch.int64,
            torch.int8,
            torch.uint8,
            torch.bool,
            torch.complex64,
            torch.float8_e4m3fn,
            torch.float8_e5m2,
        )
    ),
    pytest.param(
        lambda: quantized(first()),
        TypeError,
        ("has dtype torch.qint8", DTYPES, "use .dequantize()"),
        id="quantized",
    ),
    pytest.param(
        lambda: first().to_sparse(),
        TypeError,
        ("has layout torch.sparse_coo", DENSE),
        id="sparse COO",
    ),
    pytest.param(
        lambda: compressed(first(4)),
        TypeError,
        ("has layout torch.sparse_csr", DENSE),
        id="sparse CSR",
    ),
    pytest.param(
        ragged,
        TypeError,
        ("got a nested tensor", "expected a dense one", ".to_padded_tensor()"),
        id="nested",
    ),
    pytest.param(
        jagged,
        TypeError,
        ("got a nested tensor", "expected a dense one", ".to_padded_tensor()"),
        id="jagged",
    ),
    *(
        pytest.param(
            lambda shape=shape: torch.zeros(shape),
            ValueError,
            (f"has shape {shape}", "expected (B, C, *spatial) with 1 to 3 spatial axes"),
            id=f"rank {len(shape)}",
        )
        for shape in ((), (2,), (2, 3), (2, 3, 1, 2, 2, 2))
    ),
    *(
        pytest.param(
            lambda shape=shape: torch.zeros(shape),
            ValueError,
            (f"has shape {shape}", f"expected no empty axis ({axis} is 0)"),
            id=f"{axis} {shape}",
        )
        for shape, axis in (
            ((0, 3, 4, 4), "batch"),
            ((2, 0, 4, 4), "channels"),
            ((2, 3, 0, 4), "spatial"),
            ((2, 3, 4, 0), "spatial"),
            ((2, 3, 4, 4, 0), "spatial"),
            ((2, 3, 0), "spatial"),
        )
    ),
]

# Where a map can stand, as messages name it.
PLACES = ["student[0][0]", "student[1][1]", "teacher[1][0]"]


@every_loss
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(("make", "error", "says"), BAD_MAPS)
def test_loss_refuses_a_bad_map(loss, place, make, error, says):
    arguments = {name: [list(pair()), list(pair())] for name in ("student", "teacher")}
    name, index, side = place[:7], int(place[8]), int(place[11])
    arguments[name][index][side] = make()
    with refuses(error, f"{place}: {says[0]}", *says):
        loss(**arguments)


@pytest.mark.parametrize("name", ["first", "second"])
@pytest.mark.parametrize(("make", "error", "says"), BAD_MAPS)
def test_matrix_refuses_a_bad_map(name, make, error, says):
    with refuses(error, f"{name}: {says[0]}", *says):
        fsp.fsp_matrix(**{"first": first(), "second": second(), name: make()})


# --- maps that do not go together -----------------------------------------------------------------


@every_loss
@pytest.mark.parametrize("name", ["student", "teacher"])
def test_maps_of_a_pair_have_one_batch_size(loss, name):
    arguments = {"student": [pair()], "teacher": [pair()], name: [(first(), second()[:1])]}
    with refuses(
        ValueError,
        f"{name}[0][1]: has batch size 1, expected 2 as {name}[0][0]",
        "same samples",
    ):
        loss(**arguments)


def test_maps_of_a_matrix_have_one_batch_size():
    with refuses(ValueError, "second: has batch size 1, expected 2 as first", "same samples"):
        fsp.fsp_matrix(first(), second()[:1])


@every_loss
def test_both_networks_have_one_batch_size(loss):
    with refuses(
        ValueError, "teacher[1][0]: has batch size 1, expected 2 as student[1][0]", "same samples"
    ):
        loss([pair(), pair()], [pair(), (first()[:1], second()[:1])])


@every_loss
@pytest.mark.parametrize("name", ["student", "teacher"])
def test_maps_of_a_pair_have_as_many_spatial_axes(loss, name):
    arguments = {"student": [pair()], "teacher": [pair()], name: [(first(4, 4), second(4))]}
    with refuses(
        ValueError,
        f"{name}[0][1]: has 1 spatial axes, shape (2, 5, 4), expected 2 as {name}[0][0]",
    ):
        loss(**arguments)


def test_maps_of_a_matrix_have_as_many_spatial_axes():
    with refuses(ValueError, "second: has 3 spatial axes, shape (2, 5, 2, 2, 2), expected 1"):
        fsp.fsp_matrix(first(4), second(2, 2, 2))


# --- where channels are ---------------------------------------------------------------------------


def tokens(channels: int) -> tuple[Tensor, Tensor]:
    return torch.randn(B, 17, channels), torch.randn(B, 17, channels)


WHICH = (
    "which does not tell where the channels are",
    "channel_dim=-1 for (B, T, C)",
    "channel_dim=1 for (B, C, K)",
)


@every_loss
@pytest.mark.parametrize("name", ["student", "teacher"])
def test_maps_of_three_axes_need_a_channel_dim(loss, name):
    arguments = {"student": [pair()], "teacher": [pair()], name: [tokens(8)]}
    with refuses(ValueError, f"{name}[0][0]: has three axes, shape (2, 17, 8), ", *WHICH):
        loss(**arguments)


def test_matrix_of_three_axes_needs_a_channel_dim():
    with refuses(ValueError, "first: has three axes, shape (2, 17, 8), ", *WHICH):
        fsp.fsp_matrix(*tokens(8))


@every_loss
def test_tokens_beside_a_ready_matrix_need_a_channel_dim(loss):
    with refuses(ValueError, "student[0][0]: has three axes", *WHICH):
        loss([tokens(8)], [torch.randn(B, 8, 8)])


@losses_with_options
def test_a_call_that_said_where_channels_are_does_not_hide_one_that_did_not(loss):
    student, teacher = [tokens(8)], [tokens(8)]
    for _ in range(2):
        loss(student, teacher, channel_dim=1)
        with refuses(ValueError, "student[0][0]: has three axes", *WHICH):
            loss(student, teacher)


@losses_with_options
def test_students_of_64_channels_do_not_fit_teachers_of_128(loss):
    with refuses(
        ValueError,
        "student[0][0] has 64 channels and teacher[0][0] has 128",
        "(axis -1 of (2, 17, 64) and (2, 17, 128))",
        "torch.nn.Linear(64, 128)",
    ):
        loss([tokens(64)], [tokens(128)], channel_dim=-1)


@losses_with_options
@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda x: x[:1], "teacher[0][1]: has batch size 1, expected 2 as teacher[0][0]"),
        (lambda x: x[:, None], "teacher[0][1]: has 2 spatial axes, shape (2, 1, 17, 8), "),
        (lambda x: x[:, :0], "teacher[0][1]: has shape (2, 0, 8), expected no empty axis (spatial"),
        (lambda x: x[..., :0], "teacher[0][1]: has shape (2, 17, 0), expected no empty axis (chan"),
        (lambda x: x[0], "teacher[0][1]: has shape (17, 8), expected (B, *spatial, C) with"),
        (lambda x: x[0, 0], "teacher[0][1]: has shape (8,), expected (B, *spatial, C) with"),
        (lambda x: x[None, None, None], "teacher[0][1]: has shape (1, 1, 1, 2, 17, 8), expected"),
    ],
    ids=["batch", "axes", "no positions", "no channels", "rank 2", "rank 1", "rank 6"],
)
def test_shapes_are_told_as_they_were_given(loss, change, says):
    first, second = tokens(8)
    with refuses(ValueError, says):
        loss([tokens(8)], [(first, change(second))], channel_dim=-1)


@losses_with_options
@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: torch.zeros(B, 17, 8).to_sparse(), "has layout torch.sparse_coo"),
        (lambda: compressed(torch.zeros(B, 17, 8)), "has layout torch.sparse_csr"),
        (jagged, "got a nested tensor"),
        (lambda: None, "got None"),
    ],
    ids=["sparse COO", "sparse CSR", "nested", "None"],
)
def test_what_is_no_map_is_refused_with_its_channels_last_too(loss, make, says):
    with refuses(TypeError, f"student[0][1]: {says}"):
        loss([(tokens(8)[0], make())], [tokens(8)], channel_dim=-1)


CHANNEL_DIMS = [0, 2, -2, 1.0, True, "last", [1]]


@losses_with_options
@pytest.mark.parametrize("channel_dim", CHANNEL_DIMS, ids=repr)
def test_channel_dim_is_the_second_axis_or_the_last(loss, channel_dim):
    with refuses(ValueError, f"channel_dim: got {channel_dim!r}, expected 1 ", "-1 for maps"):
        loss([pair()], [pair()], channel_dim=channel_dim)


@pytest.mark.parametrize("channel_dim", CHANNEL_DIMS, ids=repr)
def test_channel_dim_of_a_matrix_and_of_the_module_is_one_of_these(channel_dim):
    with refuses(ValueError, f"channel_dim: got {channel_dim!r}, expected 1 "):
        fsp.fsp_matrix(first(), second(), channel_dim=channel_dim)
    with refuses(ValueError, f"channel_dim: got {channel_dim!r}, expected 1 "):
        fsp.FSPLoss(channel_dim=channel_dim)


# --- networks that do not go together -------------------------------------------------------------


@every_loss
@pytest.mark.parametrize("side", [0, 1])
def test_both_networks_have_as_many_channels_or_need_a_projection(loss, side):
    teacher = list(pair())
    channels = teacher[side].shape[1]
    teacher[side] = torch.randn(B, 7, 4, 4)
    with refuses(
        ValueError,
        "pair 1:",
        f"student[1][{side}] has {channels} channels and teacher[1][{side}] has 7",
        "needs equal channel counts",
        "1x1 convolution",
        f"torch.nn.Conv2d({channels}, 7, kernel_size=1)",
    ):
        loss([pair(), pair()], [pair(), tuple(teacher)])


@every_loss
@pytest.mark.parametrize(
    "shape", [(2, 5, 3), (3, 3, 5), (1, 5, 3), (2, 3, 4), (2, 15), (2, 3, 5, 1), (2, 0, 5)], ids=str
)
def test_ready_matrix_has_the_shape_of_the_student_s(loss, shape):
    with refuses(
        ValueError,
        f"teacher[1]: is a ready FSP matrix of shape {shape}",
        "expected (B, m, n) = (2, 3, 5)",
        "or (1, 3, 5) for all samples",
        "student[1]",
    ):
        loss([pair(), pair()], [pair(), torch.zeros(shape)])


@every_loss
@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda x: x.long(), "has dtype torch.int64"),
        (lambda x: x.to_sparse(), "has layout torch.sparse_coo"),
        (compressed, "has layout torch.sparse_csr"),
        (lambda _: jagged(), "got a nested tensor"),
        (quantized, "has dtype torch.qint8"),
    ],
    ids=["integer", "sparse COO", "sparse CSR", "nested", "quantized"],
)
def test_ready_matrix_is_a_dense_floating_point_tensor(loss, make, says):
    with refuses(TypeError, f"teacher[0]: {says}", "expected"):
        loss([pair()], [make(torch.zeros(B, M, N))])


@every_loss
def test_maps_of_a_pair_are_on_one_device(loss):
    with refuses(ValueError, "student[0][1]: is on meta, expected cpu as student[0][0]"):
        loss([(first(), second().to("meta"))], [pair()])


@every_loss
@pytest.mark.parametrize("side", ["student", "teacher"])
def test_all_pairs_are_on_one_device(loss, side):
    elsewhere = tuple(x.to("meta") for x in pair())
    arguments = {"student": [pair(), pair()], "teacher": [pair(), pair()]}
    arguments[side][1] = elsewhere
    with refuses(ValueError, f"{side}[1][0]: is on meta, expected cpu, where student[0][0] is"):
        loss(**arguments)


@every_loss
def test_ready_matrix_is_on_the_device_of_the_maps(loss):
    with refuses(ValueError, "teacher[0]: is on meta, expected cpu, where student[0][0] is"):
        loss([pair()], [torch.zeros(B, M, N, device="meta")])


def test_maps_of_a_matrix_are_on_one_device():
    with refuses(ValueError, "second: is on meta, expected cpu as first"):
        fsp.fsp_matrix(first(), second().to("meta"))


# --- options --------------------------------------------------------------------------------------

BAD_WEIGHTS = [
    pytest.param([-1.0], ValueError, ("weights[0]: got -1.0", "finite number >= 0"), id="negative"),
    pytest.param([math.nan], ValueError, ("weights[0]: got nan", "finite number >= 0"), id="nan"),
    pytest.param([math.inf], ValueError, ("weights[0]: got inf", "finite number >= 0"), id="inf"),
    pytest.param([10**400], ValueError, ("weights[0]: got 1000", "finite number"), id="huge"),
    pytest.param([1j], TypeError, ("weights[0]: got 1j", "a real number"), id="complex"),
    pytest.param(["1"], TypeError, ("weights[0]: got '1'", "a real number"), id="string in it"),
    pytest.param([True], TypeError, ("weights[0]: got True", "a real number"), id="bool"),
    pytest.param([None], TypeError, ("weights[0]: got None", "a real number"), id="none in it"),
    pytest.param([torch.ones(())], TypeError, ("weights[0]: got tensor", "real"), id="0-dim"),
    pytest.param(
        torch.ones(1, dtype=torch.int64),
        TypeError,
        ("weights: has dtype torch.int64", "expected one of torch.float64"),
        id="tensor of integers",
    ),
    pytest.param(
        torch.ones(1).to_sparse(), TypeError, ("weights: has layout torch.sparse",), id="sparse"
    ),
    pytest.param(
        torch.ones(1, 1),
        ValueError,
        ("weights: has shape (1, 1)", "expected a 1-D tensor"),
        id="tensor of two axes",
    ),
    *(
        pytest.param(value, TypeError, (f"weights: got {got}", "expected a sequence"), id=got)
        for value, got in (
            ("1", "builtins.str"),
            (b"1", "builtins.bytes"),
            (1.0, "builtins.float"),
            ({0: 1.0}, "builtins.dict"),
            ({1.0}, "builtins.set"),
            (iter([1.0]), "builtins.list_iterator"),
        )
    ),
]


@pytest.mark.parametrize(("weights", "error", "says"), BAD_WEIGHTS)
@pytest.mark.parametrize("loss", [by_function, by_operator])
def test_loss_refuses_bad_weights(loss, weights, error, says):
    with refuses(error, *says, "expected"):
        loss([pair()], [pair()], weights=weights)


@pytest.mark.parametrize(("weights", "error", "says"), BAD_WEIGHTS)
def test_module_refuses_bad_weights_when_made(weights, error, says):
    with refuses(error, *says, "expected"):
        fsp.FSPLoss(weights=weights)


@pytest.mark.parametrize("loss", [by_function, by_operator])
def test_values_of_a_tensor_of_weights_are_checked_where_they_are_read(loss):
    with refuses(ValueError, "weights[0]: got -1.0, expected a finite number >= 0"):
        loss([pair()], [pair()], weights=torch.tensor([-1.0]))


@pytest.mark.parametrize("loss", [by_function, by_operator])
def test_a_tensor_of_weights_is_on_the_cpu_or_beside_the_maps(loss):
    with refuses(ValueError, "weights: is on meta, expected cpu or cpu, as the maps"):
        loss([pair()], [pair()], weights=torch.ones(1, device="meta"))


def test_a_bad_weight_is_named_by_its_place():
    with refuses(ValueError, "weights[1]: got -0.5, expected a finite number >= 0"):
        fsp.fsp_loss([pair()] * 3, [pair()] * 3, weights=[1.0, -0.5, 1.0])


@pytest.mark.parametrize("loss", [by_function, by_operator])
@pytest.mark.parametrize("count", [0, 1, 3])
def test_there_is_a_weight_for_each_pair(loss, count):
    for weights in ([1.0] * count, torch.ones(count), torch.ones(count, requires_grad=True)):
        with refuses(ValueError, f"weights: got {count} for 2 pairs", "expected one for each pair"):
            loss([pair()] * 2, [pair()] * 2, weights=weights)


@pytest.mark.parametrize(
    "weights",
    [[2], (2.0,), [np.float32(2)], np.array([2.0]), [np.int64(2)], [fractions.Fraction(2)]],
    ids=["int", "tuple", "numpy scalar", "array", "numpy integer", "fraction"],
)
def test_any_sequence_of_real_numbers_will_do_for_weights(weights):
    student, teacher = [pair()], [pair()]
    doubled = fsp.fsp_loss(student, teacher, weights=weights)
    assert doubled.item() == pytest.approx(2 * fsp.fsp_loss(student, teacher).item(), rel=1e-6)


def test_a_weight_of_zero_is_allowed():
    assert fsp.fsp_loss([pair()], [pair()], weights=[0]).item() == 0


UNKNOWN = [
    ("pool", "maxx", "'max', 'avg'; did you mean 'max'?"),
    ("pool", "AVG", "'max', 'avg'"),
    ("pool", "average", "'max', 'avg'; did you mean 'avg'?"),
    ("pool", None, "'max', 'avg'"),
    ("pool", ["max"], "'max', 'avg'"),
    ("norm", "frobenus", "'frobenius', 'mse', 'column'; did you mean 'frobenius'?"),
    ("norm", "columns", "'frobenius', 'mse', 'column'; did you mean 'column'?"),
    ("norm", "nuclear", "'frobenius', 'mse', 'column'"),
    ("norm", 2, "'frobenius', 'mse', 'column'"),
    ("norm", ["mse"], "'frobenius', 'mse', 'column'"),
    ("backend", "trch", "'torch'; did you mean 'torch'?"),
    ("backend", "fortran", "'torch'"),
    ("backend", "", "'torch'"),
    ("backend", 3, "'torch'"),
    ("backend", ["torch"], "'torch'"),
]


def _ids(value: Any) -> str:
    return repr(value)


@losses_with_options
@pytest.mark.parametrize(("name", "value", "expected"), UNKNOWN, ids=_ids)
def test_loss_refuses_an_unknown_option(loss, name, value, expected):
    with refuses(ValueError, f"{name}: got {value!r}, expected one of", *expected.split("; ")):
        loss([pair()], [pair()], **{name: value})


@pytest.mark.parametrize(
    ("name", "value", "expected"), [row for row in UNKNOWN if row[0] != "norm"], ids=_ids
)
def test_matrix_refuses_an_unknown_option(name, value, expected):
    with refuses(ValueError, f"{name}: got {value!r}, expected one of", *expected.split("; ")):
        fsp.fsp_matrix(first(), second(), **{name: value})


@pytest.mark.parametrize(
    ("name", "value", "expected"), [row for row in UNKNOWN if row[0] != "backend"], ids=_ids
)
def test_module_refuses_an_unknown_option_when_made(name, value, expected):
    with refuses(ValueError, f"{name}: got {value!r}, expected one of", *expected.split("; ")):
        fsp.FSPLoss(**{name: value})


@pytest.mark.parametrize(
    ("name", "value", "expected"), [row for row in UNKNOWN if row[0] == "backend"], ids=_ids
)
def test_use_backend_refuses_an_unknown_name(name, value, expected):
    with refuses(ValueError, f"{name}: got {value!r}, expected one of", *expected.split("; ")):
        fsp.use_backend(value)


@pytest.mark.parametrize("name", ["pool", "norm"])
def test_options_are_checked_though_nothing_is_pooled(name):
    with refuses(ValueError, f"{name}: got 'none'"):
        fsp.fsp_loss([pair()], [pair()], **{name: "none"})


# --- pairs_of -------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [0, 1])
def test_pairs_of_refuses_fewer_than_two_maps(count):
    with refuses(ValueError, f"features: got {count}", "expected at least two maps"):
        fsp.pairs_of([first()] * count)


def test_pairs_of_refuses_a_tensor_though_its_batch_of_two_unpacks():
    with refuses(TypeError, "features: got a tensor of shape (2, 3, 4, 4)", "expected"):
        fsp.pairs_of(first())


@pytest.mark.parametrize(
    ("features", "got"),
    [
        (None, "None"),
        ((x for x in pair()), "builtins.generator"),
        ({"layer1": first(), "layer2": second()}, "builtins.dict"),
        ("layers", "builtins.str"),
    ],
    ids=["none", "generator", "dict", "string"],
)
def test_pairs_of_refuses_what_is_no_list(features, got):
    with refuses(TypeError, f"features: got {got}", "expected"):
        fsp.pairs_of(features)


@pytest.mark.parametrize(
    ("make", "meant"),
    [
        (lambda: {"layer1": first(), "layer2": second()}, "list(features.values())"),
        (lambda: (x for x in pair()), "list(features)"),
    ],
    ids=["dict", "generator"],
)
def test_pairs_of_tells_how_to_make_a_list(make, meant):
    with refuses(TypeError, "features: got ", f"; did you mean {meant}?"):
        fsp.pairs_of(make())


# --- what an error leaves behind ------------------------------------------------------------------

SAME_SHAPE_BUT = {
    "integer": (lambda x: x.long(), TypeError, "has dtype torch.int64"),
    "sparse": (lambda x: x.to_sparse(), TypeError, "has layout torch.sparse_coo"),
    "quantized": (quantized, TypeError, "has dtype torch.qint8"),
    "elsewhere": (lambda x: x.to("meta"), ValueError, "is on meta"),
}


@every_loss
@pytest.mark.parametrize("kind", SAME_SHAPE_BUT)
def test_a_call_that_worked_does_not_hide_a_later_error(loss, kind):
    change, error, says = SAME_SHAPE_BUT[kind]
    student, teacher = pair(), pair()
    for _ in range(2):
        loss([student], [teacher])
        with refuses(error, f"teacher[0][1]: {says}"):
            loss([student], [(teacher[0], change(teacher[1]))])


@losses_with_options
@pytest.mark.parametrize("name", ["pool", "norm", "backend"])
def test_a_call_that_worked_does_not_hide_an_unknown_option(loss, name):
    student, teacher = [pair()], [pair()]
    for _ in range(2):
        loss(student, teacher)
        with refuses(ValueError, f"{name}: got 'unknown'"):
            loss(student, teacher, **{name: "unknown"})


def test_a_call_that_worked_does_not_hide_bad_weights():
    student, teacher = [pair()], [pair()]
    fsp.fsp_loss(student, teacher, weights=[1.0])
    with refuses(ValueError, "weights[0]: got -1.0"):
        fsp.fsp_loss(student, teacher, weights=[-1.0])


@every_loss
def test_an_error_is_raised_every_time(loss):
    student, teacher = [pair()], [(first(), second()[:1])]
    for _ in range(3):
        with refuses(ValueError, "teacher[0][1]: has batch size 1"):
            loss(student, teacher)


@every_loss
def test_an_error_does_not_spoil_the_next_call(loss):
    student, teacher = [pair(3, 3)], [pair(3, 3)]
    with refuses(TypeError, "teacher[0][0]"):
        loss(student, [(teacher[0][0].long(), teacher[0][1])])
    loss(student, teacher)


@pytest.mark.parametrize(
    "options",
    [{"weights": [-1.0]}, {"pool": "none"}, {"norm": "none"}, {"backend": "none"}, {}],
    ids=["weights", "pool", "norm", "backend", "channels"],
)
def test_a_refused_call_changes_no_input(options):
    student = [x.requires_grad_() for x in pair()]
    teacher = list(pair()) if options else [first(), torch.randn(B, 7, 4, 4)]
    before = [x.detach().clone() for x in (*student, *teacher)]
    with pytest.raises(ValueError, match=r"got|channels"):
        fsp.fsp_loss([tuple(student)], [tuple(teacher)], **options)
    for x, copy in zip((*student, *teacher), before, strict=True):
        assert torch.equal(x, copy)
        assert x.grad is None
        assert x._version == 0


def test_a_refused_use_backend_changes_no_default():
    before = backends._PROCESS.name
    with pytest.raises(ValueError, match="backend"):
        fsp.use_backend("none")
    assert backends._PROCESS.name == before


# --- what is no error -----------------------------------------------------------------------------


@pytest.mark.parametrize("norm", ["frobenius", "mse", "column"])
def test_nan_is_data_and_propagates(norm):
    student, teacher = pair(), pair()
    student[0][0, 0, 0, 0] = math.nan
    assert fsp.fsp_loss([student], [teacher], norm=norm).isnan()


def test_infinity_is_data_and_propagates():
    student, teacher = pair(), pair()
    student[0][0, 0, 0, 0] = math.inf
    assert not fsp.fsp_loss([student], [teacher]).isfinite()
    assert not fsp.fsp_matrix(*student).isfinite().all()


def test_lists_and_tuples_may_be_mixed():
    student, teacher = pair(), pair()
    wanted = fsp.fsp_loss([student], [teacher])
    assert torch.equal(fsp.fsp_loss((list(student),), [list(teacher)]), wanted)


def test_networks_may_differ_in_rank_and_spatial_size():
    assert fsp.fsp_loss([pair(16)], [pair(4, 4)], channel_dim=1).isfinite()
    assert fsp.fsp_loss([pair(3, 3)], [pair(5, 4)]).isfinite()


def test_each_map_may_have_its_own_dtype():
    student, teacher = (first().half(), second().double()), (first().bfloat16(), second())
    assert fsp.fsp_loss([student], [teacher]).isfinite()
