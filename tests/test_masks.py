"""Masks: only some positions of each sample count."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from layouts import LAYOUTS
from tolerances import TOLERANCES, assert_close, flatten, oracle
from torch.autograd import gradcheck, gradgradcheck
from torch.library import opcheck
from torch.utils.flop_counter import FlopCounterMode

import fsp_kernels as fsp
from benchmarks.memory import profiled_peak
from fsp_kernels import reference
from fsp_kernels.backends import registered_backends
from fsp_kernels.backends.torch_backend import TorchBackend

DTYPES = tuple(TOLERANCES)
NORMS = ("frobenius", "mse", "column")
SIZES = {"matrix": (4, 5), "gram": (3, 1), "sequence": (9,), "volume": (2, 3, 2)}
CHANNELS = {"gram": (40, 24)}  # of some sizes; else (5, 4)
NETWORKS = ("both", "each its own", "student", "teacher")  # which have a mask


def right_padded(batch, *size):
    """True up to some position, another one in each sample; of the first sample nowhere."""
    positions = torch.Size(size).numel()
    lengths = torch.arange(batch)[:, None] * positions // max(1, batch - 1)
    return (torch.arange(positions) < lengths).view(batch, *size)


MASKS = {
    "right padded": right_padded,
    "left padded": lambda *shape: right_padded(*shape).flatten(1).flip(1).view(shape),
    "anywhere": lambda *shape: torch.rand(shape) < 0.5,
    "one position": lambda *shape: (
        right_padded(*shape)
        .flatten(1)
        .diff(dim=1, prepend=torch.ones(shape[0], 1, dtype=torch.bool))
        .view(shape)
    ),
    "all": lambda *shape: torch.ones(shape, dtype=torch.bool),
    "none": lambda *shape: torch.zeros(shape, dtype=torch.bool),
}


@pytest.fixture(params=["torch", "cpu"])
def backend(request):
    """The backend of calls that name none."""
    reason = registered_backends()[request.param].why_unavailable()
    if reason:
        pytest.skip(reason)
    with fsp.use_backend("torch" if request.param == "torch" else None):
        yield request.param


def masks_of(networks, make, batch, size):
    """The keyword arguments of a loss."""
    mask = make(batch, *size)
    other = mask if networks == "both" else make(batch, *size).flip(0)
    return {
        **({} if networks == "teacher" else {"student_mask": mask}),
        **({} if networks == "student" else {"teacher_mask": other}),
    }


def network(batch, channels, size, mask, dtype=torch.float32, layout="contiguous"):
    """Two maps that are NaN where they do not count."""
    maps = (torch.randn(batch, c, *size, dtype=torch.float64).to(dtype) for c in channels)
    if mask is not None:
        maps = (x.masked_fill(~mask[:, None], float("nan")) for x in maps)
    return tuple(LAYOUTS[layout](x).requires_grad_() for x in maps)


def call_of(masks, name="matrix", batch=4, **options):
    channels, size = CHANNELS.get(name, (5, 4)), SIZES[name]
    student, teacher = (
        network(batch, channels, size, masks.get(f"{of}_mask"), **options)
        for of in ("student", "teacher")
    )
    return [student], [teacher]


def check(student, teacher, **options):
    """Hold the loss and all gradients to the definition. Returns the gradients."""
    tensors = flatten(student, teacher)
    loss = fsp.fsp_loss(student, teacher, channel_dim=1, **options)
    gradients = torch.autograd.grad(loss, tensors)
    planned = {name: value for name, value in options.items() if name != "weights"}
    plan = fsp.explain(student, teacher, channel_dim=1, **planned)
    oracle(student, teacher, **options).check(loss, gradients, plan)
    for x, gradient in zip(tensors, gradients, strict=True):
        assert gradient.dtype == x.dtype
        assert gradient.stride() == torch.empty_like(x).stride()
    return gradients


# --- the definition -------------------------------------------------------------------------------


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_the_reference_is_a_sum_over_the_positions_that_count(mask):
    mask = mask(3, 2, 3)
    first, second = (torch.randn(3, c, 2, 3, dtype=torch.float64) for c in (2, 4))
    found = reference.fsp_matrix(first, second, mask=mask)
    for b, i, j in product(range(3), range(2), range(4)):
        places = [at for at in product(range(2), range(3)) if mask[(b, *at)]]
        total = sum(first[(b, i, *at)].item() * second[(b, j, *at)].item() for at in places)
        assert found[b, i, j].item() == pytest.approx(total / max(1, len(places)), abs=1e-12)


def test_the_reference_of_padded_maps_is_that_of_the_maps_without_padding():
    student, teacher = ([network(1, (5, 4), (3, 4), None)] for _ in range(2))
    padded = [
        [tuple(torch.nn.functional.pad(x, (0, 3, 0, 2), value=9) for x in pair) for pair in pairs]
        for pairs in (student, teacher)
    ]
    mask = torch.zeros(1, 5, 7, dtype=torch.bool)
    mask[:, :3, :4] = True
    expected = reference.fsp_loss(student, teacher)
    found = reference.fsp_loss(*padded, student_mask=mask, teacher_mask=mask)
    torch.testing.assert_close(found, expected)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("networks", NETWORKS)
@pytest.mark.parametrize("make", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("name", SIZES)
def test_loss_and_gradients_are_those_of_the_definition(name, make, networks, norm, dtype):
    masks = masks_of(networks, make, 4, SIZES[name])
    student, teacher = call_of(masks, name, dtype=dtype)
    gradients = check(student, teacher, norm=norm, **masks)
    for mask, pair in zip(
        ("student_mask", "teacher_mask"), (gradients[:2], gradients[2:]), strict=True
    ):
        if mask in masks:
            for gradient in pair:
                assert not gradient[~masks[mask][:, None].expand(gradient.shape)].any()


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("networks", ["both", "student"])
@pytest.mark.parametrize("name", ["matrix", "gram"])
def test_maps_may_lie_in_memory_in_any_way(name, networks, layout):
    masks = masks_of(networks, MASKS["anywhere"], 4, SIZES[name])
    if "for all" in layout:  # one element, so NaN would be everywhere
        student, teacher = call_of({}, name, layout=layout)
    else:
        student, teacher = call_of(masks, name, layout=layout)
    check(student, teacher, **masks)


@pytest.mark.usefixtures("backend")
@given(
    batch=st.integers(1, 5),
    channels=st.tuples(st.integers(1, 20), st.integers(1, 20)),
    size=st.lists(st.integers(1, 6), min_size=1, max_size=3),
    make=st.sampled_from(list(MASKS.values())),
    networks=st.sampled_from(NETWORKS),
    norm=st.sampled_from(NORMS),
    dtypes=st.tuples(*[st.sampled_from(DTYPES)] * 2),
)
def test_any_call_gives_the_definition(batch, channels, size, make, networks, norm, dtypes):
    masks = masks_of(networks, make, batch, size)
    student, teacher = (
        [network(batch, channels, size, masks.get(f"{of}_mask"), dtype=dtype)]
        for of, dtype in zip(("student", "teacher"), dtypes, strict=True)
    )
    check(student, teacher, norm=norm, **masks)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("networks", ["both", "each its own"])
@pytest.mark.parametrize("name", ["matrix", "gram"])
def test_a_pair_may_be_a_map_with_itself(name, networks, norm):
    masks = masks_of(networks, MASKS["anywhere"], 4, SIZES[name])
    (a, _), (c, _) = (pairs[0] for pairs in call_of(masks, name))
    student, teacher = [(a, a)], [(c, c)]
    assert fsp.explain(student, teacher, norm=norm, **masks).pairs[0].symmetric
    loss = fsp.fsp_loss(student, teacher, norm=norm, **masks)
    exact = oracle(student, teacher, norm=norm, **masks)
    assert_close(loss, exact.loss, exact.loss_scale)
    found = torch.autograd.grad(loss, (a, c))
    for i, gradient in zip((0, 2), found, strict=True):
        expected = exact.gradients[i] + exact.gradients[i + 1]
        assert_close(gradient, expected, sum(exact.gradient_scales[i : i + 2]))


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("symmetric", [False, True], ids=["two maps", "one map"])
def test_a_teacher_may_be_a_ready_matrix(symmetric, norm):
    mask = MASKS["anywhere"](4, 4, 5)
    a, b = network(4, (5, 5) if symmetric else (5, 4), (4, 5), mask)
    b = a if symmetric else b
    matrix = torch.randn(4, a.shape[1], b.shape[1], requires_grad=True)
    loss = fsp.fsp_loss([(a, b)], [matrix], norm=norm, student_mask=mask)
    exact = oracle([(a, b)], [matrix], norm=norm, student_mask=mask)
    assert_close(loss, exact.loss, exact.loss_scale)
    to_a, to_matrix = torch.autograd.grad(loss, (a, matrix))
    expected = exact.gradients[0] + exact.gradients[1] if symmetric else exact.gradients[0]
    assert_close(to_a, expected, sum(exact.gradient_scales[:2]))
    assert_close(to_matrix, exact.gradients[2], exact.gradient_scales[2])


@pytest.mark.usefixtures("backend")
def test_a_ready_matrix_has_no_mask_beside_maps_that_have():
    masks = masks_of("both", MASKS["anywhere"], 4, SIZES["matrix"])
    calls = [call_of(masks) for _ in range(2)]
    student = [call[0][0] for call in calls]
    check(student, [torch.randn(4, 5, 4, requires_grad=True), calls[1][1][0]], **masks)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("noise", [1.0, 1e-3, 1e-5])
@pytest.mark.parametrize("name", ["matrix", "gram"])
def test_one_mask_for_both_networks_keeps_gradients_accurate_near_the_teacher(name, noise):
    masks = masks_of("both", MASKS["anywhere"], 4, SIZES[name])
    [teacher] = call_of(masks, name)[1]
    student = tuple((x + noise * torch.randn_like(x)).detach().requires_grad_() for x in teacher)
    loss = fsp.fsp_loss([student], [teacher], **masks)
    found = torch.autograd.grad(loss, student)
    exact = oracle([student], [teacher], **masks).gradients
    for gradient, expected in zip(found, exact, strict=False):
        assert (gradient.double() - expected).norm() <= 1e-5 * expected.norm()


@pytest.mark.parametrize("networks", NETWORKS)
@pytest.mark.parametrize("norm", NORMS)
def test_chunks_of_samples_take_their_masks(planner, norm, networks):
    planner(CHUNK_BYTES=1, CHUNK_SAMPLES=1)
    masks = masks_of(networks, MASKS["right padded"], 5, SIZES["matrix"])
    student, teacher = call_of(masks, batch=5)
    plan = fsp.explain(student, teacher, norm=norm, backend="torch", **masks)
    assert plan.pairs[0].samples == 1
    with fsp.use_backend("torch"):
        check(student, teacher, norm=norm, **masks)


@pytest.mark.usefixtures("backend")
def test_several_pairs_share_a_mask_and_may_have_a_loss_each():
    masks = masks_of("each its own", MASKS["anywhere"], 4, SIZES["matrix"])
    calls = [call_of(masks) for _ in range(3)]
    student, teacher = ([call[i][0] for call in calls] for i in range(2))
    weights = [0.5, 2.0, 1.0]
    check(student, teacher, weights=weights, **masks)
    found = fsp.fsp_loss(student, teacher, weights=weights, reduction="none", **masks)
    alone = [fsp.fsp_loss(*call, **masks) for call in calls]
    torch.testing.assert_close(found, torch.stack(alone) * torch.tensor(weights))


@pytest.mark.usefixtures("backend")
def test_channels_may_come_last():
    mask = right_padded(4, 9)
    [pair], [entry] = call_of({"student_mask": mask, "teacher_mask": mask}, "sequence")
    expected = fsp.fsp_loss([pair], [entry], channel_dim=1, student_mask=mask, teacher_mask=mask)
    pair, entry = (tuple(x.mT for x in maps) for maps in (pair, entry))
    found = fsp.fsp_loss([pair], [entry], channel_dim=-1, student_mask=mask, teacher_mask=mask)
    torch.testing.assert_close(found, expected)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("make", LAYOUTS.values(), ids=LAYOUTS)
def test_a_mask_may_lie_in_memory_in_any_way(make):
    mask = make(MASKS["anywhere"](4, 1, 4, 5))[:, 0]
    masks = {"student_mask": mask, "teacher_mask": mask}
    check(*call_of(masks), **masks)


@pytest.mark.usefixtures("backend")
def test_a_mask_of_equal_values_may_be_another_tensor():
    mask = MASKS["anywhere"](4, 4, 5)
    student, teacher = call_of({"student_mask": mask, "teacher_mask": mask})
    same = fsp.explain(student, teacher, student_mask=mask, teacher_mask=mask)
    apart = fsp.explain(student, teacher, student_mask=mask, teacher_mask=mask.clone())
    assert [plan.pairs[0].residual for plan in (same, apart)] == ["difference", "apart"]
    assert "masked" in str(same)
    check(student, teacher, student_mask=mask, teacher_mask=mask.clone())


def test_a_mask_may_change_between_calls_and_after_them():
    mask = MASKS["anywhere"](4, 4, 5)
    student, teacher = call_of({})
    loss = fsp.fsp_loss(student, teacher, student_mask=mask, teacher_mask=mask)
    other = ~mask
    check(student, teacher, student_mask=other, teacher_mask=other)
    expected = oracle(student, teacher, student_mask=mask, teacher_mask=mask).gradients[0]
    mask.fill_(value=True)
    (found,) = torch.autograd.grad(loss, student[0][0])
    assert_close(found, expected)


@pytest.mark.parametrize(("channels", "size"), [((24, 20), (40, 40)), ((64, 48), (2, 3))], ids=str)
def test_the_flops_and_the_memory_of_a_plan_are_those_of_its_execution(channels, size):
    masks = masks_of("each its own", MASKS["anywhere"], 4, size)
    student, teacher = ([network(4, channels, size, None)] for _ in range(2))
    with fsp.use_backend("torch"):
        plan = fsp.explain(student, teacher, **masks)
        with FlopCounterMode(display=False) as counter:
            fsp.fsp_loss(student, teacher, **masks)
    assert counter.get_total_flops() == plan.flops
    maps, flat = flatten(student, teacher), [x.flatten(1) for x in masks.values()]
    kept = []
    with torch.no_grad():
        peak = profiled_peak(lambda: kept.append(TorchBackend().loss(maps, plan, (1.0,), flat)))
    assert peak <= 1.01 * plan.extra_bytes + 4096


# --- the module, the operator, transforms ---------------------------------------------------------


def test_the_module_takes_masks():
    masks = masks_of("each its own", MASKS["anywhere"], 4, SIZES["matrix"])
    student, teacher = call_of(masks)
    found = fsp.FSPLoss(norm="mse")(student, teacher, **masks)
    torch.testing.assert_close(found, fsp.fsp_loss(student, teacher, norm="mse", **masks))


@pytest.mark.parametrize("networks", NETWORKS)
def test_derivatives_are_right_in_fp64(networks):
    masks = masks_of(networks, MASKS["anywhere"], 3, (2, 2))
    tensors = [
        torch.randn(3, c, 2, 2, dtype=torch.float64, requires_grad=True) for c in (2, 3, 2, 3)
    ]

    def loss(a, b, c, d):
        return fsp.fsp_loss([(a, b)], [(c, d)], **masks)

    assert gradcheck(loss, tensors)


@pytest.mark.parametrize("networks", NETWORKS)
def test_the_operator_is_well_behaved(networks):
    masks = masks_of(networks, MASKS["anywhere"], 4, SIZES["matrix"])
    student, teacher = call_of(masks)
    maps = flatten(student, teacher)
    of_student, of_teacher = (masks.get(f"{x}_mask") for x in ("student", "teacher"))
    shares = of_student is of_teacher
    flat = [None if x is None else x.flatten(1) for x in (of_student, of_teacher)]
    options = "max", "frobenius", "torch", None, "sum", [], flat[0], None if shares else flat[1]
    opcheck(torch.ops.fsp.loss.default, (maps, [False], [True] * 4, [1.0], *options, shares))


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("networks", NETWORKS)
def test_a_compiled_call_equals_the_eager_one(networks, dynamic):
    masks = masks_of(networks, MASKS["anywhere"], 4, SIZES["matrix"])
    student, teacher = call_of(masks)
    compiled = torch.compile(fsp.fsp_loss, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    results = []
    for function in (fsp.fsp_loss, compiled):
        loss = function(student, teacher, **masks)
        results.append((loss, *torch.autograd.grad(loss, flatten(student, teacher))))
    torch.testing.assert_close(*results)


class _Model(torch.nn.Module):
    def forward(self, a, b, c, d, mask):
        loss = fsp.fsp_loss([(a, b)], [(c, d)], student_mask=mask, teacher_mask=mask)
        return loss, fsp.fsp_matrix(a, b, mask=mask)


def test_an_exported_program_has_a_mask_among_its_inputs():
    mask = MASKS["anywhere"](4, 4, 5)
    student, teacher = call_of({"student_mask": mask, "teacher_mask": mask})
    inputs = flatten(student, teacher)
    program = torch.export.export(_Model(), (*inputs, mask)).module()
    for given_mask in (mask, mask.flip(0)):
        maps = [x.detach().nan_to_num(0.5) for x in inputs]
        found, expected = (model(*maps, given_mask) for model in (program, _Model()))
        torch.testing.assert_close(found, expected)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("in_dims", [(0, 0, 0), (None, 1, 0), (0, None, None), (None, 0, None)])
def test_vmap_maps_masks_too(in_dims):
    a, b = network(4, (5, 4), (4, 5), None)
    mask = MASKS["anywhere"](4, 4, 5)
    stacks = [torch.stack([x, x.roll(1, 0), 0 * x == 0]).to(x.dtype) for x in (a, mask, ~mask)]

    def loss(x, student_mask, teacher_mask):
        masks = {"student_mask": student_mask, "teacher_mask": teacher_mask}
        return fsp.fsp_loss([(x, b)], [(b.new_ones(a.shape), b)], **masks)

    inputs = [
        one if dim is None else stack.movedim(0, dim)
        for one, stack, dim in zip((a, mask, ~mask), stacks, in_dims, strict=True)
    ]
    found = torch.vmap(loss, in_dims)(*inputs)
    expected = [
        loss(
            *(
                x if dim is None else x.select(dim, i)
                for x, dim in zip(inputs, in_dims, strict=True)
            )
        )
        for i in range(3)
    ]
    torch.testing.assert_close(found, torch.stack(expected))


def test_transforms_know_one_mask_for_both_networks():
    student, teacher = call_of({})
    (a, b), entry, mask = student[0], teacher[0], MASKS["anywhere"](4, 4, 5)

    def loss(x, mask):
        return fsp.fsp_loss([(x, b)], [entry], student_mask=mask, teacher_mask=mask)

    found = torch.vmap(torch.func.grad(loss))(torch.stack([a, 2 * a]), torch.stack([mask, ~mask]))
    for each, x, own in zip(found, (a, 2 * a), (mask, ~mask), strict=True):
        (expected,) = torch.autograd.grad(loss(x, own), x)
        torch.testing.assert_close(each, expected)


# --- the matrix -----------------------------------------------------------------------------------


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("make", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("name", SIZES)
def test_a_matrix_is_that_of_the_positions_that_count(name, make, dtype):
    mask = make(4, *SIZES[name])
    first, second = network(4, (5, 4), SIZES[name], mask, dtype=dtype)
    found = fsp.fsp_matrix(first, second, mask=mask, channel_dim=1)
    incoming = torch.randn(found.shape, dtype=torch.float64).to(dtype)
    gradients = torch.autograd.grad(found, (first, second), incoming)
    wide = [x.detach().double().requires_grad_() for x in (first, second)]
    exact = reference.fsp_matrix(*wide, mask=mask)
    expected = torch.autograd.grad(exact, wide, incoming.double())
    assert found.dtype == dtype
    tolerance = TOLERANCES[dtype]
    slack = {"rtol": 3 * tolerance.rtol, "atol": 20 * max(tolerance.rtol, tolerance.atol)}
    for x, y in zip((found, *gradients), (exact, *expected), strict=True):
        torch.testing.assert_close(x.double(), y, **slack)


def test_a_masked_matrix_is_twice_differentiable():
    mask = MASKS["anywhere"](3, 2, 2)
    maps = [torch.randn(3, c, 2, 2, dtype=torch.float64, requires_grad=True) for c in (2, 3)]

    def matrix(first, second):
        return fsp.fsp_matrix(first, second, mask=mask)

    assert gradcheck(matrix, maps, check_forward_ad=True)
    assert gradgradcheck(matrix, maps)


@pytest.mark.usefixtures("backend")
def test_a_ready_matrix_may_be_computed_with_the_mask_of_the_teacher():
    masks = masks_of("each its own", MASKS["anywhere"], 4, SIZES["matrix"])
    student, teacher = call_of(masks)
    matrix = fsp.fsp_matrix(*teacher[0], mask=masks["teacher_mask"])
    found = fsp.fsp_loss(student, [matrix], student_mask=masks["student_mask"])
    torch.testing.assert_close(found, fsp.fsp_loss(student, teacher, **masks))


# --- errors ---------------------------------------------------------------------------------------

BAD = {
    "a list": ([True], TypeError, "got builtins.list, expected a torch.Tensor"),
    "integers": (
        torch.ones(4, 4, 5).long(),
        TypeError,
        "has dtype torch.int64, expected torch.bool",
    ),
    "sparse": (torch.ones(4, 4, 5).bool().to_sparse(), TypeError, "has layout torch.sparse_coo"),
    "another batch": (
        torch.ones(3, 4, 5).bool(),
        ValueError,
        "(3, 4, 5), expected (B, *spatial) = (4, 4, 5)",
    ),
    "another size": (
        torch.ones(4, 5, 4).bool(),
        ValueError,
        "(4, 5, 4), expected (B, *spatial) = (4, 4, 5)",
    ),
    "with channels": (
        torch.ones(4, 1, 4, 5).bool(),
        ValueError,
        "expected (B, *spatial) = (4, 4, 5)",
    ),
    "another device": (
        torch.ones(4, 4, 5, device="meta").bool(),
        ValueError,
        "is on meta, expected cpu",
    ),
}


@pytest.mark.parametrize("of", ["student", "teacher"])
@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no_grad"])
def test_a_bad_mask_is_an_error_that_says_what_it_must_be(case, of, grad):
    mask, error, message = BAD[case]
    student, teacher = call_of({})
    operator = FlopCounterMode(display=False)  # under a dispatch mode the call goes to it
    for context in (torch.set_grad_enabled(grad), operator):
        with context, pytest.raises(error) as caught:
            fsp.fsp_loss(student, teacher, **{f"{of}_mask": mask})
        assert str(caught.value).startswith(f"{of}_mask: ")
        assert message in str(caught.value)
    with pytest.raises(error) as caught:
        fsp.explain(student, teacher, **{f"{of}_mask": mask})
    with pytest.raises(error) as caught:
        fsp.fsp_matrix(*student[0], mask=mask)
    assert str(caught.value).startswith("mask: ")
    assert message in str(caught.value)


def test_the_maps_of_all_pairs_must_suit_the_mask():
    student, teacher = call_of({})
    other = [network(4, (5, 4), (2, 2), None)]
    mask = MASKS["all"](4, 4, 5)
    with pytest.raises(ValueError, match=r"student_mask: .*student\[1\]\[0\].*another call"):
        fsp.fsp_loss(student + other, teacher + other, student_mask=mask)
    pooled = [(student[0][0], other[0][1])]
    with pytest.raises(ValueError, match=r"student_mask: .*student\[0\]\[1\]"):
        fsp.fsp_loss(pooled, teacher, student_mask=mask)
    with pytest.raises(ValueError, match=r"mask: .*one entry for each position of second"):
        fsp.fsp_matrix(*pooled[0], mask=mask)


def test_ready_matrices_have_no_mask():
    student, _ = call_of({})
    mask = MASKS["all"](4, 4, 5)
    with pytest.raises(ValueError, match=r"teacher_mask: .*pass the mask to fsp_matrix"):
        fsp.fsp_loss(student, [torch.randn(4, 5, 4)], teacher_mask=mask)
