"""The kernels in csrc/cpu/: layouts, sizes, threads, vectors of every width, what is left out."""

from __future__ import annotations

import importlib.util
import itertools
import shutil
import subprocess
import sys
import sysconfig
import threading
from pathlib import Path

import pybind11
import pytest
import torch
from layouts import LAYOUTS
from tolerances import BF16_PRODUCTS, oracle

import fsp_kernels as fsp
from fsp_kernels.backends import compiled, cpu, registered_backends

ROOT = Path(__file__).parents[1]
FP32 = (torch.float32,) * 4
BACKEND = registered_backends()["cpu"]
pytestmark = pytest.mark.skipif(
    BACKEND.why_unavailable() is not None, reason=str(BACKEND.why_unavailable())
)


def random(*shape, dtype=torch.float32, layout="contiguous", seed=0):
    x = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return LAYOUTS[layout](x.to(dtype)).requires_grad_()


def pair_of(
    *, batch=2, m=5, n=4, size=(6, 6), teacher=None, dtypes=(torch.float32,) * 4, **options
):
    sizes = size, size, teacher or size, teacher or size
    shapes = zip((m, n, m, n), sizes, dtypes, strict=True)
    return [
        random(batch, c, *s, dtype=dtype, seed=i, **options)
        for i, (c, s, dtype) in enumerate(shapes)
    ]


def check(a, b, c, d, **options):
    loss = fsp.fsp_loss([(a, b)], [(c, d)], backend="cpu", channel_dim=1, **options)
    leaves = list(dict.fromkeys((a, b, c, d)))
    gradients = torch.autograd.grad(loss, leaves)
    if len(leaves) == 4:
        plan = fsp.explain([(a, b)], [(c, d)], backend="cpu", channel_dim=1, **options)
        oracle([(a, b)], [(c, d)], **options).check(loss, gradients, plan)
    return loss, gradients


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def calls_of_torch(monkeypatch):
    """The pairs that the torch backend evaluates."""
    found = []
    evaluate = cpu.pair_loss

    def record(maps, gradients, pair, plan, weight, masks):
        found.append(pair)
        return evaluate(maps, gradients, pair, plan, weight, masks)

    monkeypatch.setattr(cpu, "pair_loss", record)
    BACKEND.prepared.clear()
    return found


# 1, and around the rows, columns and panels of tiles: 6, 8, 16; 256 and 512 are read at a time.
@pytest.mark.parametrize(
    ("m", "n"), [(1, 1), (5, 17), (6, 16), (7, 33), (16, 5), (48, 64), (130, 70)]
)
@pytest.mark.parametrize("positions", [1, 7, 8, 49, 515, 1100])
@pytest.mark.parametrize("layout", ["contiguous", "channels last"])
def test_sizes_around_those_of_tiles(m, n, positions, layout):
    check(*pair_of(m=m, n=n, size=(positions, 1), layout=layout))


@pytest.mark.parametrize("positions", [1, 7, 8, 9, 17, 40])
@pytest.mark.parametrize("layout", ["contiguous", "channels last"])
def test_gram_blocks_of_sizes_around_those_of_tiles(positions, layout):
    a, b, c, d = pair_of(m=300, n=280, size=(positions, 1), layout=layout)
    assert fsp.explain([(a, b)], [(c, d)], backend="cpu").pairs[0].form == "gram"
    check(a, b, c, d)


# Tiles read maps of whole vectors of channels where they are, if the channels adjoin.
@pytest.mark.parametrize(("m", "n"), [(9, 20), (16, 48)])
@pytest.mark.parametrize("layouts", list(itertools.product(LAYOUTS, repeat=2)), ids="-".join)
def test_both_networks_may_have_any_layout(layouts, m, n):
    for size in ((6, 6), (5, 7)):  # maps of one size are subtracted
        students, teachers = (pair_of(m=m, n=n, teacher=size, layout=x) for x in layouts)
        check(*students[:2], *teachers[2:])


@pytest.mark.parametrize("layouts", list(itertools.permutations(LAYOUTS, 2)), ids="-".join)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_both_maps_may_have_any_layout(layouts, dtype):
    first, second = (pair_of(m=9, n=20, layout=x, dtypes=(dtype,) * 4) for x in layouts)
    check(first[0], second[1], first[2], second[3])


@pytest.mark.parametrize(
    "dtypes",
    list(itertools.product((torch.float32, torch.bfloat16, torch.float16), repeat=2)),
    ids=str,
)
@pytest.mark.parametrize("size", [(3, 3), (9, 9)], ids=["gram", "matrix"])
@pytest.mark.parametrize("layout", ["contiguous", "channels last"])
def test_dtypes_may_differ(dtypes, size, layout):
    for own in (dtypes * 2, dtypes + dtypes[::-1]):  # of maps, of networks
        check(*pair_of(m=32, n=32, size=size, dtypes=own, layout=layout))


def test_bits_do_not_depend_on_threads(threads):
    tensors = pair_of(batch=16, m=20, n=40)
    threads(1)
    loss, gradients = check(*tensors)
    for number in (2, 5, 16):
        threads(number)
        again = check(*tensors)
        assert torch.equal(again[0], loss)
        assert all(map(torch.equal, again[1], gradients))


def test_calls_from_several_threads_do_not_disturb_each_other():
    tensors = [pair_of(batch=4, m=c, n=c, size=(c, c)) for c in (8, 16, 24, 32)]
    expected = [check(*each)[1] for each in tensors]
    wrong = []

    def work(index):
        for _ in range(20):
            found = check_again(*tensors[index])
            if not all(map(torch.equal, found, expected[index])):
                wrong.append(index)

    def check_again(a, b, c, d):
        loss = fsp.fsp_loss([(a, b)], [(c, d)], backend="cpu", channel_dim=1)
        return torch.autograd.grad(loss, (a, b, c, d))

    workers = [threading.Thread(target=work, args=(i,)) for i in range(len(tensors))]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


def test_pairs_share_a_call_and_keep_their_losses():
    first, second = pair_of(m=30, n=8), pair_of(batch=5, m=3, n=3, size=(2, 2))
    student, teacher = [first[:2], second[:2]], [first[2:], second[2:]]
    losses = fsp.fsp_loss(
        student, teacher, weights=[2.0, 0.5], reduction="none", backend="cpu", channel_dim=1
    )
    gradients = torch.autograd.grad(losses.sum(), [*first, *second])
    for i, (tensors, weight) in enumerate(((first, 2.0), (second, 0.5))):
        a, b, c, d = tensors
        expected = oracle([(a, b)], [(c, d)], [weight])
        expected.check(losses[i].detach(), gradients[4 * i : 4 * i + 4])


def test_fewer_samples_than_threads_are_left_to_torch(threads, calls_of_torch):
    tensors = pair_of(batch=3)
    threads(3)
    check(*tensors)
    assert not calls_of_torch
    threads(4)
    check(*tensors)
    assert len(calls_of_torch) == 1


def test_samples_of_all_pairs_count(threads, calls_of_torch):
    pairs = [pair_of(batch=2), pair_of(batch=1)]
    student, teacher = [x[:2] for x in pairs], [x[2:] for x in pairs]
    for number in (3, 4):
        threads(number)
        loss = fsp.fsp_loss(student, teacher, backend="cpu", channel_dim=1)
        found = torch.autograd.grad(loss, [x for pair in pairs for x in pair])
        oracle(student, teacher).check(loss, found)
        assert len(calls_of_torch) == (0 if number == 3 else 2)


def test_spatial_axes_that_cannot_be_flattened_are_left_to_torch(calls_of_torch):
    tensors = [x.detach().transpose(2, 3).requires_grad_() for x in pair_of(size=(4, 6))]
    check(*tensors)
    assert len(calls_of_torch) == 1


def test_a_ready_matrix_is_left_to_torch_and_its_neighbours_are_not(calls_of_torch):
    a, b, c, d = pair_of()
    matrix = fsp.fsp_matrix(c, d).detach()
    losses = fsp.fsp_loss([(a, b), (a, b)], [(c, d), matrix], backend="cpu", reduction="none")
    assert [len(pair.teacher) for pair in calls_of_torch] == [1]
    torch.testing.assert_close(losses[0], losses[1])


def test_a_nan_of_any_bits_stays_one_in_bf16():
    a, b, c, d = pair_of(dtypes=(torch.bfloat16, *FP32[1:]))
    nan = torch.tensor(0x7FFFFFFF, dtype=torch.int32).view(
        torch.float32
    )  # rounded up it would be 0
    with torch.no_grad():
        b[0, 0, 0, 0] = nan
    (gradient,) = torch.autograd.grad(fsp.fsp_loss([(a, b)], [(c, d)], backend="cpu"), a)
    assert gradient[0].isnan().all()
    assert gradient[1].isfinite().all()


@pytest.mark.parametrize("expanded", [False, True])
def test_a_negative_view_is_read_with_its_sign(expanded):
    a, b, c, d = pair_of()
    values = a.detach()[:, :1] if expanded else a.detach()
    imaginary = torch.complex(torch.zeros_like(values), values)
    view = imaginary.conj().imag.expand_as(a).requires_grad_()
    assert view.is_neg()
    check(view, b, c, d)


def test_the_loss_is_on_the_cpu_whatever_device_is_the_default():
    a, b, c, d = pair_of()
    with torch.device("meta"):
        assert fsp.fsp_loss([(a, b)], [(c, d)]).device.type == "cpu"


@pytest.mark.parametrize(
    ("size", "pooled"),
    [
        ((12,), (4,)),
        ((10,), (3,)),
        ((8, 8), (4, 4)),
        ((8, 6), (8, 3)),
        ((7, 9), (3, 4)),
        ((7, 7), (1, 1)),
        ((33, 31), (2, 3)),
        ((4, 6, 8), (2, 3, 4)),
        ((5, 7, 3), (2, 3, 3)),
    ],
    ids=str,
)
@pytest.mark.parametrize("pool", ["max", "avg"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "layout",
    ["contiguous", "channels last", "slice of channels", "slice of channels-last channels"],
)
@pytest.mark.parametrize("channels", [3, 40, 48])
def test_a_map_is_pooled_by_the_kernels(
    size, pooled, pool, dtype, layout, channels, calls_of_torch
):
    own = {"m": channels, "n": channels, "dtypes": (dtype,) * 4, "layout": layout}
    a, _, c, _ = pair_of(size=size, **own)
    _, b, _, d = pair_of(size=pooled, **own)
    check(a, b, c, d, pool=pool)
    check(b, a, d, c, pool=pool)
    assert not calls_of_torch


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_channels_that_adjoin_are_pooled_where_they_are(dtype):
    for layout in ("channels last", "slice of channels-last channels"):
        own = {"m": 48, "n": 16, "dtypes": (dtype,) * 4, "layout": layout}
        a, _, c, _ = pair_of(size=(8, 6), **own)
        _, b, _, d = pair_of(size=(4, 2), **own)
        for pool in ("max", "avg"):
            check(a, b, c, d, pool=pool)


@pytest.mark.parametrize("layout", ["contiguous", "channels last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("channels", [5, 16])
def test_ties_and_nan_are_pooled_as_by_pytorch(channels, dtype, layout):
    seeded = torch.Generator().manual_seed(0)
    x = torch.randint(0, 3, (2, channels, 8, 6), generator=seeded).to(dtype)
    x[0, 1, 2, 2:4] = float("nan")
    x[0, 2, :, :] = -float("inf")
    a = LAYOUTS[layout](x).requires_grad_()
    b = random(2, 4, 4, 3, dtype=dtype)
    c, d = torch.zeros_like(a), torch.zeros_like(b)
    found, expected = (
        torch.autograd.grad(fsp.fsp_loss([(a, b)], [(c, d)], backend=backend), (a, b))
        for backend in ("cpu", "torch")
    )
    for x, y in zip(found, expected, strict=True):
        # Of the largest element: one that cancels keeps the error of the rounded residual.
        tolerance = BF16_PRODUCTS.rtol if dtype == torch.bfloat16 else 1e-5
        atol = tolerance * y.abs().nan_to_num(nan=0).max().item()
        torch.testing.assert_close(x, y, rtol=tolerance, atol=atol, equal_nan=True)


def test_what_it_does_not_serve_is_an_error_that_says_so():
    maps = pair_of(dtypes=(torch.float64,) * 4)
    with pytest.raises(ValueError, match=r"'cpu' cannot serve these tensors: .* not fp64"):
        fsp.fsp_loss([maps[:2]], [maps[2:]], backend="cpu")
    reason = BACKEND.why_unsupported(torch.device("cuda", 0), (torch.float32,))
    assert reason == "its kernels run on the CPU, not on cuda"


def test_a_missing_module_is_named(monkeypatch):
    monkeypatch.setattr(cpu, "compiled_module", lambda name: f"_{name} is not built")
    cpu._why_unavailable.cache_clear()
    try:
        assert BACKEND.why_unavailable() == "_cpu is not built"
        with pytest.raises(RuntimeError, match="_cpu is not built"):
            fsp.fsp_loss([pair_of()[:2]], [pair_of()[2:]], backend="cpu")
    finally:
        cpu._why_unavailable.cache_clear()


def test_a_processor_that_has_no_kernels_is_told_what_it_lacks(monkeypatch):
    class Module:
        instruction_sets = ()

    monkeypatch.setattr(cpu, "compiled_module", lambda _: Module)
    cpu._why_unavailable.cache_clear()
    try:
        assert BACKEND.why_unavailable() == "its kernels need a processor with AVX2"
    finally:
        cpu._why_unavailable.cache_clear()


def test_kernels_of_another_processor_are_refused():
    module = compiled.compiled_module("cpu")
    with pytest.raises(ValueError, match="does not run the kernels for sse9"):
        module.Loss([], "sse9")


SOURCES = ROOT / "csrc" / "cpu"


@pytest.fixture(scope="session")
def module_of(tmp_path_factory):
    """The kernels with vectors of another width or by another compiler, for this processor."""

    def build(compiler, width):
        folder = tmp_path_factory.mktemp(f"width{width}")
        sets = compiled.compiled_module("cpu").instruction_sets
        name = next(x for x in sets if x != "avx512_bf16")  # which not every compiler has
        instructions = ["-mavx2", "-mfma", "-mf16c"] if name != "baseline" else []
        extension = folder / Path(compiled.compiled_module("cpu").__file__).name
        kernels = [f"-DFSP_VARIANT={name}", f"-DFSP_VECTOR_BYTES={width}", *instructions]
        # Vectors that the processor lacks are made of its own, and GCC says that it is slow.
        shared = ["-std=gnu++17", "-w", "-O1", "-fPIC", "-fopenmp", "-fvisibility=hidden"]
        objects = folder / "variant.o", folder / "others.o"
        # The other variants that bindings.cpp names are not compiled: they are never called.
        others = "\n".join(
            f"namespace fsp::cpu::{x} {{ void evaluate(const Pair&, int64_t, Scratch&) {{}} }}"
            for x in ("avx2", "avx512", "avx512_bf16", "baseline")
            if x != name
        )
        (folder / "others.cpp").write_text(f'#include "types.h"\n{others}\n')
        includes = [
            f"-I{SOURCES}",
            f"-I{pybind11.get_include()}",
            f"-I{sysconfig.get_path('include')}",
        ]
        for command in (
            [compiler, "-c", SOURCES / "variant.cpp", *kernels, "-o", objects[0]],
            ["c++", "-c", folder / "others.cpp", *includes, "-o", objects[1]],
            ["c++", "-shared", SOURCES / "bindings.cpp", *includes, *objects, "-o", extension],
        ):
            subprocess.run([*map(str, command), *shared], check=True)
        spec = importlib.util.spec_from_file_location("_cpu", extension)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        sys.modules.pop("_cpu", None)  # such a module enters itself
        return module

    return build


@pytest.mark.slow
@pytest.mark.parametrize(("compiler", "width"), [("c++", 16), ("c++", 64), ("clang++", 32)])
def test_vectors_of_every_width_compute_the_same(module_of, compiler, width, monkeypatch):
    if shutil.which(compiler) is None:
        pytest.skip(f"there is no {compiler}")
    module = module_of(compiler, width)
    monkeypatch.setattr(cpu, "compiled_module", lambda _: module)
    monkeypatch.setattr(BACKEND, "prepared", {})
    for layout, norm in itertools.product(("contiguous", "channels last"), ("mse", "column")):
        for m, n, size in ((5, 17, (3, 1)), (30, 33, (6, 6)), (48, 70, (20, 28)), (90, 70, (3, 3))):
            check(*pair_of(m=m, n=n, size=size, layout=layout), norm=norm)
            check(*pair_of(m=m, n=n, size=size, dtypes=(torch.bfloat16,) * 4), norm=norm)
            masks = [torch.rand(2, *size) < 0.5 for _ in range(2)]
            for of_teacher in masks:
                check(
                    *pair_of(m=m, n=n, size=size, layout=layout),
                    norm=norm,
                    student_mask=masks[0],
                    teacher_mask=of_teacher,
                )
    forms = {key[0].pairs[0].form for key in BACKEND.prepared}
    assert forms == {"gram", "matrix"}
    a, c = random(2, 20, 9, 9), random(2, 20, 9, 9, seed=1)
    _, (gradient, _) = check(a, a, c, c)
    expected = oracle([(a, a)], [(c, c)])
    torch.testing.assert_close(gradient.double(), expected.gradients[0] + expected.gradients[1])
